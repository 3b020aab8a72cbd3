"""Companions before a real release repository over real TLS. Whatever becomes of them, what serves goes on."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from tests.agent.conftest import build
from tests.agent.link.field import Device, Field
from tests.agent.update.test_updater import committed

from lightship.storage.models import ModelVersion
from lightship_agent.contract.assignment import Beside
from lightship_agent.update.beside import BesideState
from lightship_agent.update.companions import FAILED, GONE, UP, WAITING
from lightship_agent.update.machine import PENALTY_SECONDS


def companion(version: ModelVersion, experiment: str = "e1", **changes: Any) -> Beside:
    facts: dict[str, Any] = {
        "experiment": experiment, "model": version.model, "version": version.version, "path": version.path,
        "sha256": version.digest, "length": version.length,
    }  # fmt: skip
    return Beside(**{**facts, **changes})


def told(field: Field, serves: ModelVersion, *beside: Beside, seq: int) -> None:
    """The director tells the device to serve that, and what to have beside it."""
    field.deliver("press-1", field.sign(field.assignment("press-1", serves, seq=seq, beside=beside)))


def state_of(device: Device) -> BesideState:
    return msgspec.json.decode((device.folder / "beside.json").read_bytes(), type=BesideState)


def serves_on(device: Device, champion: ModelVersion) -> None:
    """The champion was never touched, nor its state."""
    assert device.host.history == [champion.digest]
    state = device.updater.state
    assert (state.phase, state.current and state.current.sha256, state.penalties) == ("idle", champion.digest, {})


def held(device: Device) -> set[str]:
    return {p.stem for p in device.updater.store.bundles.iterdir()}


def beside_steps(device: Device) -> list[tuple[str, str]]:
    return [step for step in device.host.steps if step[0].startswith("beside-")]


def test_a_companion_is_fetched_tried_and_stands_beside_what_serves(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    told(field, first, one := companion(second), seq=5)

    assert device.look() == ""

    assert device.host.beside == {"e1": one}
    assert beside_steps(device) == [(UP, "")]
    assert held(device) == {first.digest, second.digest}
    assert state_of(device).proven == (second.digest,)
    serves_on(device, first)
    seen = len(field.server.seen)
    device.look()
    assert field.server.seen[seen:] == [("GET", "/v1/assignment", "")], "what is settled is not verified anew"


def test_a_device_without_companions_has_no_file_of_them(field: Field) -> None:
    device, first = committed(field)
    told(field, first, seq=5)

    device.look()

    assert not (device.folder / "beside.json").exists()


FALSE_CLAIMS: dict[str, dict[str, Any]] = {
    "a digest that is not the released one": {"sha256": "f" * 64},
    "a length that is not the released one": {"length": 17},
    "a path that was never released": {"path": "bundles/pump/9.tar"},
    "a path outside the release role": {"path": "../../etc/passwd"},
    "a transport file instead of a bundle": {"path": "bundles/pump/2.tar.zst"},
}


@pytest.mark.parametrize("claim", FALSE_CLAIMS.values(), ids=FALSE_CLAIMS)
def test_a_companion_that_the_release_plane_does_not_list_so_is_refused(field: Field, claim: dict[str, Any]) -> None:
    device, first = committed(field)
    told(field, first, companion(field.release(2), **claim), seq=5)

    assert device.look() == ""

    assert device.host.beside == {}
    assert beside_steps(device) == [(FAILED, "trust.not-released")]
    assert held(device) == {first.digest}
    assert field.server.asked(r"targets/.*2\.tar") == []
    serves_on(device, first)


def test_a_mode_that_this_agent_does_not_know_is_left_alone_and_the_others_run(field: Field) -> None:
    device, first = committed(field)
    second, third = field.release(2), field.release(3)
    told(field, first, companion(second, mode="canary"), two := companion(third, "e2", mode="ab", share=0.2), seq=5)

    device.look()

    assert device.host.beside == {"e2": two}
    assert (FAILED, "update.beside") in beside_steps(device)
    serves_on(device, first)


def test_a_companion_named_otherwise_than_its_manifest_is_refused(field: Field) -> None:
    device, first = committed(field)
    told(field, first, msgspec.structs.replace(companion(field.release(2)), version=7), seq=5)

    device.look()

    assert (device.host.beside, beside_steps(device)) == ({}, [(FAILED, "update.beside")])
    serves_on(device, first)


def test_a_companion_whose_golden_rows_disagree_fails_three_times_and_waits_a_day(field: Field) -> None:
    device, first = committed(field)
    told(field, first, companion(field.release(2, golden_shift=0.5)), seq=5)

    for _ in range(4):
        device.look()

    assert device.host.beside == {}
    assert beside_steps(device) == [(FAILED, "update.golden")], "said once"
    penalty = state_of(device).penalties["e1"]
    assert len(penalty.failed_at) == 3
    assert penalty.until - penalty.failed_at[-1] == PENALTY_SECONDS
    serves_on(device, first)


def test_a_companion_that_can_not_be_loaded_goes_out_and_another_stays(field: Field) -> None:
    device, first = committed(field)
    second, third = field.release(2), field.release(3)
    device.host.unloadable.add(second.digest)
    told(field, first, companion(second), two := companion(third, "e2"), seq=5)

    device.look()

    assert device.host.beside == {"e2": two}
    assert sorted(beside_steps(device)) == [(FAILED, "update.swap"), (UP, "")]
    serves_on(device, first)


def test_an_arm_whose_requests_fail_on_trial_is_taken_out(field: Field) -> None:
    device, first = committed(field, soak=900.0)
    told(field, first, companion(second := field.release(2), mode="ab", share=0.3), seq=5)
    device.look()
    device.host.failing.add(second.digest)

    device.updater._look_beside()

    assert device.host.beside == {}
    assert beside_steps(device)[-1] == (FAILED, "update.soak")
    serves_on(device, first)


def test_a_link_that_is_gone_costs_no_penalty_and_the_next_look_goes_on(field: Field) -> None:
    device, first = committed(field)
    told(field, first, one := companion(field.release(2)), seq=5)
    field.fault(r"targets/.*2\.tar", status=500)
    device.look()
    assert (device.host.beside, beside_steps(device)) == ({}, [(WAITING, "link.status")])
    assert state_of(device).penalties == {}
    field.well_again()

    device.look()

    assert device.host.beside == {"e1": one}
    serves_on(device, first)


def test_altered_bytes_on_the_way_are_refused(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2)
    told(field, first, companion(second), seq=5)
    field.published(second).write_bytes(b"x" * field.published(second).stat().st_size)

    device.look()

    assert device.host.beside == {}
    assert beside_steps(device) == [(FAILED, "trust.digest")]
    assert held(device) == {first.digest}
    serves_on(device, first)


def test_a_replayed_envelope_brings_no_companion_back(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2)
    told(field, first, companion(second), seq=5)
    old = field.envelope("press-1")
    device.look()
    told(field, first, seq=6)
    device.look()
    field.deliver("press-1", old)
    before = device.on_disk("tuf/")

    assert device.look() == "trust.rollback"

    assert device.host.beside == {}
    assert device.on_disk("tuf/") == before


def test_companions_in_a_forged_envelope_change_nothing(field: Field) -> None:
    device, first = committed(field)
    told(field, first, companion(field.release(2)), seq=5)
    field.deliver("press-1", json.dumps({**json.loads(field.envelope("press-1")), "signatures": []}).encode())
    before = device.on_disk("tuf/")

    assert device.look() == "trust.signature"

    assert (device.host.beside, device.on_disk("tuf/")) == ({}, before)


def test_what_is_stopped_is_gone_from_memory_and_disk(field: Field) -> None:
    device, first = committed(field)
    told(field, first, companion(field.release(2)), seq=5)
    device.look()
    told(field, first, seq=6)

    device.look()

    assert device.host.beside == {}
    assert beside_steps(device)[-1] == (GONE, "")
    assert held(device) == {first.digest}
    assert state_of(device).wanted == ()
    serves_on(device, first)


def test_a_companion_that_was_revoked_goes_out_with_the_next_whole_verification(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2)
    told(field, first, companion(second), seq=5)
    device.look()
    field.home.releases.revoke(second.path)
    device.updater._etag_until = 0.0

    device.look()

    assert device.host.beside == {}
    assert (FAILED, "trust.not-released") in beside_steps(device)
    serves_on(device, first)


def test_after_a_restart_it_stands_there_again_without_a_network(field: Field) -> None:
    device, first = committed(field)
    told(field, first, one := companion(field.release(2)), seq=5)
    device.look()
    device.updater.stop()
    field.fault(".", status=500)

    again = field.boot(device.identity)
    again.updater._look_beside()

    assert again.host.beside == {"e1": one}
    assert again.host.serving == first.digest


def test_three_cuts_while_it_is_on_trial_keep_it_out(field: Field) -> None:
    device, first = committed(field, soak=900.0)
    told(field, first, companion(field.release(2)), seq=5)
    device.look()
    assert state_of(device).trying == ("e1",)

    for _ in range(3):
        device = field.boot(device.identity, soak=900.0)  # nobody said stop: this is a cut
        device.updater._look_beside()

    assert (device.host.beside, state_of(device).trying) == ({}, ())
    assert device.host.serving == first.digest


def test_a_file_that_is_none_is_set_aside_and_the_next_assignment_brings_it_back(field: Field) -> None:
    device, first = committed(field)
    told(field, first, one := companion(field.release(2)), seq=5)
    device.look()
    (device.folder / "beside.json").write_bytes(b'{"wanted":')

    again = field.boot(device.identity)
    again.updater._look_beside()
    assert again.host.beside == {}
    again.look()

    assert again.host.beside == {"e1": one}
    assert (device.folder / "beside.json.broken").exists()


def test_a_shadow_that_is_promoted_is_not_downloaded_again(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    told(field, first, companion(second), seq=5)
    device.look()
    downloads = len(field.server.asked("targets"))
    told(field, second, seq=6)

    device.look()

    assert device.host.serving == second.digest
    assert device.host.beside == {}
    assert len(field.server.asked("targets")) == downloads
    assert held(device) == {first.digest, second.digest}


def test_an_update_that_fails_leaves_the_companions_where_they_are(field: Field) -> None:
    device, first = committed(field)
    one = companion(field.release(2))
    told(field, first, one, seq=5)
    device.look()
    told(field, field.release(3, golden_shift=0.5), one, seq=6)

    device.look()

    assert device.host.serving == first.digest
    assert device.host.beside == {"e1": one}
    assert ("failed", "update.golden") in device.host.steps


def test_another_share_is_taken_up_without_another_download_or_trial(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2)
    told(field, first, companion(second, mode="ab", share=0.1), seq=5)
    device.look()
    downloads = len(field.server.asked("targets"))
    told(field, first, more := companion(second, mode="ab", share=0.5), seq=6)

    device.look()

    assert device.host.beside == {"e1": more}
    assert len(field.server.asked("targets")) == downloads


def test_a_bundle_that_was_altered_on_disk_is_fetched_anew(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2)
    told(field, first, one := companion(second), seq=5)
    device.look()
    device.updater.store.path(second.digest).write_bytes(build(1))

    again = field.boot(device.identity)
    again.updater._look_beside()
    assert again.host.beside == {}
    again.look()

    assert again.host.beside == {"e1": one}
    assert again.updater.store.holds(second.digest)
