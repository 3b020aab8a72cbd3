"""Update: maintenance windows, when something may be done.

    22:00-06:00                                    every night; the part after midnight belongs to the evening before
    Mon-Fri 01:00-04:00, Sat,Sun 00:00-24:00       days, and lists of days, before the hours
    (nothing)                                      always

Rules:
* pure: the local wall-clock time is passed in, without a zone, as somebody on site reads it;
* a window holds its first minute and not its last;
* an hour that a change to summer time leaves out is not there that day, and one that comes twice is open twice.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from lightship_agent.contract.codes import SettingsError

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY: Final = 24 * 60  # minutes
_WEEK: Final = 7 * _DAY
_ITEM: Final = re.compile(
    r"(?:(?P<first>[a-z]{3})(?:\s*-\s*(?P<last>[a-z]{3}))?)?\s*"
    r"(?:(?P<start>\d\d:\d\d)\s*-\s*(?P<end>\d\d:\d\d))?",
    re.ASCII,
)
_FORM: Final = "expected windows such as '22:00-06:00' or 'Mon-Fri 01:00-04:00, Sat,Sun 00:00-24:00'"


class Window(NamedTuple):
    """From the minute `start` of the week, Monday 00:00 being 0, until the minute `end`, which may lie in the next."""

    start: int
    end: int


#: Sorted by their start. None at all means always.
Windows = tuple[Window, ...]


def parse_windows(text: str, name: str = "window") -> Windows:
    """The windows in `text`; `name` is the setting that errors name.

    Raises:
        SettingsError: settings.invalid.
    """
    windows: set[Window] = set()
    days: list[int] = []
    for item in text.split(",") if text.strip() else ():
        match = _ITEM.fullmatch(item.strip().lower())
        if match is None or not match[0]:
            raise _invalid(name, text, f"{item.strip()!r} is neither days nor hours")
        if match["first"]:
            days += _days(name, text, match["first"], match["last"] or match["first"])
        if match["start"]:
            start, end = (_minute(name, text, match[group]) for group in ("start", "end"))
            windows |= {_window(name, text, day, start, end) for day in days or range(7)}
            days = []
    if days:
        raise _invalid(name, text, "hours are missing after the last day")
    return tuple(sorted(windows))


def is_open(windows: Windows, local: datetime) -> bool:
    """Whether `local` is inside one of them."""
    minute = _minute_of_week(local)
    return not windows or any(w.start <= minute < w.end or w.start <= minute + _WEEK < w.end for w in windows)


def next_opening(windows: Windows, local: datetime) -> datetime:
    """The first moment from `local` on that is inside one of them: `local` itself, or the start of a window."""
    if is_open(windows, local):
        return local
    minute = _minute_of_week(local)
    ahead = min((w.start - minute) % _WEEK for w in windows)
    return local.replace(second=0, microsecond=0) + timedelta(minutes=ahead)


def _minute_of_week(local: datetime) -> int:
    return local.weekday() * _DAY + local.hour * 60 + local.minute


def _days(name: str, text: str, first: str, last: str) -> list[int]:
    if first not in DAYS or last not in DAYS:
        raise _invalid(name, text, f"{first if first not in DAYS else last!r} is not a day")
    start, end = DAYS.index(first), DAYS.index(last)
    return [day % 7 for day in range(start, (end if end >= start else end + 7) + 1)]


def _minute(name: str, text: str, clock: str) -> int:
    hours, minutes = int(clock[:2]), int(clock[3:])
    if minutes > 59 or hours * 60 + minutes > _DAY:
        raise _invalid(name, text, f"{clock!r} is not a time of day")
    return hours * 60 + minutes


def _window(name: str, text: str, day: int, start: int, end: int) -> Window:
    if start in (_DAY, end):
        raise _invalid(name, text, "a window must begin before it ends; a whole day is 00:00-24:00")
    return Window(day * _DAY + start, day * _DAY + (end if end > start else end + _DAY))


def _invalid(name: str, text: str, why: str) -> SettingsError:
    return SettingsError("settings.invalid", f"{name}: {_FORM}, found {text[:200]!r}: {why}.")
