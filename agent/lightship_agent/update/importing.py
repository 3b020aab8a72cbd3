"""Update: `lightship-agent import`: verify a carried file, leave it for the agent, and watch what becomes of it.

Rules:
* what is refused changes nothing on disk but the metadata cache, whose contents are verified as ever;
* the agent alone changes its state; here it is only read.
"""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from lightship_agent.contract.assignment import Assignment
from lightship_agent.contract.codes import LightshipError, MediaError, StorageError, error_of
from lightship_agent.link.identity import load_identity

from .check import CheckReply, CheckRequest, FileSource, check_in_child
from .clock import DeviceClock
from .machine import Penalty, UpdateState
from .media import OPENER, envelope_for, spool

#: An agent that runs has taken a file long before.
_TAKEN: Final = 20.0  # seconds
#: By then an objection is about this file, and not what is left of an earlier look at the server.
_OBJECTED: Final = 5.0  # seconds
_LOOK: Final = 0.2  # seconds between two looks
#: What whoever stands before the device can do about what the check says of the file.
_REMEDIES: Final = {
    "trust.expired": "It travelled for longer than it was exported for: export it anew, with a longer --expires.",
    "trust.rollback": "This device has seen newer lists or assignments than the file's: export it anew.",
    "trust.not-released": "The bundle was revoked, or the file was put together from several: export it anew.",
    "trust.signature": "The file comes from another control plane, or was altered.",
    "trust.metadata": "The file was altered, or put together from several: export it anew.",
    "trust.digest": "The file is damaged or was altered: copy it again.",
}
_WORDS: Final = {
    "idle": "waiting for the agent",
    "fetching": "unpacking",
    "trying": "trying the model in a process of its own",
    "swapped": "serving, under observation",
    "reaching": "looking for the control plane",
}


@dataclass(frozen=True)
class Imported:
    """A verified file; `waits_at` is where the agent finds it, None where the device runs the bundle already."""

    assignment: Assignment
    waits_at: Path | None
    size: int  # bytes


def import_file(
    path: Path,
    state_dir: Path,
    *,
    progress: Callable[[int, int], None] = lambda _done, _whole: None,
    check: Callable[[CheckRequest], CheckReply] = check_in_child,
) -> Imported:
    """Verify all of the file at `path`, and leave it for the agent of `state_dir`.

    Args:
        path: the file.
        state_dir: of the agent of this device.
        progress: told bytes copied and bytes in all, now and then.
        check: what verifies metadata and assignment.

    Raises:
        MediaError: media.*.
        TrustError: trust.*.
        StorageError: storage.*.
        EnrolError: enrol.not-enrolled.
        UpdateError: update.check-failed, update.check-timeout.
    """
    _check_user(state_dir)
    device = load_identity(state_dir).device
    state = read_state(state_dir)
    request = CheckRequest(
        state_dir=str(state_dir.resolve()),
        device=device,
        envelope=envelope_for(path, device),
        floor=state.floor,
        director=state.director,
        now=DeviceClock(state_dir).now(),
        source=FileSource(path=str(path.resolve()), opener=OPENER),
    )
    try:
        reply = check(request)
    except LightshipError as e:
        e.remedy = _REMEDIES.get(e.code, e.remedy)
        raise
    wanted = reply.assignment
    if state.phase == "idle" and state.current is not None and state.current.sha256 == wanted.sha256:
        return Imported(wanted, None, 0)
    waits_at = spool(path, state_dir, device=device, seq=wanted.seq, transport=reply.transport, progress=progress)
    return Imported(wanted, waits_at, reply.transport.length)


def follow(
    imported: Imported, state_dir: Path, *, timeout: float, progress: Callable[[str], None] = lambda _words: None
) -> str:
    """Wait until the agent has settled the file: "applied", or "untaken" where no agent seems to run.

    Raises:
        LightshipError: with the code that the agent gives, where the device stays with what it had.
        MediaError: media.waiting after `timeout` seconds, or at once while somebody on site objects.
    """
    if imported.waits_at is None:
        return "applied"
    wanted = imported.assignment
    began, said, before, taken = time.monotonic(), "", read_state(state_dir), False
    while imported.waits_at.exists():
        state = read_state(state_dir)
        taken = taken or state.phase != "idle"
        words = _WORDS.get(state.phase, state.phase)
        if words != said:
            progress(words)
            said = words
        spent = time.monotonic() - began
        objection = state.waiting.reason if state.waiting and state.waiting.sha256 == wanted.sha256 else ""
        if spent > timeout or (objection and state.phase == "idle" and spent > _OBJECTED):
            message = f"The agent has not settled the file yet: {objection or words}."
            raise MediaError("media.waiting", message, remedy="It goes on by itself; see `lightship-agent status`.")
        if not taken and spent > _TAKEN:
            return "untaken"
        time.sleep(_LOOK)
    after = read_state(state_dir)
    if after.current is not None and after.current.sha256 == wanted.sha256:
        return "applied"
    raise _refusal(wanted, before, after, taken=taken)


def _refusal(wanted: Assignment, before: UpdateState, after: UpdateState, *, taken: bool) -> LightshipError:
    """Why the agent has not applied it, as far as its state tells."""
    penalty = after.penalties.get(wanted.sha256, Penalty())
    code = after.last_code if taken or after.last_code != before.last_code else ""
    if penalty.until > time.time() and not code:
        code = "update.penalty"
    message = f"{wanted.model}@{wanted.version} was not applied ({code or 'the agent refused it'})."
    remedy = "What served before serves on; the agent's log says more."
    return error_of(code or "update.interrupted", message, remedy=remedy)


def read_state(state_dir: Path) -> UpdateState:
    """The agent's state as it is on disk now; a first one where there is none, or none that can be read."""
    try:
        return msgspec.json.decode((state_dir / "update.json").read_bytes(), type=UpdateState)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return UpdateState()


def _check_user(state_dir: Path) -> None:
    """Whoever else writes here, were it root, leaves files that the agent can't read."""
    try:
        owner = state_dir.stat().st_uid
    except OSError:  # then there is no identity either, and that says more
        return
    if owner == os.geteuid():
        return
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = str(owner)
    remedy = f"Run it as that user: `runuser -u {name} -- lightship-agent import FILE`."
    raise StorageError("storage.unwritable", f"{state_dir} belongs to {name}.", remedy=remedy)
