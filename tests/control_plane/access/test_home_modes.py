"""What is secret in a home is its owner's only, from the first moment, and `lightship up` says where it is not."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from lightship.home import Home


def modes(home: Home) -> dict[str, int]:
    return {str(p.relative_to(home.path)): stat.S_IMODE(p.stat().st_mode) for p in home.path.rglob("*")}


def test_a_new_home_and_every_secret_in_it_are_their_owners_only(home: Home) -> None:
    assert home.exposed() == []
    found = modes(home)
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert {n: oct(m) for n, m in found.items() if n in ("keys", "ca") and m != 0o700} == {}
    private = {n for n in found if (home.path / n).is_file() and b"PRIVATE KEY" in (home.path / n).read_bytes()}
    assert len(private) >= 7
    assert {n: oct(found[n]) for n in {*private, "operator-token"} if found[n] != 0o600} == {}


def test_a_folder_that_was_there_before_is_closed_when_it_becomes_a_home(tmp_path: Path) -> None:
    path = tmp_path / "home"
    path.mkdir(mode=0o755)
    home = Home.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    home.close()


@pytest.mark.parametrize("name", ["", "keys", "ca", "ca/ca.key", "operator-token"])
def test_what_others_may_look_into_is_named(home: Home, name: str) -> None:
    path = home.path / name
    path.chmod(path.stat().st_mode | 0o040)
    assert home.exposed() == [path]


def test_certificates_are_for_everybody(home: Home) -> None:
    (home.path / "ca" / "ca.pem").chmod(0o644)
    assert home.exposed() == []
