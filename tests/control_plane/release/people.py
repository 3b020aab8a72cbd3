"""People with keys, and what they do with them on machines that are no servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from securesystemslib.signer import Signer, SSlibKey
from tests.control_plane.things import ACTOR

from lightship.home import Home
from lightship.registry import ceremonies
from lightship.release import ceremony
from lightship.release.ceremony import Ceremony
from lightship.release.changes import RoleKeys
from lightship.release.keyfiles import new_key, open_key, read_public
from lightship.release.keys import ONLINE_ROLES

NAMES = ("alice", "bob", "carol", "builder", "approver", "mallory", "dave")
ROOT, RELEASERS = ("alice", "bob", "carol"), ("builder", "approver")


class People:
    """Each has a key file of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in NAMES:
            new_key(folder / f"{name}.pem")

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    def public(self, name: str) -> SSlibKey:
        return read_public(self.folder / f"{name}.pub.json")

    def signer(self, name: str) -> Signer:
        return open_key(self.key(name))

    def keys(self, names: Sequence[str], threshold: int) -> RoleKeys:
        return RoleKeys.of([self.public(name) for name in names], threshold)

    def sign(self, carried: Ceremony, *names: str) -> Ceremony:
        """Carry it as a file to each, and have them sign it."""
        for name in names:
            carried = ceremony.decode(ceremony.encode(carried))
            ceremony.sign(carried, self.signer(name))
        return carried


def online(home: Home) -> dict[str, RoleKeys]:
    """The keys that a new server made itself."""
    return {role: RoleKeys.of([home.keys.signer(role).public_key]) for role in ONLINE_ROLES}


def first(home: Home, people: People) -> Ceremony:
    """The first ceremony, not signed yet: root and targets 2 of 3, releases 2 of 2."""
    wanted = {
        "root": people.keys(ROOT, 2),
        "targets": people.keys(ROOT, 2),
        "releases": people.keys(RELEASERS, 2),
        **online(home),
    }
    return ceremonies.begin(home, "First", wanted, actor=ACTOR)


def found(home: Home, people: People) -> None:
    """Hold it."""
    signed = people.sign(first(home, people), "alice", "bob", *RELEASERS)
    ceremonies.finish(home, [signed], actor=ACTOR)
