"""The operator's guide works the rollout rules through in a table. Each row is played through the decider."""

from __future__ import annotations

import pytest
from tests.docs.fences import ROOT

from lightship.fleet import rollout as r

GUIDE = ROOT / "docs" / "operators-guide.md"
NOW = 1_000_000.0
COLUMNS = ("done", "failed", "timed out", "pending", "offline", "acknowledged", "gate says", "what happens", "because")


def rows() -> list[dict[str, str]]:
    lines = GUIDE.read_text().splitlines()
    start = lines.index(f"| {' | '.join(COLUMNS)} |") + 2
    found = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append(dict(zip(COLUMNS, (cell.strip() for cell in line.strip("|").split("|")), strict=True)))
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['what happens']}: {row['because']}")
def test_the_decider_does_what_the_guide_says(row: dict[str, str]) -> None:
    plan, state, facts = wave(row)
    says = row["gate says"]
    verdict = None if says == "none" else r.Verdict(outcome=says, sentence="Said.")

    after, actions = r.step(plan, state, facts, verdict, NOW)

    assert outcome(after, actions) == row["what happens"]


def test_the_table_covers_every_outcome() -> None:
    assert {row["what happens"] for row in rows()} == {"waits", "pauses", "goes on", "holds", "rolls back"}


def wave(row: dict[str, str]) -> tuple[r.Plan, r.RolloutState, dict[str, r.DeviceFact]]:
    """A first, gated wave with so many devices in each state, and a second wave behind it."""
    rules = r.Rules()
    new, old = "n" * 64, "o" * 64
    lately, long_ago = NOW - 1.0, NOW - rules.device_timeout - 10.0
    facts: dict[str, r.DeviceFact] = {}
    seen: dict[str, float] = {}

    def add(kind: str, fact: r.DeviceFact, seen_at: float | None) -> None:
        for i in range(int(row[kind])):
            device = f"{kind.replace(' ', '-')}-{i}"
            facts[device] = fact
            if seen_at is not None:
                seen[device] = seen_at

    add("done", r.DeviceFact(digest=new, committed=True, failed=False, last_seen=lately), lately)
    add("failed", r.DeviceFact(digest=old, committed=True, failed=True, last_seen=lately), lately)
    add("timed out", r.DeviceFact(digest=old, committed=True, failed=False, last_seen=long_ago), long_ago)
    add("pending", r.DeviceFact(digest=old, committed=False, failed=False, last_seen=lately), lately)
    add("offline", r.DeviceFact(digest=old, committed=True, failed=False, last_seen=long_ago), None)
    devices = tuple(facts)
    plan = r.Plan(
        model="digits",
        version=2,
        digest=new,
        previous_version=1,
        waves=(devices, ("next-1",)),
        wave_specs=(r.WaveSpec(name="canary", count=len(devices)), r.WaveSpec(name="rest", gate=False)),
        rules=rules,
    )
    state = r.RolloutState(
        wave=0,
        assigned_at=dict.fromkeys(devices, long_ago),
        seen_at=seen,
        acknowledged=tuple(d for d in devices if d.startswith(("failed", "timed")))[: int(row["acknowledged"])],
    )
    return plan, state, facts


def outcome(after: r.RolloutState, actions: tuple[r.Action, ...]) -> str:
    """What happened, in the guide's words."""
    if after.status == "paused":
        return "pauses"
    if after.status == "rolling-back":
        return "rolls back"
    if any(isinstance(a, r.Assign) for a in actions):
        return "goes on"
    return "holds" if after.reason.startswith("Holding") else "waits"
