"""Who may do what: the table, and what must hold for any token, verb and environment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.access.rules import ANY_ENVIRONMENT, RULES, Grant, Role, Verb, covers, permit
from lightship_agent.contract.codes import AccessError

environments = st.sampled_from(["development", "staging", "production"])
roles, verbs = st.sampled_from(Role), st.sampled_from(Verb)


def answer(grant: Grant | None, verb: Verb, environment: str = "production", *, open_reads: bool = False) -> str:
    """The code of the refusal; "" for a yes."""
    try:
        permit(grant, verb, environment=environment, open_reads=open_reads)
    except AccessError as e:
        return e.code
    return ""


def held(role: Role, environment: str = "production") -> Grant:
    return Grant("ci", role, environment)


@pytest.mark.parametrize(
    ("role", "may", "may_not"),
    [
        (Role.VIEWER, {Verb.FLEET_READ, Verb.AUDIT_READ, Verb.ROLLOUT_PLAN}, {Verb.ROLLOUT_PAUSE, Verb.DEVICE_REVOKE}),
        (Role.OPERATOR, {Verb.ROLLOUT_START, Verb.ROLLOUT_ABORT, Verb.DEVICE_TOKEN}, {Verb.RELEASE_REVOKE}),
        (Role.RELEASER, {Verb.RELEASE_PUBLISH, Verb.RELEASE_REVOKE, Verb.ROLLOUT_START}, {Verb.TOKEN_CREATE}),
        (Role.ADMIN, set(Verb), set()),
    ],
)
def test_a_role_may_do_what_its_name_says_and_no_more(role: Role, may: set[Verb], may_not: set[Verb]) -> None:
    assert {answer(held(role), verb) for verb in may} == {""}
    assert {answer(held(role), verb) for verb in may_not} <= {"access.role"}


def test_every_verb_has_a_rule_with_words_and_what_changes_something_has_a_role_above_viewer() -> None:
    assert set(RULES) == set(Verb)
    assert all(rule.words for rule in RULES.values())
    for verb, rule in RULES.items():
        assert not rule.changes or (rule.least is not None and rule.least is not Role.VIEWER), verb


@given(low=roles, high=roles, verb=verbs, environment=environments)
def test_a_higher_role_may_do_all_that_a_lower_one_may(low: Role, high: Role, verb: Verb, environment: str) -> None:
    if covers(high, low) and answer(held(low, environment), verb, environment) == "":
        assert answer(held(high, environment), verb, environment) == ""


@given(role=roles, verb=verbs, mine=environments, here=environments, open_reads=st.booleans())
def test_a_token_is_worth_nothing_in_another_environment_whatever_its_role(
    role: Role, verb: Verb, mine: str, here: str, open_reads: bool
) -> None:
    said = answer(held(role, mine), verb, here, open_reads=open_reads)
    if verb is Verb.OPEN:
        assert said == ""
    elif mine != here:
        assert said == "access.environment"
    else:
        assert said in ("", "access.role")


@given(verb=verbs, here=environments, open_reads=st.booleans())
def test_nobody_without_a_token_changes_anything_or_reads_what_is_not_open(
    verb: Verb, here: str, open_reads: bool
) -> None:
    said = answer(None, verb, here, open_reads=open_reads)
    if verb is Verb.OPEN:
        assert said == ""
    elif RULES[verb].changes or not open_reads or RULES[verb].least is not Role.VIEWER:
        assert said == "access.token"
    else:
        assert said == ""


@given(role=roles, verb=verbs, here=environments)
def test_open_reads_give_a_token_nothing_that_it_has_not_anyway(role: Role, verb: Verb, here: str) -> None:
    grant = held(role, here)
    assert answer(grant, verb, here, open_reads=True) == answer(grant, verb, here, open_reads=False)


@given(verb=verbs, here=environments)
def test_the_bootstrap_credential_may_do_everything_wherever_its_home_is(verb: Verb, here: str) -> None:
    assert answer(Grant("operator-token", Role.ADMIN, ANY_ENVIRONMENT), verb, here) == ""


@given(first=roles, second=roles, third=roles)
def test_roles_are_in_one_order(first: Role, second: Role, third: Role) -> None:
    assert covers(first, second) or covers(second, first)
    assert (first is second) == (covers(first, second) and covers(second, first))
    if covers(first, second) and covers(second, third):
        assert covers(first, third)
