"""Update: orders that somebody at the device leaves for the agent, each a small file.

    <state>/orders/clear-penalties     empty the penalty box, and look again
    <state>/orders/go-back             serve the version before again; what is in the file is the reason

Rules:
* who may write into the state directory may order; there is no other way in, and no port;
* only the agent acts on its state: a command leaves an order, and the agent takes it, now or when it is next started;
* an order is removed once it was carried out; whether it was, a cut leaves no doubt about: to go back twice is to be
  where one was;
* one that nobody knows is removed with a word in the log.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final, Literal, NamedTuple

from lightship_agent.contract.codes import StorageError
from lightship_agent.files import storage_error, write_durably

log = logging.getLogger(__name__)

Verb = Literal["clear-penalties", "go-back"]
FOLDER: Final = "orders"
VERBS: Final[tuple[Verb, ...]] = ("clear-penalties", "go-back")
_MAX_REASON: Final = 500  # bytes


class Order(NamedTuple):
    """What is wanted, why, and the file that says so."""

    verb: Verb
    reason: str
    path: Path


def prepare(state_dir: Path) -> None:
    """Make the folder, so that it is ours, whoever leaves something there later."""
    try:
        (state_dir / FOLDER).mkdir(mode=0o700, exist_ok=True)
        for verb in VERBS:
            path = state_dir / FOLDER / verb
            if not path.exists():  # it was carried out, and a cut kept its note
                _note(path).unlink(missing_ok=True)
    except OSError as e:  # without it nobody can order anything; the rest goes on
        log.warning("orders: %s", e)


def anything(state_dir: Path) -> bool:
    """Whether something is there."""
    try:
        with os.scandir(state_dir / FOLDER) as entries:
            return any(not e.name.startswith(".") and e.is_file() for e in entries)
    except OSError:
        return False


def leave(state_dir: Path, verb: Verb, reason: str = "") -> Path:
    """Leave an order; the file that is gone once it was taken.

    Raises:
        StorageError: storage.full, storage.unwritable.
    """
    folder = state_dir / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as e:
        raise storage_error(e, folder) from e
    path = folder / verb
    write_durably(path, reason.encode()[:_MAX_REASON])
    return path


def waiting(state_dir: Path) -> list[Order]:
    """The orders that are there now."""
    try:
        paths = sorted(p for p in (state_dir / FOLDER).iterdir() if not p.name.startswith(".") and p.is_file())
    except OSError:  # there is no such folder until the first order
        return []
    found = []
    for path in paths:
        verb = next((v for v in VERBS if v == path.name), None)
        try:
            if verb is None:
                log.warning("orders: %r is none that we know.", path.name)
                path.unlink()
                continue
            with path.open("rb") as f:
                reason = "".join(c if c.isprintable() else " " for c in f.read(_MAX_REASON).decode(errors="replace"))
        except OSError as e:
            log.warning("orders: %s: %s", path, e)
            continue
        found.append(Order(verb, reason.strip(), path))
    return found


def begun(order: Order, at: str) -> str:
    """Note durably that the order is begun while `at` runs; what ran when it was begun first, if a cut came between.

    Raises:
        StorageError: storage.full, storage.unwritable.
    """
    note = _note(order.path)
    try:
        return note.read_text()
    except FileNotFoundError:
        write_durably(note, at.encode())
        return at
    except (OSError, UnicodeDecodeError) as e:
        raise StorageError("storage.unwritable", f"{note} can't be read: {e}.") from e


def done(order: Order) -> None:
    """The order was carried out.

    Raises:
        StorageError: storage.unwritable.
    """
    try:
        order.path.unlink(missing_ok=True)
        _note(order.path).unlink(missing_ok=True)
    except OSError as e:
        raise storage_error(e, order.path) from e


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.begun")
