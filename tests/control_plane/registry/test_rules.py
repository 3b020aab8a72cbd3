"""May this version move? The rules alone, for every state and every act."""

from __future__ import annotations

from contextlib import suppress
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.registry.rules import MIN_REASON, State, may_alias, may_register, next_state
from lightship_agent.contract.codes import GateError, RegistryError

STATES = get_args(State)
reasons = st.none() | st.text(max_size=3 * MIN_REASON)


@given(gate_passed=st.booleans(), force_reason=reasons)
def test_no_reason_in_the_world_forces_a_model_past_parity(gate_passed: bool, force_reason: str | None) -> None:
    with pytest.raises(GateError, match="can't be forced"):
        may_register(gate_passed=gate_passed, parity_passed=False, force_reason=force_reason, failed="too bad")


@given(force_reason=reasons)
def test_what_passed_its_gates_needs_no_reason(force_reason: str | None) -> None:
    may_register(gate_passed=True, parity_passed=True, force_reason=force_reason, failed="")


@given(force_reason=reasons)
def test_a_failed_gate_is_passed_only_with_a_reason_somebody_can_read(force_reason: str | None) -> None:
    def ask() -> None:
        may_register(
            gate_passed=False, parity_passed=True, force_reason=force_reason, failed="too bad", code="gate.champion"
        )

    if force_reason is None:
        with pytest.raises(GateError, match="too bad") as refused:
            ask()
        assert refused.value.code == "gate.champion"
    elif len(force_reason.strip()) < MIN_REASON:
        with pytest.raises(GateError, match="audited") as refused:
            ask()
        assert refused.value.code == "gate.reason-required"
    else:
        ask()


@given(st.lists(st.sampled_from(["release", "revoke"]), max_size=6))
def test_whatever_is_tried_a_revoked_version_stays_revoked(acts: list[str]) -> None:
    state: State = "registered"
    seen = [state]
    for act in acts:
        with suppress(RegistryError):
            state = next_state(state, act)  # type: ignore[arg-type]
        seen.append(state)
    assert "revoked" not in seen or set(seen[seen.index("revoked") :]) == {"revoked"}
    assert [STATES.index(s) for s in seen] == sorted(STATES.index(s) for s in seen)


def test_releasing_twice_is_releasing_once() -> None:
    assert next_state(next_state("registered", "release"), "release") == "released"


def test_what_was_never_released_can_not_be_revoked() -> None:
    with pytest.raises(RegistryError, match="registered can't be revoked"):
        next_state("registered", "revoke")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("alias", ["champion", "challenger", "my-own"])
def test_the_champion_is_released_and_nothing_points_to_what_was_revoked(state: State, alias: str) -> None:
    allowed = state == "released" or (state == "registered" and alias != "champion")
    if allowed:
        may_alias(state, alias)
        return
    with pytest.raises(RegistryError) as e:
        may_alias(state, alias)
    assert e.value.code == "registry.state"
