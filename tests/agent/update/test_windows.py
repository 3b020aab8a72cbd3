"""Maintenance windows: what people write, and what a brute-force look at every minute says of it."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightship_agent.contract.codes import SettingsError
from lightship_agent.settings import load_settings
from lightship_agent.update.windows import DAYS, Windows, is_open, next_opening, parse_windows

MONDAY = datetime(2026, 11, 23)  # noqa: DTZ001 - a wall clock on site has no zone
MINUTE = timedelta(minutes=1)


def at(text: str) -> datetime:
    """`Wed 14:30` in the week of MONDAY."""
    day, clock = text.split()
    return MONDAY + timedelta(days=DAYS.index(day.lower()), hours=int(clock[:2]), minutes=int(clock[3:]))


clocks = st.integers(0, 1439)
moments = st.integers(0, 10 * 365 * 1440 * 60).map(lambda s: MONDAY + timedelta(seconds=s))


@st.composite
def items(draw: st.DrawFn) -> tuple[str, frozenset[int], int, int]:
    """An item as written, its days, and its first and last minute."""
    start, end = draw(clocks), draw(st.integers(0, 1440))
    if start == end:
        end = (end + 1) % 1440
    hours = f"{start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
    first, last = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    match draw(st.sampled_from(["every", "one", "range", "list"])):
        case "one":
            return f"{DAYS[first]} {hours}", frozenset({first}), start, end
        case "range":
            days = {(first + i) % 7 for i in range((last - first) % 7 + 1)}
            return f"{DAYS[first].title()}-{DAYS[last].upper()} {hours}", frozenset(days), start, end
        case "list":
            return f"{DAYS[first]},{DAYS[last]} {hours}", frozenset({first, last}), start, end
        case _:
            return hours, frozenset(range(7)), start, end


plans = st.lists(items(), min_size=1, max_size=4)


@given(plans, moments)
def test_a_window_is_open_in_just_the_minutes_that_were_written_down(
    plan: list[tuple[str, frozenset[int], int, int]], moment: datetime
) -> None:
    windows = parse_windows(", ".join(text for text, *_ in plan))
    minute, today, yesterday = moment.hour * 60 + moment.minute, moment.weekday(), (moment.weekday() - 1) % 7

    expected = any(
        (today in days and start <= minute < end)
        if start < end
        else (today in days and minute >= start) or (yesterday in days and minute < end)
        for _, days, start, end in plan
    )

    assert is_open(windows, moment) == expected


@given(plans, moments)
@example([("sun 23:00-01:00", frozenset({6}), 1380, 60)], MONDAY + timedelta(hours=1))
def test_the_next_opening_is_the_first_open_moment_from_now_on(
    plan: list[tuple[str, frozenset[int], int, int]], moment: datetime
) -> None:
    windows = parse_windows(", ".join(text for text, *_ in plan))

    opens = next_opening(windows, moment)

    assert is_open(windows, opens)
    if is_open(windows, moment):
        assert opens == moment
        return
    assert moment < opens <= moment + timedelta(days=7)
    assert (opens.second, opens.microsecond) == (0, 0)
    step = moment.replace(second=0, microsecond=0)
    while step < opens:
        assert not is_open(windows, step)
        step += max(MINUTE, min(timedelta(minutes=7), opens - step - MINUTE))


@given(st.text(max_size=40) | st.text("MonTueWdhFriSat 0123456789:-,", max_size=30))
def test_any_other_text_is_either_windows_or_an_error_that_names_the_form(text: str) -> None:
    found: Windows = ()
    error: SettingsError | None = None
    try:
        found = parse_windows(text, "download_window")
    except SettingsError as e:
        error = e

    if error is None:
        assert bool(found) == bool(text.strip())
    else:
        assert error.code == "settings.invalid"
        assert error.message.startswith("download_window: expected windows such as '22:00-06:00'")


@pytest.mark.parametrize(
    ("text", "open_at", "closed_at"),
    [
        ("22:00-06:00", ["mon 22:00", "tue 05:59", "mon 00:00"], ["mon 06:00", "mon 21:59"]),
        ("Fri 22:00-06:00", ["fri 23:00", "sat 05:59"], ["fri 05:00", "sat 22:00"]),
        ("Sun 22:00-06:00", ["sun 22:00", "mon 05:59"], ["mon 06:00", "sun 05:00"]),
        (
            "Mon-Fri 01:00-04:00, Sat,Sun 00:00-24:00",
            ["mon 01:00", "fri 03:59", "sat 00:00", "sun 23:59"],
            ["mon 00:59", "fri 04:00"],
        ),
        ("Sat-Mon 10:00-11:00", ["sat 10:00", "sun 10:30", "mon 10:59"], ["tue 10:00", "fri 10:00"]),
        ("", ["mon 00:00", "sun 23:59"], []),
    ],
)
def test_windows_as_people_write_them(text: str, open_at: list[str], closed_at: list[str]) -> None:
    windows = parse_windows(text)

    assert all(is_open(windows, at(moment)) for moment in open_at)
    assert not any(is_open(windows, at(moment)) for moment in closed_at)


def test_the_next_opening_may_be_next_week() -> None:
    windows = parse_windows("Mon 01:00-04:00")

    assert next_opening(windows, at("mon 04:00")) == at("mon 01:00") + timedelta(days=7)
    assert next_opening(windows, at("mon 02:30")) == at("mon 02:30")
    assert next_opening((), at("tue 02:30")) == at("tue 02:30")


@pytest.mark.parametrize(
    "text",
    ["always", "22-06", "25:00-26:00", "12:60-13:00", "24:00-06:00", "06:00-06:00", "Mon", "Mon-Fri", "Foo 01:00-02:00",
     "Mon-Foo 01:00-02:00", "01:00-02:00,", ",01:00-02:00", "01:00-02:00 Mon", "1:00-2:00", "٠١:00-02:00",
     "Mon 01:00-02:00, Sat", "22:00-06:00; rm -rf /"],
)  # fmt: skip
def test_bad_text_is_refused_when_the_settings_are_read(text: str) -> None:
    for name in ("download_window", "install_window"):
        with pytest.raises(SettingsError, match=f"LIGHTSHIP_AGENT_{name.upper()}: expected windows such as") as caught:
            load_settings({f"LIGHTSHIP_AGENT_{name.upper()}": text})
        assert caught.value.code == "settings.invalid"
