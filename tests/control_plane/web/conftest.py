"""A home with a believable fleet, made once; pages only read, so the tests can share it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.control_plane.web import believable
from tests.control_plane.web.browser import Browser

from lightship.home import Home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    made = Home.create(Path(tmp_path_factory.mktemp("web")) / "home")
    believable.fill(made)
    yield made
    made.close()


@pytest.fixture
def fresh_home(tmp_path: Path) -> Iterator[Home]:
    made = Home.create(tmp_path / "home")
    yield made
    made.close()


@pytest.fixture
def client(home: Home) -> Browser:
    return Browser(home)
