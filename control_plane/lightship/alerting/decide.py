"""Alerting: the pure decider, who is told what and when.

    finding ──held for group_wait──▶ open ──gone for clear──▶ resolved
       └──gone before──▶ forgotten     ▲  └──back before──▶ still open, nothing is said

Rules:
* no I/O and no clock: `decide(alerts, findings, …)` gives the alerts that changed and the notices;
* a finding belongs to at most one open alert, so that one event is one alert; what is there already is not told again;
* findings of a kind wait for one another: as many as `group_at` become one alert, and later ones join it;
* an alert ends when nothing of it was found for `clear`; each return within `FLAP_WINDOW` doubles that, up to 16 times;
* a finding that is not sure (we could not have heard) keeps open what is open, and opens nothing;
* severity only rises while an alert is open; a rise is told, and takes an acknowledgement away;
* a mute holds back what would be told and forgets nothing: what is still open at its end is told then, and the end of
  what was told is told also while it is muted; an acknowledgement holds back reminders, and nothing else;
* an alert's notices are numbered from 1, begin with `open`, and end with `resolve`.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import msgspec

Severity = Literal["ok", "warning", "critical"]
Event = Literal["open", "worse", "remind", "resolve"]
RANK: Final[dict[str, int]] = {"": -1, "ok": 0, "warning": 1, "critical": 2}
#: An alert that comes back so soon after its end, flaps.
FLAP_WINDOW: Final = 3_600_000
MAX_DOUBLINGS: Final = 4
#: Devices that a sentence names.
NAMED: Final = 5

#: What many findings of a kind are called together, and how severe they are at least.
TOGETHER: Final[dict[str, tuple[str, Severity]]] = {
    "silent": ("devices are silent", "critical"),
    "drift": ("streams drift", "warning"),
    "data": ("faults of data", "warning"),
    "lost": ("devices dropped reports", "warning"),
    "certificate": ("certificates end", "warning"),
    "degraded": ("devices are degraded", "warning"),
    "clone": ("identities are in use twice", "critical"),
    "rollout": ("rollouts are halted", "warning"),
    "ingest": ("ingest workers are dead or stuck", "critical"),
    "metadata": ("roles of the release list are near their end", "warning"),
    "channel": ("alert channels fail", "warning"),
}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is wrong now."""

    key: str  # the same as long as it is the same thing
    kind: str
    severity: Severity
    subject: str  # the device, or the thing
    sentence: str
    group: str = ""  # of the device
    sure: bool = True


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A finding in an alert."""

    subject: str
    group: str = ""
    gone: int = 0  # since when it is not found any more; 0: it is there


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of an alert; times are milliseconds."""

    id: str
    kind: str
    severity: Severity
    sentence: str
    members: dict[str, Member]
    grouped: bool = False
    status: Literal["pending", "open", "resolved"] = "pending"
    began: int
    opened_at: int = 0
    resolved_at: int = 0
    told: str = ""  # the severity that was told last
    told_at: int = 0
    told_count: int = 0
    number: int = 0  # of the last notice
    flaps: int = 0
    acked_by: str = ""
    acked_at: int = 0
    acked_why: str = ""

    @property
    def present(self) -> list[Member]:
        """The members that are still found."""
        return [m for m in self.members.values() if not m.gone]

    @property
    def groups(self) -> list[str]:
        """The device groups that are concerned."""
        return sorted({m.group for m in self.members.values() if m.group})


class Mute(msgspec.Struct, frozen=True, kw_only=True):
    """What nobody wants to hear of, until when."""

    id: str
    what: str  # `silent`, `device:press-*`, `group:pumps`, `alert:1f2e…`, or several with commas: all must fit
    until: int


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """The last end of an alert about a finding, or a kind, and how often it had come back."""

    resolved_at: int
    flaps: int


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """Something to tell; `id` is the same however often it is sent."""

    id: str
    number: int
    event: Event
    at: int
    alert: Alert


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Times in milliseconds."""

    group_at: int = 5
    group_wait: int = 60_000
    clear: int = 300_000
    remind: int = 43_200_000  # 0: never


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What changed; a pending alert whose finding is gone is in `dropped`, by id."""

    changed: tuple[Alert, ...] = ()
    dropped: tuple[str, ...] = ()
    notices: tuple[Notice, ...] = ()


