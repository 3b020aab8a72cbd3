"""Contract: the assignment, what one device shall run.

Rules:
* it travels as a DSSE envelope signed by the `director` key; this module only knows the payload;
* `seq` never goes down for a device: a legitimate rollback is a new assignment of an older bundle;
* it names the bundle by path, sha256 and length, and only a bundle that the release plane lists with the same
  three is accepted: whoever steals the director's key can choose among released models and nothing else;
* what runs beside it, in its shadow or for a share of the keys, stands in the same payload and is held to the same;
  an agent that knows nothing of companions ignores them, and one that does leaves alone a mode it does not know.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from .codes import TrustError
from .wire import canonical_json

PAYLOAD_TYPE: Final = "application/vnd.lightship.assignment+json"
#: The role in the top-level targets metadata whose key signs assignments.
DIRECTOR: Final = "director"
MAX_ENVELOPE: Final = 16 * 1024  # bytes
MAX_BESIDE: Final = 4
MODES: Final = ("shadow", "ab")


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle that runs beside the one that serves: a companion.

    In the mode `shadow` it is asked what the champion was asked, for a `share` of the rows, and nobody hears its
    answers. In the mode `ab` it answers the `share` of the keys that fall to it; requests without a key are the
    champion's, unless `per_request`.
    """

    experiment: Annotated[str, msgspec.Meta(pattern="^[0-9a-z-]{1,32}$")]
    model: str
    version: int
    path: str
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    length: Annotated[int, msgspec.Meta(ge=1)]
    mode: str = "shadow"  # one of MODES; a device refuses the companion, and not the assignment, for another
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    per_request: bool = False  # whether requests without a key are dealt out too, each for itself


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """The signed payload. Times are Unix seconds, UTC."""

    device: str
    seq: int
    issued: int
    expires: int
    model: str
    version: int
    path: str  # the TUF target of the uncompressed bundle
    sha256: str
    length: int
    mode: Literal["serve"] = "serve"
    rollout: str = ""
    retry: bool = False  # whether the device shall forget that this bundle failed there
    beside: Annotated[tuple[Beside, ...], msgspec.Meta(max_length=MAX_BESIDE)] = ()


def assignment_bytes(assignment: Assignment) -> bytes:
    """Canonical JSON, what is signed."""
    return canonical_json(assignment)


def parse_assignment(payload: bytes) -> Assignment:
    """The assignment in a verified payload.

    Raises:
        TrustError: trust.metadata.
    """
    try:
        return msgspec.json.decode(payload, type=Assignment)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        raise TrustError("trust.metadata", f"The assignment is malformed: {e}.") from e


def check_assignment(assignment: Assignment, *, device: str, floor: int, now: float) -> None:
    """Refuse what is not for this device, older than `floor`, or past its time.

    Args:
        assignment: the verified payload.
        device: this device's id.
        floor: the highest `seq` accepted so far.
        now: Unix seconds, never before the latest time this device has seen.

    Raises:
        TrustError: trust.foreign, trust.rollback, trust.expired.
    """
    if assignment.device != device:
        raise TrustError("trust.foreign", f"Assignment for {assignment.device!r} reached {device!r}.")
    if assignment.seq < floor:
        raise TrustError("trust.rollback", f"Assignment seq {assignment.seq} is below the accepted {floor}.")
    if assignment.expires <= now:
        raise TrustError("trust.expired", f"Assignment seq {assignment.seq} expired at {assignment.expires}.")
