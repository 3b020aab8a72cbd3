"""Who is asked, what is alike, and what agreement may say."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.assignment import MAX_BESIDE, Assignment, Beside, assignment_bytes, parse_assignment
from lightship_agent.contract.codes import TrustError, WireError
from lightship_agent.contract.experiment import (
    DIFFERENCE_EDGES,
    LATENCY_EDGES,
    Shape,
    point_of,
    quantile,
    unlike,
)
from lightship_agent.contract.messages import Agreement, Envelope
from lightship_agent.contract.schema import Feature, FeatureSchema, Outputs
from lightship_agent.contract.wire import decode, encode

KEYS = st.text(max_size=64)


class OldAssignment(msgspec.Struct, frozen=True, kw_only=True):
    """What agents before companions parse."""

    device: str
    seq: int
    path: str


def assignment(*beside: Beside) -> Assignment:
    return Assignment(
        device="press-1", seq=3, issued=1, expires=2, model="pump", version=1, path="bundles/pump/1.tar",
        sha256="a" * 64, length=10, beside=beside,
    )  # fmt: skip


def companion(**changes: object) -> Beside:
    facts: dict[str, object] = {
        "experiment": "e1", "model": "pump", "version": 2, "path": "bundles/pump/2.tar", "sha256": "b" * 64,
        "length": 10, "mode": "ab", "share": 0.3,
    }  # fmt: skip
    return msgspec.convert({**facts, **changes}, Beside)


def shape(*names: str, labels: tuple[str, ...] = ("ok", "worn"), model: str = "pump", **how: str) -> Shape:
    schema = FeatureSchema(features=tuple(Feature(name=n) for n in names), input_name=how.get("input", "x"))
    return Shape(model, schema, Outputs(task="classification" if labels else "regression", labels=labels))


def agreement(**changes: object) -> Agreement:
    facts: dict[str, object] = {
        "s": 1, "t": 1, "experiment": "e1", "model": "pump", "version": 2, "digest": "b" * 64, "champion": "a" * 64,
        "opened": 1, "rows": 10, "same": 8, "confusion": (5, 1, 1, 3),
        "differences": (8, *(0 for _ in DIFFERENCE_EDGES)), "latency": (10, *(0 for _ in LATENCY_EDGES)),
    }  # fmt: skip
    return Agreement(**{**facts, **changes})  # type: ignore[arg-type]


def test_companions_travel_in_the_assignment_and_an_old_agent_does_not_see_them() -> None:
    sent = assignment(companion(), companion(experiment="e2", mode="shadow", share=1.0))

    assert parse_assignment(assignment_bytes(sent)) == sent
    old = msgspec.json.decode(assignment_bytes(sent), type=OldAssignment)
    assert (old.device, old.seq, old.path) == ("press-1", 3, "bundles/pump/1.tar")


def test_an_assignment_of_before_has_no_companions() -> None:
    plain = msgspec.to_builtins(assignment())
    del plain["beside"]

    assert parse_assignment(msgspec.json.encode(plain)).beside == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"share": 0.0}, {"share": 1.5}, {"share": -0.1}, {"share": "much"}, {"sha256": "../../etc/passwd"},
        {"experiment": ""}, {"experiment": "a/b"}, {"experiment": "x" * 33}, {"length": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_companion_makes_a_malformed_assignment(changes: dict[str, object]) -> None:
    plain = msgspec.to_builtins(assignment(companion()))
    plain["beside"][0].update(changes)

    with pytest.raises(TrustError) as refused:
        parse_assignment(msgspec.json.encode(plain))

    assert refused.value.code == "trust.metadata"


def test_more_companions_than_a_device_bears_are_refused() -> None:
    crowd = assignment(*(companion(experiment=f"e{i}") for i in range(MAX_BESIDE + 1)))

    with pytest.raises(TrustError):
        parse_assignment(assignment_bytes(crowd))


def test_a_mode_of_a_later_release_does_not_cost_the_assignment() -> None:
    assert parse_assignment(assignment_bytes(assignment(companion(mode="canary")))).beside[0].mode == "canary"


@given(KEYS, KEYS)
def test_a_key_falls_to_one_point_and_each_experiment_deals_anew(experiment: str, key: str) -> None:
    assert 0 <= point_of(experiment, key) < 1
    assert point_of(experiment, key) == point_of(experiment, key)


def test_points_are_what_they_were_in_every_release() -> None:
    """Were one of these to change, keys would change arms with an upgrade of the agent."""
    assert point_of("e1", "customer-7") == pytest.approx(0.95007511, abs=1e-8)
    assert point_of("e2", "customer-7") != point_of("e1", "customer-7")
    assert point_of("e", "1x") != point_of("e1", "x")


def test_points_spread_evenly() -> None:
    points = [point_of("e1", f"key-{i}") for i in range(20_000)]

    for share in (0.1, 0.3, 0.5, 0.9):
        assert sum(p < share for p in points) / len(points) == pytest.approx(share, abs=0.015)


def test_what_takes_and_gives_the_same_is_alike() -> None:
    assert unlike(shape("a", "b"), shape("a", "b")) == ""


@pytest.mark.parametrize(
    ("challenger", "word"),
    [
        (shape("a", "b", model="fan"), "fan"),
        (shape("a"), "features"),
        (shape("b", "a"), "features"),
        (shape("a", "b", input="rows"), "input"),
        (shape("a", "b", labels=("ok", "broken")), "labels"),
        (shape("a", "b", labels=()), "classification"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_takes_or_gives_something_else_is_not_and_it_says_why(challenger: Shape, word: str) -> None:
    assert word in unlike(shape("a", "b"), challenger)


def test_agreement_travels() -> None:
    envelope = Envelope(e="0" * 16, b=1, us=1, lo=1, r=(agreement(),))

    assert decode(encode(envelope), Envelope) == envelope


@pytest.mark.parametrize(
    "changes",
    [
        {"same": 11}, {"confusion": (5, 1, 1)}, {"confusion": (5, 1, 1, 4)}, {"confusion": (4, 2, 1, 3)},
        {"differences": (1,)}, {"differences": (11, *(0 for _ in DIFFERENCE_EDGES))}, {"latency": (1, 2)},
        {"difference_sum": float("nan")}, {"difference_max": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_counts_that_contradict_each_other_are_no_agreement(changes: dict[str, object]) -> None:
    with pytest.raises(WireError):
        agreement(**changes)


def test_a_quantile_is_the_edge_of_its_bin() -> None:
    assert quantile((0, 90, 0, 10), (1.0, 2.0, 5.0), 0.5) == 2.0
    assert quantile((0, 90, 0, 10), (1.0, 2.0, 5.0), 0.95) == 5.0
    assert quantile((0, 0, 0, 0), (1.0, 2.0, 5.0), 0.95) == 5.0
