"""Identifiers, topics, error codes, join tokens and assignments: small promises that both sides lean on."""

from __future__ import annotations

import contextlib
import inspect
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract import codes, topics
from lightship_agent.contract.assignment import Assignment, assignment_bytes, check_assignment, parse_assignment
from lightship_agent.contract.codes import (
    CODES,
    EXIT_STATUS,
    EnrolError,
    InvalidNameError,
    LightshipError,
    TrustError,
)
from lightship_agent.contract.device_api import parse_token
from lightship_agent.contract.names import check_name, feature_name

DEVICE = st.from_regex(r"[a-z0-9][a-z0-9-]{1,62}", fullmatch=True)
KINDS = ("device id", "model name", "dataset name", "group", "tenant", "alias", "feature name")

# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=80))
def test_a_valid_name_is_harmless_wherever_names_go(kind: str, text: str) -> None:
    with contextlib.suppress(InvalidNameError):
        name = check_name(kind, text)
        assert re.fullmatch(r"[a-z0-9_-]{1,64}", name)
        assert not name.startswith(("-", "_", "."))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", "+", "#", "a/b", "..", "a.b", "A1", "a b", "ab\n", "-ab", "é1", "a" * 64, "a\0b"])
def test_wildcards_paths_and_newlines_are_no_names(kind: str, name: str) -> None:
    with pytest.raises(InvalidNameError, match=f"not a valid {kind}") as refused:
        check_name(kind, name)
    assert refused.value.code == "name.invalid"


@given(titles=st.lists(st.text(max_size=90), max_size=30))
def test_every_column_title_becomes_a_valid_name_of_its_own(titles: list[str]) -> None:
    taken: set[str] = set()
    for title in titles:
        name = feature_name(title, taken)
        assert check_name("feature name", name) == name
        assert name not in taken
        taken.add(name)


# Topics --------------------------------------------------------------------------------------------------------------


@given(tenant=DEVICE, device=DEVICE)
def test_an_upward_topic_tells_who_sent_it(tenant: str, device: str) -> None:
    assert topics.parse(topics.state(tenant, device)) == (tenant, device, "state")
    assert topics.parse(topics.telemetry(tenant, device)) == (tenant, device, "tele")
    assert topics.parse(topics.event(tenant, device)) == (tenant, device, "event")
    assert topics.parse(topics.response(tenant, device, "snapshot")) == (tenant, device, "rsp")
    assert topics.parse(f"{topics.ROOT}/{tenant}/{device}/rsp") is None


@given(tenant=DEVICE, device=DEVICE)
def test_a_downward_topic_is_no_report(tenant: str, device: str) -> None:
    assert topics.parse(topics.command(tenant, device, "check")) is None
    assert topics.parse(topics.notify(tenant)) is None


@given(text=st.text(max_size=60) | st.from_regex(r"lightship/v1(/[^/]*){0,5}", fullmatch=True))
def test_any_topic_is_an_address_or_nothing(text: str) -> None:
    found = topics.parse(text)

    sent = "" if found is None else f"{topics.ROOT}/{found.tenant}/{found.device}/{found.kind}"
    assert found is None or text == sent or (found.kind == "rsp" and text.rpartition("/")[0] == sent)


def test_ingest_listens_to_every_upward_kind_and_to_nothing_else() -> None:
    kinds = {"state": "state", "tele": "tele", "event": "event", "rsp": "rsp/+"}
    assert topics.ingest_filters("g") == tuple(f"$share/g-{k}/lightship/v1/+/+/{t}" for k, t in kinds.items())


# Codes ---------------------------------------------------------------------------------------------------------------

CLASSES = [c for _, c in inspect.getmembers(codes, inspect.isclass) if issubclass(c, LightshipError) and c.family]


def test_every_code_has_a_family_with_an_error_class_and_an_exit_status_of_its_own() -> None:
    families = {code.partition(".")[0] for code in CODES}

    assert families == set(EXIT_STATUS) == {c.family.rstrip(".") for c in CLASSES}
    assert len(CLASSES) == len(EXIT_STATUS) == len(set(EXIT_STATUS.values()))
    assert not set(EXIT_STATUS.values()) & {0, 1, 2, *range(64, 256)}


