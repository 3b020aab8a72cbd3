"""Contract: telemetry envelopes and the records in them; commands to a device.

Rules:
* one publish carries one envelope with 1..N records; (device, epoch, record seq) identifies a record for ever,
  and ingest is idempotent by that key;
* the epoch is random and new whenever the device's outbox is created or lost; seq counts from 1 within it;
* counts are additive: a window is closed once, labels that arrive later come as `Labels` for that window, and the
  products of its features as `Together`, with those of its neighbours: they are too many for every window;
* times are wall-clock milliseconds with a clock quality; order comes from seq, never from wall time;
* agreement with a challenger is counted since the last report of it, and adds up;
* raw rows leave the device only as `LabelledRows`, which is off by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Literal

import msgspec

from .app_metrics import MAX_METRICS, AppNumbers, check_finite
from .codes import WireError
from .experiment import DIFFERENCE_EDGES, LATENCY_EDGES, MAX_CONFUSED
from .latency import CELLS
from .moments import Moments, Products, Sums
from .profile import WindowCounts
from .quality import Quality
from .vectors import LONGEST, Vector, check

MAX_RECORDS: Final = 500
#: Steps of what runs beside the model that serves begin with it.
BESIDE_STEPS: Final = "beside-"
#: Most spans of missing records that are asked for at a time.
MAX_RANGES: Final = 64
#: Most codes of errors that are told apart in a report.
MAX_CODES: Final = 64

#: Most bytes of a reply's body, before it is packed.
MAX_REPLY: Final = 1_000_000
#: Most commands in the answer to a poll.
MAX_ASKED: Final = 8
#: Verbs that are answered.
ASKABLE: Final = ("rebirth", "loglevel", "snapshot")
#: The longest time that one may be valid for.
MAX_ASK_SECONDS: Final = 86_400

MAX_COUNT: Final = 2**53
#: Sums are no further from 0.
MAX_SUM: Final = 2**54
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Counts = Annotated[tuple[Count, ...], msgspec.Meta(max_length=120_000)]
#: A packed `contract.vectors.Vector`; or the numbers one by one, which takes more room.
PackedCounts = Annotated[bytes, msgspec.Meta(max_length=LONGEST)] | Counts
PackedSums = Annotated[bytes, msgspec.Meta(max_length=LONGEST)] | Sums
Name = Annotated[str, msgspec.Meta(max_length=64)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, msgspec.Meta(max_length=2_000)]
Errors = Annotated[dict[Name, Count], msgspec.Meta(max_length=MAX_CODES)]  # by code


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="k"):
    """What every record has: `s` sequence in the epoch, `t` wall ms, `q` clock quality (0 none, 1 RTC, 2 NTP)."""

    s: Annotated[int, msgspec.Meta(ge=1)]
    t: Count
    q: Literal[0, 1, 2] = 1


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is being served, by digest; requests, latency and errors since it began to serve."""

    model: Name
    version: int
    digest: Digest
    since: Count  # wall ms
    requests: Count = 0  # rows predicted
    failures: Count = 0  # requests answered with a server error
    latency_ms: float = 0.0  # p95 of recent requests
    provider: Name = ""  # what computes it: cpu, xnnpack, cuda …
    latencies: Annotated[tuple[Count, ...], msgspec.Meta(max_length=CELLS)] = ()  # of its requests; contract.latency
    busy_us: Count = 0  # spent in them, µs
    errors: Errors = {}  # requests refused or failed


class Heartbeat(Record, frozen=True, kw_only=True, tag="heartbeat"):
    """What the device runs and how it is."""

    running: tuple[Running, ...] = ()
    update_state: Name = "idle"
    assignment_seq: Count = 0
    agent: Name = ""
    onnxruntime: Name = ""
    machine: Name = ""  # CPU architecture
    health: dict[Name, float] = {}
    degraded: tuple[Name, ...] = ()  # codes of what keeps it from doing all its work
    errors: Errors = {}  # requests refused or failed since the agent began, of all models and of none


