"""Homes and servers for the control plane's tests: all of it real, on loopback and in temporary folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightship.home import Home

from .things import Served, serve_devices


@pytest.fixture(scope="session")
def fresh_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home as `lightship init` leaves it; it is copied, never opened."""
    path = tmp_path_factory.mktemp("fresh") / "home"
    Home.create(path).close()
    return path


@pytest.fixture
def home(fresh_home: Path, tmp_path: Path) -> Iterator[Home]:
    """An opened home of one's own."""
    path = tmp_path / "home"
    shutil.copytree(fresh_home, path)
    opened = Home.open(path)
    yield opened
    opened.close()


@pytest.fixture
def served(home: Home) -> Iterator[Served]:
    """The device API over `home`, on HTTPS with mutual TLS, in a thread."""
    with serve_devices(home) as running:
        yield running
