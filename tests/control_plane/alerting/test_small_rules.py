"""Routes, signatures, pauses and what counts as wrong: the small pure parts."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship.alerting import findings as f
from lightship.alerting import signature
from lightship.alerting.alertmanager import LIFE, entry
from lightship.alerting.courier import CAP_MS, LEAST_MS, jittered
from lightship.alerting.payload import Told
from lightship.alerting.routes import channels_for, parse
from lightship_agent.contract.codes import SettingsError

CHANNELS = ["webhook", "mail", "alertmanager"]
NOW = 1_800_000_000


def test_without_routes_everybody_hears_of_everything() -> None:
    assert channels_for(parse("", CHANNELS), CHANNELS, "warning", []) == CHANNELS


def test_routes_add_up_by_severity_and_group() -> None:
    routes = parse(" critical = webhook, mail ; warning/pumps=mail;*/fans*=alertmanager ;", CHANNELS)

    assert channels_for(routes, CHANNELS, "critical", ["pumps"]) == ["webhook", "mail"]
    assert channels_for(routes, CHANNELS, "warning", ["pumps", "other"]) == ["mail"]
    assert channels_for(routes, CHANNELS, "critical", ["fans-2"]) == CHANNELS
    assert channels_for(routes, CHANNELS, "warning", []) == []


@pytest.mark.parametrize("text", ["critical", "loud=mail", "critical=pager", "critical=mail,", "=mail", "a/b/c=mail"])
def test_routes_that_lead_nowhere_are_refused(text: str) -> None:
    with pytest.raises(SettingsError) as e:
        parse(text, CHANNELS)
    assert (e.value.code, "alert_routes" in str(e.value)) == ("settings.invalid", True)


@given(st.binary(max_size=200), st.binary(min_size=1, max_size=64), st.integers(-signature.WINDOW, signature.WINDOW))
def test_what_was_signed_lately_is_genuine(body: bytes, key: bytes, skew: int) -> None:
    assert signature.is_genuine(key, signature.headers(key, "a.1", body, NOW), body, NOW + skew)


@given(st.binary(max_size=60), st.data())
def test_what_was_changed_anywhere_is_not(body: bytes, data: st.DataObject) -> None:
    headers = signature.headers(b"key", "a.1", body, NOW)
    name = data.draw(st.sampled_from([*headers, "body", "key"]))
    if name == "body":
        assert not signature.is_genuine(b"key", headers, body + b"x", NOW)
    elif name == "key":
        assert not signature.is_genuine(b"other", headers, body, NOW)
    else:
        changed = {**headers, name: headers[name][:-1] + ("0" if headers[name][-1] != "0" else "1")}
        assert not signature.is_genuine(b"key", changed, body, NOW)


@pytest.mark.parametrize("late", [signature.WINDOW + 1, -signature.WINDOW - 1, 10**9])
def test_what_was_recorded_can_not_be_played_later(late: int) -> None:
    assert not signature.is_genuine(b"key", signature.headers(b"key", "a.1", b"{}", NOW), b"{}", NOW + late)


@pytest.mark.parametrize(
    "headers", [{}, {"webhook-timestamp": "soon"}, {"webhook-timestamp": str(NOW), "webhook-signature": "v1,ä v2,x"}]
)
def test_headers_that_are_none_are_not_genuine(headers: dict[str, str]) -> None:
    assert not signature.is_genuine(b"key", headers, b"{}", NOW)


def test_a_signature_among_several_is_enough_so_that_keys_can_change() -> None:
    headers = signature.headers(b"new", "a.1", b"{}", NOW)
    both = {**headers, "webhook-signature": f"v1,AAAA {headers['webhook-signature']}"}
    assert signature.is_genuine(b"new", both, b"{}", NOW)


def test_a_secret_of_the_specification_is_read_as_it_says() -> None:
    key = bytes(range(24))
    assert signature.key_of(b"whsec_" + base64.b64encode(key) + b"\n") == key
    assert signature.key_of(b" plain ") == b"plain"
    with pytest.raises(ValueError, match="."):
        signature.key_of(b"whsec_*")


@given(st.integers(1, 500), st.floats(0, 1, exclude_max=True))
def test_pauses_are_jittered_and_bounded(attempts: int, draw: float) -> None:
    assert LEAST_MS <= jittered(attempts, draw) <= CAP_MS


def test_a_device_is_silent_after_three_intervals_of_our_clock() -> None:
    heard = [f.Heard("a", "g", 0), f.Heard("b", "g", 10_000)]

    assert [x.subject for x in f.silent(heard, 180_001, -1, 60_000)] == ["a"]
    assert f.silent(heard, 180_000, -1, 60_000) == []


def test_while_we_have_not_listened_for_so_long_it_only_seems_silent() -> None:
    (found,) = f.silent([f.Heard("a", "g", 0)], 1_000_000, 900_000, 60_000)
    assert not found.sure


def test_dropped_reports_count_when_they_grow_and_not_at_the_first_look() -> None:
    first = f.grown({}, {"a": 5}, 100, first=True)
    again = f.grown(first, {"a": 5}, 200, first=False)
    more = f.grown(first, {"a": 6, "b": 1}, 300, first=False)

    assert first == {"a": f.Counted(5)}
    assert again == {}
    assert more == {"a": f.Counted(6, 300), "b": f.Counted(1, 300)}
    assert [x.subject for x in f.dropping({**first, **more}, {}, 400)] == ["a", "b"]
    assert f.dropping(more, {}, 300 + f.RECENT) == []


def test_certificates_are_told_of_before_and_after_their_end() -> None:
    day = f.DAY
    ends = [f.Ending("a", "g", 10 * day, day), f.Ending("b", "g", day - 1, day), f.Ending("c", "g", 0, day)]
    found = {x.subject: (x.severity, x.sentence) for x in f.ending([*ends, f.Ending("ca", "", day, 2 * day)], 0)}

    assert found == {
        "b": ("warning", "The certificate of b runs out in less than 1 day."),
        "c": ("critical", "The certificate of c has run out."),
        "ca": (
            "critical",
            "The certificate of this server (ca) runs out in less than 2 days. Plan a new certificate authority.",
        ),
    }


def test_a_device_that_is_degraded_by_its_data_alone_has_an_alarm_for_that() -> None:
    found = f.degraded([("a", "g", ["data.stuck"]), ("b", "g", ["storage.full", "data.stuck"]), ("c", "g", [])])
    assert [(x.subject, x.sentence) for x in found] == [("b", "b is degraded: storage.full.")]


def test_dead_letters_are_told_of_when_they_are_more_than_allowed() -> None:
    assert f.dead(20, 20) == []
    assert [x.severity for x in (*f.dead(21, 20), *f.dead(201, 20))] == ["warning", "critical"]


def test_a_worker_is_missed_after_two_minutes_and_not_while_we_have_just_begun() -> None:
    workers = [("ingest-0", 0), ("ingest-1", 10_000)]
    late = f.BEAT_LATE + 1

    assert [(x.subject, x.sure) for x in f.missing(workers, late, -1)] == [("ingest-0", True)]
    assert [(x.subject, x.sure) for x in f.missing(workers, late, late - 5_000)] == [("ingest-0", False)]
    assert f.missing(workers, f.BEAT_LATE, -1) == []


def test_an_alertmanager_hears_of_an_end_that_is_near_until_there_is_one() -> None:
    told = Told(
        id="x", kind="dead-letters", severity="ok", worst="critical", sentence="a\nb", count=1, grouped=False,
        devices=("ingest",), groups=("pumps",), opened_at=0, resolved_at=0, acknowledged_by="",
    )  # fmt: skip
    seen = entry(told, {"tenant": "t"}, 1_000)

    assert seen["labels"]["alertname"] == "LightshipDeadLetters"
    assert (seen["labels"]["severity"], seen["labels"]["group"], seen["labels"]["tenant"]) == ("critical", "pumps", "t")
    assert (seen["startsAt"], seen["endsAt"]) == ("1970-01-01T00:00:00.000+00:00", "1970-01-01T00:05:01.000+00:00")
    assert LIFE == 300_000
    assert seen["annotations"]["summary"] == "a b"