class PackedMoments(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """`Moments`, packed."""

    rows: int
    pairs: int
    sums: PackedSums
    squares: PackedSums
    lags: PackedSums

    def __post_init__(self) -> None:
        """The bytes are vectors.

        Raises:
            WireError: wire.malformed.
        """
        _check((self.sums, self.squares, self.lags), -MAX_SUM)

    @classmethod
    def of(cls, moments: Moments | None) -> PackedMoments | None:
        """These moments, packed."""
        if moments is None:
            return None
        return cls(
            rows=moments.rows,
            pairs=moments.pairs,
            sums=packed(moments.sums),
            squares=packed(moments.squares),
            lags=packed(moments.lags),
        )

    def moments(self) -> Moments:
        """What was packed."""
        return Moments(
            rows=self.rows,
            pairs=self.pairs,
            sums=numbers(self.sums),
            squares=numbers(self.squares),
            lags=numbers(self.lags),
        )


def numbers(part: bytes | Sequence[int]) -> Sequence[int]:
    """The numbers of a packed part."""
    return Vector(part) if isinstance(part, bytes) else part


def packed(part: Sequence[int]) -> bytes | tuple[int, ...]:
    """Numbers, packed; none stay none.

    Raises:
        DataError: data.profile-mismatch for numbers too large to be packed.
    """
    if not part:
        return ()
    return part.packed if isinstance(part, Vector) else Vector(part).packed


def _check(parts: Iterable[bytes | Sequence[int]], least: int) -> None:
    for part in parts:
        if isinstance(part, bytes):
            check(part, least, MAX_COUNT if least == 0 else MAX_SUM)


class Window(Record, frozen=True, kw_only=True, tag="window", omit_defaults=True):
    """Counts of one closed window of one stream (bundle digest, schema digest).

    The vectors are laid out as the profile's parts of the same name, and absent where the profile has none.
    """

    model: Name
    version: int
    digest: Digest
    schema: Digest
    w: Count  # window number within the stream, from 0
    opened: Count  # wall ms
    rows: Count
    counts: PackedCounts
    predictions: PackedCounts = ()
    scores: PackedCounts = ()
    invalid: Count = 0  # rows refused by the schema
    distances: PackedCounts = ()  # D²
    values: PackedCounts = ()  # a regressor's predictions
    moments: PackedMoments | None = None
    quality: Quality = ()

    def __post_init__(self) -> None:
        """The bytes are vectors of counts.

        Raises:
            WireError: wire.malformed.
        """
        _check((self.counts, self.predictions, self.scores, self.distances, self.values), 0)

    def content(self) -> WindowCounts:
        """The counts alone, which merge."""
        return WindowCounts(
            rows=self.rows,
            counts=numbers(self.counts),
            predictions=numbers(self.predictions),
            scores=numbers(self.scores),
            invalid=self.invalid,
            distances=numbers(self.distances),
            values=numbers(self.values),
            moments=None if self.moments is None else self.moments.moments(),
            quality=self.quality,
        )


class Together(Record, frozen=True, kw_only=True, tag="together"):
    """Products of features over the windows `first` to `w` of a stream, both included."""

    model: Name
    digest: Digest
    schema: Digest
    first: Count
    w: Count
    products: Products


class Labels(Record, frozen=True, kw_only=True, tag="labels", omit_defaults=True):
    """Late labels, counted for the window in which the prediction was made.

    Of a regressor, `errors` are residuals beyond the bound of the profile.
    """

    model: Name
    digest: Digest
    schema: Digest
    w: Count
    labelled: Count
    errors: Count
    residuals: Counts = ()  # of a regressor: cells of the profile's residual bins
    residual_sums: Sums = ()  # of their steps: Σ, Σ²


class Fault(Record, frozen=True, kw_only=True, tag="fault", omit_defaults=True):
    """A hard data-quality fault that the device found by itself: said once when it begins, once when it is over."""

    model: Name
    digest: Digest
    schema: Digest
    w: Count  # the window that showed it
    kind: Name  # stuck | unit | swapped | missing | range | category
    feature: Name
    raised: bool  # False: it is over
    rate: float = 0.0  # share of the window's rows that show it


class Update(Record, frozen=True, kw_only=True, tag="update"):
    """A step of the update state machine: where it is now, and the error stack if it failed."""

    rollout: Name
    seq: Count
    digest: Digest
    state: Name
    code: Name = ""
    detail: Text = ""


class Agreement(Record, frozen=True, kw_only=True, tag="agreement"):
    """How far a challenger in the shadow has agreed with the champion, since the last record of the two.

    `differences` counts how far apart their highest scores were in rows for which both took the same class, or how far
    apart their numbers were as parts of the larger one; `latency` the milliseconds that a row took the challenger.
    """

    experiment: Name
    model: Name
    version: int  # the challenger's
    digest: Digest  # the challenger's
    champion: Digest
    opened: Count  # wall ms
    rows: Count  # that both answered
    same: Count  # of them, with the same class, or nearly the same number
    confusion: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_CONFUSED**2)] = ()  # champion's class by row
    differences: Annotated[tuple[Count, ...], msgspec.Meta(max_length=len(DIFFERENCE_EDGES) + 1)] = ()
    difference_sum: Annotated[float, msgspec.Meta(ge=0, le=1e15)] = 0.0
    difference_max: Annotated[float, msgspec.Meta(ge=0, le=1e15)] = 0.0
    latency: Annotated[tuple[Count, ...], msgspec.Meta(max_length=len(LATENCY_EDGES) + 1)] = ()
    failures: Count = 0  # rows that the challenger refused or failed at
    dropped: Count = 0  # rows that found its queue full

    def __post_init__(self) -> None:
        """Counts fit each other.

        Raises:
            WireError: wire.malformed.
        """
        classes = math.isqrt(len(self.confusion))
        agreed = sum(self.confusion[:: classes + 1])
        sizes = (
            classes**2 == len(self.confusion)
            and len(self.differences) in (0, len(DIFFERENCE_EDGES) + 1)
            and len(self.latency) in (0, len(LATENCY_EDGES) + 1)
        )
        counts = self.same <= self.rows and sum(self.differences) <= self.rows
        confused = not self.confusion or (sum(self.confusion), agreed) == (self.rows, self.same)
        finite = math.isfinite(self.difference_sum) and math.isfinite(self.difference_max)
        if not (sizes and counts and confused and finite):
            raise WireError("wire.malformed", "Agreement: the counts contradict each other.")


