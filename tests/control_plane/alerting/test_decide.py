"""The alert decider, over any history of findings: one event is one alert, and nothing is told twice or lost."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.alerting.decide import (
    MAX_DOUBLINGS,
    RANK,
    Alert,
    Decision,
    Finding,
    Mute,
    Notice,
    Past,
    Rules,
    decide,
    muted,
    together,
)

MINUTE = 60_000
RULES = Rules(group_at=4, group_wait=MINUTE, clear=5 * MINUTE, remind=120 * MINUTE)


def silent(device: str, *, severity: str = "warning", sure: bool = True, group: str = "pumps") -> Finding:
    return Finding(
        key=f"silent:{device}", kind="silent", severity=severity, subject=device, sentence=f"{device} is silent.",
        group=group, sure=sure,
    )  # type: ignore[arg-type]  # fmt: skip


@dataclass
class World:
    """Carries the decider's memory from look to look, through bytes, as the database does."""

    rules: Rules = RULES
    now: int = 1_000_000_000
    stored: dict[str, bytes] = field(default_factory=dict)
    past: dict[str, Past] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)
    mutes: list[Mute] = field(default_factory=list)

    @property
    def alerts(self) -> list[Alert]:
        return [msgspec.msgpack.decode(b, type=Alert) for b in self.stored.values()]

    @property
    def standing(self) -> list[Alert]:
        return [a for a in self.alerts if a.status != "resolved"]

    @property
    def open(self) -> list[Alert]:
        return [a for a in self.alerts if a.status == "open"]

    def look(self, *findings: Finding, after: int = MINUTE) -> list[Notice]:
        self.now += after
        decision = self.decide(*findings)
        for ident in decision.dropped:
            del self.stored[ident]
        for a in decision.changed:
            self.stored[a.id] = msgspec.msgpack.encode(a)
            if a.status == "resolved":
                keys = [a.kind] if a.grouped else list(a.members)
                self.past.update({k: Past(resolved_at=a.resolved_at, flaps=a.flaps) for k in keys})
        self.notices += decision.notices
        return list(decision.notices)

    def decide(self, *findings: Finding) -> Decision:
        return decide(self.standing, findings, self.mutes, self.past, self.now, self.rules)

    def events(self) -> list[str]:
        return [n.event for n in self.notices]


def test_what_lasts_is_told_once_and_its_end_once() -> None:
    world = World()
    for _ in range(10):
        world.look(silent("a"))
    for _ in range(10):
        world.look()

    assert world.events() == ["open", "resolve"]
    assert [n.alert.severity for n in world.notices] == ["warning", "warning"]
    assert world.notices[0].alert.id == world.notices[1].alert.id


def test_what_is_gone_before_it_was_told_is_never_told() -> None:
    world = World()
    world.look(silent("a"), after=10_000)
    world.look()

    assert world.notices == []
    assert world.alerts == []


def test_a_site_that_falls_silent_is_one_alert_that_names_how_many_and_a_few() -> None:
    world = World()
    devices = [silent(f"pump-{i:02}", group="north" if i < 30 else "south") for i in range(42)]
    for i in range(0, 43, 7):  # they miss their third interval one after the other
        world.look(*devices[:i], after=10_000)
    for _ in range(5):
        world.look(*devices)

    (told,) = world.notices
    assert (told.event, told.alert.severity) == ("open", "critical")
    assert told.alert.sentence == (
        "42 devices are silent (north 30, south 12): pump-00, pump-01, pump-02, pump-03, pump-04 and 37 more."
    )


def test_a_site_that_comes_back_is_one_message_though_its_devices_come_one_by_one() -> None:
    world = World()
    devices = [silent(f"pump-{i:02}") for i in range(20)]
    for _ in range(3):
        world.look(*devices)
    for i in range(21):
        world.look(*devices[i:])
    for _ in range(6):
        world.look()

    assert world.events() == ["open", "resolve"]
    assert world.open == []


def test_later_devices_join_the_group_and_are_told_when_it_has_doubled() -> None:
    world = World()
    devices = [silent(f"pump-{i:02}") for i in range(20)]
    for n in (4, 4, 5, 6, 7, 8, 9, 15, 16):
        world.look(*devices[:n])

    assert [(n.event, len(n.alert.present)) for n in world.notices] == [("open", 4), ("worse", 8), ("worse", 16)]


