"""A production server, and the people whose keys it never sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.control_plane.release.device import Client, CuttableDisk
from tests.control_plane.release.people import People, found
from tests.control_plane.things import Served, serve_devices

from lightship.home import Home
from lightship.release import journal, repository


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    """Alice, Bob and Carol for root and targets, the builder and the approver for releases; and Mallory."""
    return People(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="session")
def founded(people: People, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A production home after its first ceremony; it is copied, never opened."""
    path = tmp_path_factory.mktemp("founded") / "home"
    home = Home.create(path, production=True)
    found(home, people)
    home.close()
    return path


@pytest.fixture
def office(founded: Path, tmp_path: Path) -> Iterator[Home]:
    """A production home of one's own: root and targets 2 of 3, releases 2 of 2, none of these keys here."""
    import shutil

    path = tmp_path / "office"
    shutil.copytree(founded, path)
    opened = Home.open(path)
    yield opened
    opened.close()


@pytest.fixture
def office_served(office: Home) -> Iterator[Served]:
    with serve_devices(office) as running:
        yield running


@pytest.fixture
def device(office_served: Served, tmp_path: Path) -> Iterator[Client]:
    """A device of the production server."""
    made = Client(office_served, tmp_path / "device")
    yield made
    made.plane.close()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> CuttableDisk:
    made = CuttableDisk()
    for module in (journal, repository):
        monkeypatch.setattr(module, "write_durably", made)
    return made
