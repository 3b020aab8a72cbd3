"""Rows leave a device only within bounds, without what was to be taken out, and never unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightship_agent.contract.codes import SettingsError, StorageError
from lightship_agent.contract.messages import AnyRecord, Heartbeat, LabelledRows
from lightship_agent.monitor import sharing
from lightship_agent.monitor.redaction import parse_redaction
from lightship_agent.monitor.sharing import DAY_MS, FILE, SALT, Sharing

NAMES = ("age", "plate", "speed")
ROW = (41.26, 7.0, 3.14159)


def rows(count: int = 1, row: tuple[float | None, ...] = ROW, digest: str = "a" * 64) -> LabelledRows:
    return LabelledRows(s=1, t=1, model="pump", digest=digest, schema="b" * 64, x=(row,) * count, y=("worn",) * count)


def gate(folder: Path, redact: str = "", *, most: int = 1_000, size: int = 1_000_000) -> Sharing:
    known = {"a" * 64: NAMES}
    return Sharing(folder, parse_redaction(redact), rows=most, size=size, names=known.get)


def shared(gate: Sharing, record: LabelledRows, now: int = DAY_MS) -> list[tuple[float | None, ...]]:
    return [x for r in gate.through([record], now) if isinstance(r, LabelledRows) for x in r.x]


def test_fields_are_dropped_rounded_and_hashed_and_the_log_says_that_rows_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = gate(tmp_path, "age=drop, speed=round:1, plate=hash")

    ((age, plate, speed),) = shared(made, rows())

    assert (age, speed) == (None, 3.1)
    assert plate not in (None, 7.0)
    assert "1 rows of pump leave this device; redacted: age drop, speed round, plate hash" in caplog.text
    assert (tmp_path / SALT).stat().st_mode & 0o777 == 0o600


def test_a_hash_is_alike_for_what_is_alike_on_this_device_and_comparable_with_no_other(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = shared(gate(tmp_path / "one", "plate=hash,age=hash"), rows(2, (7.0, 7.0, 1.0)))
    again = shared(gate(tmp_path / "one", "plate=hash,age=hash"), rows(1, (7.0, 7.0, 1.0)))
    other = shared(gate(tmp_path / "two", "plate=hash,age=hash"), rows(1, (7.0, 7.0, 1.0)))

    assert first[0] == first[1] == again[0]
    assert first[0][0] != first[0][1]  # a field's hash says nothing about another field
    assert first[0][:2] != other[0][:2]


def test_a_day_has_so_many_rows_also_after_a_restart_and_a_clock_set_back(tmp_path: Path) -> None:
    assert len(shared(gate(tmp_path, most=5), rows(3))) == 3
    assert len(shared(gate(tmp_path, most=5), rows(3))) == 2
    assert shared(gate(tmp_path, most=5), rows(1)) == []
    assert shared(gate(tmp_path, most=5), rows(1), now=0) == []
    assert len(shared(gate(tmp_path, most=5), rows(9), now=2 * DAY_MS)) == 5


def test_a_day_has_so_many_bytes(tmp_path: Path) -> None:
    made = gate(tmp_path, size=400)

    passed = sum(len(shared(made, rows(8))) for _ in range(20))

    assert 0 < passed < 20
    assert 0 < made.today.bytes <= 400


def test_it_says_how_many_rows_may_still_leave_today(tmp_path: Path) -> None:
    made = gate(tmp_path, most=5)
    assert made.left(DAY_MS) == 5
    shared(made, rows(3))
    assert (made.left(DAY_MS), gate(tmp_path, most=5).left(DAY_MS)) == (2, 2)
    shared(made, rows(3))
    assert (made.left(DAY_MS), made.left(0), made.left(2 * DAY_MS)) == (0, 0, 5)


def test_where_the_bytes_of_a_day_are_used_up_no_row_is_left(tmp_path: Path) -> None:
    made = gate(tmp_path, size=100)
    for _ in range(20):
        shared(made, rows(8))
    assert made.today.rows < 1_000
    assert (made.left(DAY_MS), made.left(2 * DAY_MS)) == (0, 1_000)


def test_what_can_not_be_redacted_or_counted_stays_and_other_reports_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat: AnyRecord = Heartbeat(s=1, t=1)
    assert gate(tmp_path, "age=drop").through([beat, rows(digest="f" * 64)], DAY_MS) == [beat]

    def full(*_: object, **__: object) -> None:
        raise StorageError("storage.full", "no space")

    monkeypatch.setattr(sharing, "write_durably", full)
    assert gate(tmp_path).through([beat, rows()], DAY_MS) == [beat]
    assert gate(tmp_path, "plate=hash").through([rows(), beat], DAY_MS) == [beat]
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("text", ["age", "age=", "=drop", "age=mask", "age=round", "age=round:x", "age=round:10",
                                  "age=drop:1", "age=drop,age=hash"])  # fmt: skip
def test_a_redaction_that_says_nothing_clear_is_refused(text: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_redaction(text)
    assert refused.value.code == "settings.invalid"