def test_every_code_is_a_sentence_and_can_be_raised_with_its_status() -> None:
    for code, meaning in CODES.items():
        assert re.fullmatch(r"[a-z]+\.[a-z][a-z-]*", code)
        assert meaning.endswith(".")
        kind = next(c for c in CLASSES if code.startswith(c.family))
        assert kind(code, "What.", remedy="Do.").exit_status == EXIT_STATUS[code.partition(".")[0]]


def test_the_family_tree_in_the_room_description_is_the_one_in_the_code() -> None:
    described = dict(re.findall(r"^ {6}(\w+Error) +(\w+\.)\*", codes.__doc__ or "", re.MULTILINE))

    assert described == {c.__name__: c.family for c in CLASSES}


def test_an_error_says_what_and_then_what_to_do() -> None:
    assert str(TrustError("trust.digest", "Wrong bytes.")) == "Wrong bytes."
    assert str(TrustError("trust.digest", "Wrong bytes.", remedy="Ask again.")) == "Wrong bytes. Ask again."


@pytest.mark.parametrize("code", ["trust.unheard-of", "link.status", "", "trust"])
def test_a_code_of_another_family_is_a_bug_in_the_program(code: str) -> None:
    with pytest.raises(AssertionError):
        TrustError(code, "What.")


# Join tokens ---------------------------------------------------------------------------------------------------------


def test_a_join_token_has_three_parts_and_may_end_in_a_newline() -> None:
    assert parse_token(f"id.secret.{'a' * 64}\n") == ("id", "secret", "a" * 64)


@given(text=st.text(max_size=90))
def test_other_text_is_no_join_token(text: str) -> None:
    with contextlib.suppress(EnrolError):
        assert len(parse_token(text).pin) == 64


# Assignments ---------------------------------------------------------------------------------------------------------


def assignment(**changes: object) -> Assignment:
    plain: dict[str, object] = {
        "device": "press-1", "seq": 7, "issued": 1_000, "expires": 2_000, "model": "pump", "version": 3,
        "path": "bundles/pump/3.tar", "sha256": "a" * 64, "length": 1_024, "rollout": "r1",
    }  # fmt: skip
    return Assignment(**{**plain, **changes})  # type: ignore[arg-type]


def test_an_assignment_reads_back_and_its_bytes_are_canonical() -> None:
    signed = assignment_bytes(assignment())

    assert parse_assignment(signed) == assignment()
    assert signed == assignment_bytes(parse_assignment(signed))
    assert b" " not in signed
    assert signed.index(b'"device"') < signed.index(b'"version"')


@given(floor=st.integers(0, 20), now=st.integers(0, 3_000), device=st.sampled_from(["press-1", "press-2"]))
def test_an_assignment_is_accepted_only_by_its_device_in_its_time_and_not_below_the_floor(
    floor: int, now: int, device: str
) -> None:
    fits = device == "press-1" and floor <= 7 and now < 2_000

    with contextlib.nullcontext() if fits else pytest.raises(TrustError):
        check_assignment(assignment(), device=device, floor=floor, now=now)


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"device": "press-2"}, "trust.foreign"), ({"seq": 6}, "trust.rollback"), ({"expires": 1_500}, "trust.expired")],
)
def test_each_refusal_says_which_rule_was_broken(changes: dict[str, object], code: str) -> None:
    with pytest.raises(TrustError) as refused:
        check_assignment(assignment(**changes), device="press-1", floor=7, now=1_500)
    assert refused.value.code == code


@given(noise=st.binary(max_size=200))
def test_noise_is_no_assignment(noise: bytes) -> None:
    with pytest.raises(TrustError) as refused:
        parse_assignment(noise)
    assert refused.value.code == "trust.metadata"


@pytest.mark.parametrize("wrong", [{"seq": "7"}, {"seq": 7.5}, {"mode": "shadow"}, {"device": None}, {"length": None}])
def test_a_field_of_another_type_or_a_mode_we_do_not_know_is_refused(wrong: dict[str, object]) -> None:
    payload = msgspec.json.encode({**msgspec.to_builtins(assignment()), **wrong})

    with pytest.raises(TrustError) as refused:
        parse_assignment(payload)
    assert refused.value.code == "trust.metadata"


@pytest.mark.parametrize("payload", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"null", b"{}"])
def test_a_payload_made_to_hurt_the_parser_is_refused(payload: bytes) -> None:
    with pytest.raises(TrustError):
        parse_assignment(payload)