def test_coming_and_going_within_the_clear_time_says_nothing_more() -> None:
    world = World()
    world.look(silent("a"))
    for _ in range(60):
        world.look(silent("a"))
        world.look()

    assert world.events() == ["open"]


def test_what_keeps_coming_back_is_told_less_and_less() -> None:
    world = World()
    for _ in range(40):
        for _ in range(2):
            world.look(silent("a"))
        for _ in range(7):
            world.look()

    told = [event for event in world.events() if event != "remind"]
    assert told == ["open", "resolve", "open"]  # of 40; the second alert outlasts every pause
    assert [a.flaps for a in world.alerts] == [0, 1]


def test_worse_is_told_at_once_and_takes_the_acknowledgement_away() -> None:
    world = World()
    for _ in range(2):
        world.look(silent("a"))
    (alert,) = world.open
    world.stored[alert.id] = msgspec.msgpack.encode(msgspec.structs.replace(alert, acked_by="user:ann"))
    world.look(silent("a", severity="critical"))
    world.look(silent("a"))

    assert [(n.event, n.alert.severity, n.alert.acked_by) for n in world.notices[1:]] == [("worse", "critical", "")]
    assert world.open[0].severity == "critical"


def test_it_is_told_again_until_somebody_acknowledges_it() -> None:
    world = World()
    for _ in range(5):
        world.look(silent("a"), after=70 * MINUTE)
    (alert,) = world.open
    reminded = world.events().count("remind")
    world.stored[alert.id] = msgspec.msgpack.encode(msgspec.structs.replace(alert, acked_by="user:ann"))
    for _ in range(5):
        world.look(silent("a"), after=70 * MINUTE)
    for _ in range(7):
        world.look()

    assert reminded == 1
    assert world.events() == ["open", "remind", "resolve"]


def test_a_mute_holds_back_and_what_is_still_open_at_its_end_is_told_then() -> None:
    world = World()
    world.mutes.append(Mute(id="m", what="device:a", until=world.now + 10 * MINUTE))
    for _ in range(9):
        world.look(silent("a"), silent("b"))
    during = [n.alert.sentence for n in world.notices]
    for _ in range(3):
        world.look(silent("a"), silent("b"))

    assert during == ["b is silent."]
    assert [n.alert.sentence for n in world.notices] == ["b is silent.", "a is silent."]


def test_what_was_told_ends_aloud_and_what_was_not_told_ends_quietly() -> None:
    world = World()
    for _ in range(2):
        world.look(silent("a"))
    world.mutes.append(Mute(id="m", what="silent", until=world.now + 600 * MINUTE))
    for _ in range(3):
        world.look(silent("b"))
    for _ in range(20):
        world.look()

    assert [(n.event, n.alert.sentence) for n in world.notices] == [
        ("open", "a is silent."),
        ("resolve", "a is silent."),
    ]


def test_what_only_seems_so_opens_nothing_and_ends_nothing() -> None:
    world = World()
    for _ in range(5):
        world.look(silent("a", sure=False))
    assert (world.notices, world.alerts) == ([], [])
    for _ in range(3):
        world.look(silent("a"))
    for _ in range(20):
        world.look(silent("a", sure=False))

    assert world.events() == ["open"]


def test_a_mute_of_several_terms_fits_only_what_fits_all() -> None:
    alert = Alert(id="x", kind="silent", severity="warning", sentence="", members={}, began=0)
    world = World()
    for _ in range(2):
        world.look(silent("a", group="pumps"))
    (alert,) = world.open
    now = world.now

    def hides(what: str, until: int = now + 1) -> bool:
        return muted(alert, [Mute(id="m", what=what, until=until)], now)

    assert all(map(hides, ("silent", "*", "device:a", "group:pu*", "silent,group:pumps", f"alert:{alert.id}")))
    assert not any(map(hides, ("drift", "device:b", "silent,group:fans", "alert:x", "group:", "device:")))
    assert not hides("silent", until=now)


