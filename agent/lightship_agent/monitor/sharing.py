"""Monitor: the gate that labelled rows leave by, where an operator has opened it.

    share_redact = "name=drop, age=round:1, plate=hash"

Rules:
* closed by default; what passes is bounded in rows and in bytes a day, over a restart and a clock set back too;
* a field is dropped (nothing is left of it), hashed (with this device's own salt: alike stays alike on this device, and
  is comparable with no other), or rounded to so many digits after the point;
* what can't be redacted, because nobody knows any more what its columns are called, does not leave;
* whatever leaves is in the log: how many rows, of which model, what was taken out.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from lightship_agent.contract.codes import StorageError
from lightship_agent.contract.messages import AnyRecord, LabelledRows
from lightship_agent.contract.wire import encode
from lightship_agent.files import write_durably

from .redaction import Rule

log = logging.getLogger(__name__)

FILE: Final = "shared.json"
SALT: Final = "share-salt"
DAY_MS: Final = 86_400_000
#: Of a hash so many bits are kept: whole numbers that a float32 holds exactly.
_HASH_BITS: Final = 24
Row = tuple[float | None, ...]


class _Today(msgspec.Struct):
    day: int = 0
    rows: int = 0
    bytes: int = 0


class Sharing:
    """The gate.

    Args:
        state_dir: where the day's count and the salt are kept.
        rules: by field.
        rows: most a day.
        size: most bytes a day, as they are sent before they are packed.
        names: the names of a bundle's columns by its digest; None where nobody knows.
    """

    def __init__(
        self,
        state_dir: Path,
        rules: Mapping[str, Rule],
        *,
        rows: int,
        size: int,
        names: Callable[[str], Sequence[str] | None],
    ) -> None:
        self._dir = state_dir
        self._rules = rules
        self._rows, self._size = rows, size
        self._names = names
        self._salt = b""
        self._used_up = -1  # the day whose bytes are
        self.today = self._read()

    def through(self, records: Iterable[AnyRecord], now_ms: int) -> list[AnyRecord]:
        """What may leave, of `records`; all that are no rows pass as they are."""
        passed: list[AnyRecord] = []
        for record in records:
            if not isinstance(record, LabelledRows):
                passed.append(record)
            elif (shared := self._share(record, now_ms)) is not None:
                passed.append(shared)
        return passed

    def left(self, now_ms: int) -> int:
        """How many rows may still leave today; none where the day's bytes are used up, as far as that was met."""
        day = max(self.today.day, now_ms // DAY_MS)
        if day == self._used_up:
            return 0
        return max(0, self._rows - self.today.rows) if day == self.today.day else self._rows

    def _share(self, record: LabelledRows, now_ms: int) -> LabelledRows | None:
        names = self._names(record.digest)
        if self._rules and names is None:
            log.warning("sharing: %d rows of %s stay here: nobody knows their columns", len(record.x), record.model)
            return None
        day = max(self.today.day, now_ms // DAY_MS)
        today = self.today if day == self.today.day else _Today(day)
        left = max(0, self._rows - today.rows)
        try:
            x = tuple(self._redacted(row, names or ()) for row in record.x[:left])
        except StorageError as e:  # without a salt nothing may be hashed
            log.warning("sharing: %s: %s", e.code, e)
            return None
        while x and today.bytes + (size := len(encode((x, record.y[: len(x)])))) > self._size:
            x = x[: len(x) // 2]
        if not x:
            self._used_up = day
            log.info("sharing: %d rows of %s stay here: the day's share is used up", len(record.x), record.model)
            return None
        if not self._count(_Today(day, today.rows + len(x), today.bytes + size)):
            return None
        said = ", ".join(f"{field} {rule.how}" for field, rule in self._rules.items()) or "nothing"
        log.warning("sharing: %d rows of %s leave this device; redacted: %s", len(x), record.model, said)
        return msgspec.structs.replace(record, x=x, y=record.y[: len(x)])

    def _redacted(self, row: Row, names: Sequence[str]) -> Row:
        if not self._rules:
            return row
        return tuple(
            value if (rule := self._rules.get(name)) is None or value is None else self._apply(rule, name, value)
            for name, value in zip(names, row, strict=True)
        )

    def _apply(self, rule: Rule, name: str, value: float) -> float | None:
        if rule.how == "drop" or not math.isfinite(value):
            return None
        if rule.how == "round":
            return round(value, rule.digits)
        digest = hashlib.blake2b(struct.pack("<d", value), key=self._key(), digest_size=8)
        digest.update(name.encode())
        return float(int.from_bytes(digest.digest(), "big") >> (64 - _HASH_BITS))

    def _key(self) -> bytes:
        """This device's salt; made when it is first needed, and told to nobody."""
        path = self._dir / SALT
        if not self._salt:
            try:
                self._salt = path.read_bytes()
            except OSError:
                self._salt = b""
            if len(self._salt) != 32:
                made = secrets.token_bytes(32)
                write_durably(path, made, mode=0o600)
                self._salt = made
        return self._salt

    def _count(self, today: _Today) -> bool:
        """Before they leave: a cut in between loses rows, and shares none uncounted."""
        try:
            write_durably(self._dir / FILE, msgspec.json.encode(today))
        except StorageError as e:
            log.warning("sharing: %s: %s", e.code, e)
            return False
        self.today = today
        return True

    def _read(self) -> _Today:
        try:
            return msgspec.json.decode((self._dir / FILE).read_bytes(), type=_Today)
        except (OSError, msgspec.MsgspecError):
            return _Today()