def decide(
    alerts: Sequence[Alert],
    findings: Iterable[Finding],
    mutes: Sequence[Mute],
    past: Mapping[str, Past],
    now: int,
    rules: Rules,
) -> Decision:
    """What becomes of the alerts, and what is told.

    Args:
        alerts: those that are pending or open.
        findings: what is wrong now.
        mutes: those that were not taken back.
        past: ends within `FLAP_WINDOW`, by the key of a finding, or the kind of a grouped alert.
        now: milliseconds.
        rules: the thresholds.
    """
    found = {f.key: f for f in sorted(findings, key=lambda f: (f.key, f.sure, RANK[f.severity]))}
    before = {a.id: a for a in alerts}
    standing = [_look(a, found, now, rules) for a in alerts if a.status == "open"]
    waiting = [a for a in alerts if a.status == "pending"]
    held = {key for a in standing if a.status == "open" for key in a.members}
    kept, dropped = _await(waiting, found, held, now)
    settled = _admit(standing, kept, found, past, now, rules)
    told = [_tell(a, mutes, now, rules) for a in settled]
    return Decision(
        changed=tuple(a for a, _ in told if before.get(a.id) != a),
        dropped=(*dropped, *sorted({a.id for a in waiting} - {a.id for a in settled} - set(dropped))),
        notices=tuple(n for _, n in told if n is not None),
    )


def muted(alert: Alert, mutes: Iterable[Mute], now: int) -> bool:
    """Whether nobody wants to hear of it: of all that is there, where it has many members."""
    valid = [m.what.split(",") for m in mutes if m.until > now]
    members = alert.present or list(alert.members.values())
    return bool(valid) and all(any(all(_fits(t, alert, m) for t in what) for what in valid) for m in members)


def _fits(term: str, alert: Alert, member: Member) -> bool:
    what, colon, pattern = term.strip().partition(":")
    if not colon:
        return fnmatch.fnmatchcase(alert.kind, what)
    value = {"device": member.subject, "group": member.group, "alert": alert.id}.get(what, "")
    return bool(value) and fnmatch.fnmatchcase(value, pattern)


def _look(alert: Alert, found: Mapping[str, Finding], now: int, rules: Rules) -> Alert:
    """An open alert after what was found now."""
    members = {k: _seen(m, found.get(k), now) for k, m in alert.members.items()}
    clear = rules.clear << min(alert.flaps, MAX_DOUBLINGS)
    over = {k for k, m in members.items() if m.gone and now - m.gone >= clear}
    if len(over) == len(members):
        return msgspec.structs.replace(alert, status="resolved", resolved_at=now, members=members)
    members = {k: m for k, m in members.items() if k not in over}
    there = [found[k] for k in members if k in found and found[k].sure]
    severity = max([alert.severity, *(f.severity for f in there)], key=RANK.__getitem__)
    sentence = alert.sentence
    if alert.grouped:
        if members != alert.members and not all(m.gone for m in members.values()):
            sentence = together(alert.kind, members.values())
    elif there:
        sentence = there[0].sentence
    return msgspec.structs.replace(alert, members=members, severity=severity, sentence=sentence)


def _seen(member: Member, finding: Finding | None, now: int) -> Member:
    if finding is not None:
        return msgspec.structs.replace(member, gone=0) if member.gone else member
    return member if member.gone else msgspec.structs.replace(member, gone=now)


def _await(
    waiting: Sequence[Alert], found: Mapping[str, Finding], held: set[str], now: int
) -> tuple[list[Alert], list[str]]:
    """Findings that wait to be told: those from before that are still there, and new ones."""
    kept, dropped = [], []
    for alert in waiting:
        (key,) = alert.members
        if key in found and key not in held:
            f = found[key]
            severity = max(alert.severity, f.severity, key=RANK.__getitem__) if f.sure else alert.severity
            kept.append(msgspec.structs.replace(alert, severity=severity, sentence=f.sentence))
        else:
            dropped.append(alert.id)
    known = held | {key for a in kept for key in a.members}
    for key, f in found.items():
        if f.sure and key not in known:
            members = {key: Member(subject=f.subject, group=f.group)}
            made = Alert(
                id=_identity(key, now),
                kind=f.kind,
                severity=f.severity,
                sentence=f.sentence,
                members=members,
                began=now,
            )
            kept.append(made)
    return kept, dropped