class Application(Record, frozen=True, kw_only=True, tag="app"):
    """The application's own numbers, all of them, since the agent began; sent when something was told."""

    since: Count  # wall ms
    numbers: AppNumbers

    def __post_init__(self) -> None:
        """Every number is one.

        Raises:
            WireError: wire.malformed.
        """
        if len(self.numbers) > MAX_METRICS or not check_finite(self.numbers):
            raise WireError("wire.malformed", "Application: a name or a number can't be stored.")


class LabelledRows(Record, frozen=True, kw_only=True, tag="rows"):
    """Rows with labels, shared only where the operator has switched it on."""

    model: Name
    digest: Digest
    schema: Digest
    x: Annotated[tuple[tuple[float | None, ...], ...], msgspec.Meta(max_length=MAX_RECORDS)]
    y: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_RECORDS)]


AnyRecord = Heartbeat | Window | Together | Labels | Fault | Update | Agreement | Application | LabelledRows


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """One publish: `e` epoch, `b` boot counter, `us` uptime in ms when sent, `r` records.

    `lo` is the oldest sequence number the device still holds: what is below it and was never stored is lost,
    and the server may stop waiting for it.
    """

    e: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    b: Count
    us: Count
    lo: Count
    r: Annotated[tuple[AnyRecord, ...], msgspec.Meta(min_length=1, max_length=MAX_RECORDS)]
    v: Literal[1] = 1


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The retained birth message and the last will: the same `n` pairs them."""

    on: bool
    n: Count  # boot counter
    agent: Name = ""


class Command(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A command: `check` looks for an assignment now, `resend` sends records of epoch `e` again.

    Which ones say `ranges`, (first, last), both included; without them, all from `first` on. `rebirth`, `loglevel` and
    `snapshot` are answered with a `Reply` of the same id.
    """

    id: Name
    expires: Count  # Unix seconds
    e: str = ""
    first: Count = 0
    ranges: Annotated[tuple[tuple[Count, Count], ...], msgspec.Meta(max_length=MAX_RANGES)] = ()
    level: Name = ""  # of loglevel
    seconds: Count = 0  # of loglevel: for how long


class Asking(msgspec.Struct, frozen=True, kw_only=True):
    """Commands that wait for a device, in the answer to its poll: for sites where MQTT is blocked."""

    asked: Annotated[tuple[tuple[Name, Command], ...], msgspec.Meta(max_length=MAX_ASKED)] = ()


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a command: `body` is JSON; or why not, as code and words."""

    id: Name
    verb: Name
    at: Count  # wall ms
    code: Name = ""
    detail: Text = ""
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_REPLY)] = b""
