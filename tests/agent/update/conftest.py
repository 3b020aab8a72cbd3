"""A control plane of its own for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.agent.link.field import Field, open_field

from lightship.home import Home


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home without anything in it, to be copied: keys and migrations take longer to make than to copy."""
    path = tmp_path_factory.mktemp("template") / "home"
    Home.create(path).close()
    return path


@pytest.fixture
def field(tmp_path: Path, empty_home: Path) -> Iterator[Field]:
    """A home, its device API over real TLS, and devices to enrol."""
    with open_field(tmp_path, empty_home) as opened:
        yield opened