def _admit(
    standing: list[Alert],
    waiting: list[Alert],
    found: Mapping[str, Finding],
    past: Mapping[str, Past],
    now: int,
    rules: Rules,
) -> list[Alert]:
    """Open what has waited long enough: each for itself, together, or in an alert that is open."""
    settled = list(standing)
    for kind in dict.fromkeys(a.kind for a in waiting):
        mine = [a for a in waiting if a.kind == kind]
        arrived = {k: m for a in mine for k, m in a.members.items()}
        lone = [a for a in standing if a.kind == kind and a.status == "open" and not a.grouped]
        crowd = next((i for i, a in enumerate(settled) if a.kind == kind and a.grouped and a.status == "open"), None)
        if crowd is not None:
            settled[crowd] = _join(settled[crowd], arrived, found)
        elif now - min(a.began for a in mine) < rules.group_wait:
            settled += mine
        elif len(mine) + len(lone) >= rules.group_at and len(mine) > 1:
            severity = max([TOGETHER.get(kind, ("", "warning"))[1], *(a.severity for a in mine)], key=RANK.__getitem__)
            group = Alert(
                id=_identity(kind, now), kind=kind, severity=severity, sentence=together(kind, arrived.values()),
                members=arrived, grouped=True, began=min(a.began for a in mine),
            )  # fmt: skip
            settled.append(_opened(group, past.get(kind), now))
        else:
            settled += [_opened(a, past.get(next(iter(a.members))), now) for a in mine]
    return settled


def _join(alert: Alert, arrived: Mapping[str, Member], found: Mapping[str, Finding]) -> Alert:
    members = {**alert.members, **arrived}
    severity = max([alert.severity, *(found[k].severity for k in arrived)], key=RANK.__getitem__)
    sentence = together(alert.kind, members.values())
    return msgspec.structs.replace(alert, members=members, severity=severity, sentence=sentence)


def _opened(alert: Alert, past: Past | None, now: int) -> Alert:
    again = past is not None and now - past.resolved_at < FLAP_WINDOW
    flaps = past.flaps + 1 if past is not None and again else 0
    return msgspec.structs.replace(alert, status="open", opened_at=now, flaps=flaps)


def _tell(alert: Alert, mutes: Sequence[Mute], now: int, rules: Rules) -> tuple[Alert, Notice | None]:
    event = _event(alert, mutes, now, rules)
    if event is None:
        return alert, None
    risen = event == "worse" and RANK[alert.severity] > RANK[alert.told]
    after = msgspec.structs.replace(
        alert,
        told="ok" if event == "resolve" else alert.severity,
        told_at=now,
        told_count=max(alert.told_count, len(alert.present)),
        number=alert.number + 1,
    )
    if risen:
        after = msgspec.structs.replace(after, acked_by="", acked_at=0, acked_why="")
    return after, Notice(id=f"{after.id}.{after.number}", number=after.number, event=event, at=now, alert=after)


def _event(alert: Alert, mutes: Sequence[Mute], now: int, rules: Rules) -> Event | None:
    """What is to be said of an alert now, if anything."""
    if alert.status == "resolved":
        return "resolve" if alert.told else None
    if alert.status == "pending" or not alert.present or muted(alert, mutes, now):
        return None
    if not alert.told:
        return "open"
    grown = alert.grouped and len(alert.present) >= 2 * alert.told_count
    if RANK[alert.severity] > RANK[alert.told] or grown:
        return "worse"
    if rules.remind and not alert.acked_by and now - alert.told_at >= rules.remind:
        return "remind"
    return None


def together(kind: str, members: Iterable[Member]) -> str:
    """How many, where, and which first."""
    there = [m for m in members if not m.gone]
    words = TOGETHER.get(kind, (f"findings of {kind}", "warning"))[0]
    names = sorted({m.subject for m in there})
    groups = Counter(m.group for m in there if m.group)
    most = sorted(groups.items(), key=lambda g: (-g[1], g[0]))
    where = ", ".join(f"{group} {n}" for group, n in most[:NAMED]) + (", …" if len(most) > NAMED else "")
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(there)} {words}{f' ({where})' if where else ''}: {', '.join(names[:NAMED])}{more}."


def _identity(key: str, now: int) -> str:
    return hashlib.sha256(f"{key}\n{now}".encode()).hexdigest()[:12]
