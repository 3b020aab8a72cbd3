"""The device's notion of now: never frozen in the past, never locked in the future."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.update.clock import BUILT, FILE, STEP, STEP_EVERY, DeviceClock, date_of, raised, synchronised

DAY = 86_400.0
TRUE = BUILT + 100 * DAY
times = st.floats(-1e11, 2e11)


@dataclass
class World:
    """A device whose clocks are told what to say."""

    folder: Path
    wall: float
    monotonic: float = 1_000.0
    kept: bool = False

    def boot(self) -> DeviceClock:
        self.monotonic = 5.0
        return DeviceClock(
            self.folder, wall=lambda: self.wall, monotonic=lambda: self.monotonic, kept=lambda: self.kept
        )

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


@given(times, st.floats(allow_nan=True, allow_infinity=True), times, st.booleans())
def test_a_floor_never_sinks_and_is_never_pulled_far_ahead(floor: float, at: float, system: float, step: bool) -> None:
    after = raised(floor, at, system=system, may_step=step)
    assert after >= floor
    assert after <= max(floor, system + STEP, floor + STEP)
    if not step:
        assert after <= max(floor, system)
    if not math.isfinite(at) or at <= floor:
        assert after == floor


@given(times, times, times)
def test_what_the_system_clock_has_reached_is_believed_to_the_second(floor: float, at: float, system: float) -> None:
    if at <= system:
        assert raised(floor, at, system=system, may_step=False) == max(floor, at)


def test_a_board_that_wakes_in_1970_lives_in_the_time_it_was_built(tmp_path: Path) -> None:
    world = World(tmp_path, wall=0.0)
    clock = world.boot()
    assert clock.now() == BUILT
    world.passes(60.0)
    assert clock.now() == BUILT + 60


def test_a_good_clock_is_simply_believed(tmp_path: Path) -> None:
    world = World(tmp_path, wall=TRUE)
    clock = world.boot()
    assert clock.now() == TRUE
    world.wall += 7 * DAY
    assert clock.now() == TRUE + 7 * DAY


def test_an_authenticated_time_outlives_a_power_cut_and_a_clock_set_back(tmp_path: Path) -> None:
    world = World(tmp_path, wall=TRUE)
    world.boot().authenticated(TRUE)

    world.wall = 0.0

    assert world.boot().now() == TRUE


def test_a_system_clock_that_jumped_to_2099_is_forgotten_once_it_is_set_right(tmp_path: Path) -> None:
    world = World(tmp_path, wall=TRUE + 73 * 365 * DAY)
    clock = world.boot()
    assert clock.now() == world.wall
    clock.authenticated(TRUE)

    world.wall = TRUE

    assert clock.now() == TRUE
    assert world.boot().now() == TRUE


def test_a_server_whose_clock_ran_away_for_an_hour_costs_a_day(tmp_path: Path) -> None:
    world = World(tmp_path, wall=TRUE)
    clock = world.boot()
    for _ in range(4):
        clock.authenticated(TRUE + 73 * 365 * DAY)
        world.passes(STEP_EVERY / 4)
    assert clock.now() <= TRUE + DAY + STEP_EVERY
    assert world.boot().now() <= TRUE + DAY + STEP_EVERY


def test_a_board_that_slept_for_a_month_catches_up_step_by_step(tmp_path: Path) -> None:
    world = World(tmp_path, wall=TRUE)
    world.boot().authenticated(TRUE)
    world.wall, now = 0.0, TRUE + 30 * DAY
    clock = world.boot()
    looks = 0
    while clock.now() < now:
        clock.authenticated(now)
        world.passes(900.0)
        now, looks = now + 900.0, looks + 1
        if clock.now() >= now - 900.0:
            break
    assert looks * 900.0 < 1.5 * DAY


@pytest.mark.parametrize("at", [math.nan, math.inf, -math.inf, -1.0, 0.0])
def test_a_time_that_is_none_changes_nothing(tmp_path: Path, at: float) -> None:
    world = World(tmp_path, wall=0.0)
    clock = world.boot()
    clock.authenticated(at)
    assert clock.now() == BUILT
    assert list(tmp_path.iterdir()) == []


def test_the_flash_sees_a_write_only_now_and_then(tmp_path: Path) -> None:
    world = World(tmp_path, wall=TRUE)
    clock = world.boot()
    written = set()
    for _ in range(60):
        clock.authenticated(world.wall)
        written.add((tmp_path / FILE).read_bytes())
        world.passes(60.0)
    assert len(written) == 6


@pytest.mark.parametrize("damage", [b"", b"soon", b"nan", b"inf", b"-5", b"1e300", b"\xff", b"9" * 400])
def test_a_stored_time_that_is_none_counts_as_absent(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / FILE).write_bytes(damage)
    assert World(tmp_path, wall=TRUE).boot().now() == TRUE


def test_a_disk_that_takes_nothing_is_no_reason_to_stop(tmp_path: Path) -> None:
    clock = World(tmp_path / "absent", wall=0.0).boot()
    clock.authenticated(BUILT + 5)
    assert clock.now() == BUILT + 5


@given(st.integers(0, 250_000_000_000))
def test_a_date_header_is_read_to_the_second(at: int) -> None:
    assert date_of(format_datetime(datetime.fromtimestamp(at, UTC), usegmt=True)) == at


@given(st.text(max_size=40))
def test_a_date_header_that_is_none_is_no_time(header: str) -> None:
    assert isinstance(date_of(header), float)


@pytest.mark.parametrize(
    "header", ["", "soon", "0", "Tue, 31 Feb 2026 00:00:00 GMT", "Tue, 01 Jan 99999999999 0:0:0 GMT"]
)
def test_a_header_that_holds_no_date_changes_nothing(tmp_path: Path, header: str) -> None:
    clock = World(tmp_path, wall=0.0).boot()
    clock.authenticated(date_of(header))
    assert clock.now() == BUILT


def test_this_code_was_not_built_in_the_future() -> None:
    assert time.time() > BUILT


def test_a_time_is_worth_nothing_behind_what_was_authenticated_and_most_when_a_time_server_keeps_it(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, TRUE)
    clock = world.boot()
    clock.authenticated(TRUE)
    assert clock.quality == 1
    world.kept = True
    assert clock.quality == 2
    world.wall = TRUE - DAY
    assert clock.quality == 0, "whatever the kernel says"


def test_the_kernel_can_be_asked_whether_its_clock_is_kept() -> None:
    assert synchronised() in (True, False)
    before = time.time()
    synchronised()
    assert abs(time.time() - before) < 5, "asking changes nothing"