DEVICES = [f"d{i}" for i in range(7)]
STEP = st.fixed_dictionaries(
    {
        "after": st.sampled_from([10_000, 30_000, MINUTE, 6 * MINUTE, 30 * MINUTE]),
        "there": st.sets(st.sampled_from(DEVICES)),
        "bad": st.sets(st.sampled_from(DEVICES), max_size=2),
        "unsure": st.sets(st.sampled_from(DEVICES), max_size=2),
        "mute": st.sampled_from(["", "", "", "silent", "device:d1", "group:g0"]),
    }
)


def findings_of(step: dict[str, object]) -> list[Finding]:
    there, bad, unsure = (step[name] for name in ("there", "bad", "unsure"))
    assert isinstance(there, set)
    assert isinstance(bad, set)
    assert isinstance(unsure, set)
    return [
        silent(d, severity="critical" if d in bad else "warning", sure=d not in unsure, group=f"g{int(d[1:]) % 2}")
        for d in sorted(there)
    ]


def play(steps: list[dict[str, object]]) -> tuple[World, list[tuple[int, set[str]]]]:
    """The world after these steps; and when what was surely there."""
    world, seen = World(), []
    for step in steps:
        if step["mute"]:
            world.mutes.append(Mute(id="m", what=str(step["mute"]), until=world.now + 20 * MINUTE))
        found = findings_of(step)
        world.look(*found, after=int(str(step["after"])))
        seen.append((world.now, {f.subject for f in found if f.sure}))
        held = Counter(key for a in world.open for key in a.members)
        assert not held or max(held.values()) == 1, "a finding is in two open alerts"
        assert world.decide(*found).notices == (), "the same look again tells something"
    return world, seen


@settings(max_examples=300)
@given(st.lists(STEP, min_size=1, max_size=40))
def test_notices_of_an_alert_are_numbered_begin_with_open_and_end_with_resolve(steps: list[dict[str, object]]) -> None:
    world, _ = play(steps)
    by_alert: dict[str, list[Notice]] = defaultdict(list)
    for notice in world.notices:
        by_alert[notice.alert.id].append(notice)

    assert len({n.id for n in world.notices}) == len(world.notices)
    for notices in by_alert.values():
        events = [n.event for n in notices]
        assert [n.number for n in notices] == list(range(1, len(notices) + 1))
        assert events[0] == "open"
        assert "open" not in events[1:]
        assert "resolve" not in events[:-1]
        ranks = [RANK[n.alert.severity] for n in notices]
        assert ranks == sorted(ranks)
    for alert in world.alerts:
        told = [n.event for n in by_alert.get(alert.id, [])]
        assert (told[-1:] == ["resolve"]) == (alert.status == "resolved" and bool(told))


@settings(max_examples=300)
@given(st.lists(STEP, min_size=1, max_size=30))
def test_what_lasts_is_told_and_what_is_over_ends_whatever_came_before(steps: list[dict[str, object]]) -> None:
    world, _ = play(steps)
    world.mutes.clear()
    for _ in range(3):
        world.look(silent("d1"), silent("d5"))

    told = {m.subject for a in world.open if a.told for m in a.present}
    assert told == {"d1", "d5"}

    for _ in range(3):
        world.look(after=(RULES.clear << MAX_DOUBLINGS) + 1)
    assert world.standing == []
    assert Counter(world.events())["open"] == Counter(world.events())["resolve"]


@settings(max_examples=200)
@given(st.lists(STEP, min_size=1, max_size=30), st.integers(0, 29))
def test_an_outage_of_all_is_at_most_one_more_message(steps: list[dict[str, object]], seed: int) -> None:
    world, _ = play(steps)
    world.mutes.clear()
    for _ in range(3):
        world.look(after=(RULES.clear << MAX_DOUBLINGS) + 1)
    before = len(world.notices)
    crowd = [silent(f"e{i}") for i in range(4 + seed)]
    for _ in range(10):
        world.look(*crowd)

    (notice,) = world.notices[before:]
    assert (notice.event, len(notice.alert.present)) == ("open", 4 + seed)


@given(st.integers(0, 40), st.integers(1, 4))
def test_a_sentence_names_at_most_five(there: int, groups: int) -> None:
    members = [silent(f"pump-{i:02}", group=f"g{i % groups}") for i in range(there)]
    world = World()
    for _ in range(2):
        world.look(*members)
    for notice in world.notices:
        assert notice.alert.sentence.count("pump-") <= 5
    assert together("odd-kind", []) == "0 findings of odd-kind: ."
