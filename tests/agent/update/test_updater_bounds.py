"""The updater within what this device allows: hours, networks, room, the shorter way, and who stands before it."""

from __future__ import annotations

import os
import random
import time
from datetime import datetime
from pathlib import Path

import pytest
from tests.agent.conftest import build
from tests.agent.link.field import Device, Field
from tests.agent.update.test_updater import committed, failed
from tuf.api.metadata import TargetFile, Targets

from lightship.fleet import director
from lightship.registry import ceremonies
from lightship.release.changes import RoleKeys
from lightship.release.repository import RELEASES
from lightship.storage.models import AssignmentRow, ModelVersion
from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.codes import MediaError, UpdateError
from lightship_agent.contract.transport import delta_path, make_patch
from lightship_agent.link.client import Desired
from lightship_agent.update import machine as m
from lightship_agent.update import orders
from lightship_agent.update.check import CheckReply, CheckRequest, check
from lightship_agent.update.gate import Gate, Rules
from lightship_agent.update.rate import TokenBucket
from lightship_agent.update.released import ReleasedFile
from lightship_agent.update.steps import Delivery
from lightship_agent.update.store import BundleStore, StateFile
from lightship_agent.update.updater import VERIFY_EVERY, Bounds
from lightship_agent.update.windows import parse_windows


def downloads(field: Field) -> list[str]:
    """The release files that were asked for, in order."""
    return [path.rpartition("/")[2].partition(".")[2] for _, path, _ in field.server.asked("/targets/")]


# Hours, networks, vetoes ----------------------------------------------------------------------------------------------


class Site:
    """The wall clock and the rules of a site."""

    def __init__(self, folder: Path) -> None:
        self.hour = 12
        self.veto = folder / "veto"
        self.network = folder / "network"

    def now(self) -> datetime:
        return datetime(2026, 11, 25, self.hour, 0)  # noqa: DTZ001 - local, as somebody on site reads it

    def bounds(self, **rules: object) -> Bounds:
        return Bounds(gate=Gate(Rules(**rules), now=self.now))  # type: ignore[arg-type]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def waits(device: Device, old: ModelVersion, words: str) -> None:
    """Look: nothing happens, and the reason is reported."""
    device.look()
    assert device.host.steps[-1] == ("waiting", "update.deferred")
    assert device.host.serving == old.digest
    state = StateFile(device.folder).load()
    assert state.waiting is not None
    assert words in state.waiting.reason
    assert (state.phase, state.candidate, state.penalties) == ("idle", None, {})


def test_outside_its_window_nothing_is_downloaded_and_inside_it_is(field: Field, site: Site) -> None:
    night = site.bounds(download_window=parse_windows("22:00-06:00"))
    device, first = committed(field, bounds=night)
    second = field.release(2, flip=True)
    field.assign("press-1", second)

    waits(device, first, "closed until Wed 2026-11-25 22:00")

    assert downloads(field) == []
    site.hour = 23
    device.look()
    assert device.host.serving == second.digest
    assert StateFile(device.folder).load().waiting is None


def test_what_waits_is_said_once_and_costs_no_further_check(field: Field, site: Site) -> None:
    device, first = committed(field, bounds=site.bounds(install_window=parse_windows("22:00-06:00")))
    field.assign("press-1", field.release(2, flip=True))
    waits(device, first, "installations")
    said, asked = len(device.host.steps), len(field.server.asked("/metadata/"))

    for _ in range(3):
        device.look()

    assert len(device.host.steps) == said
    assert len(field.server.asked("/metadata/")) == asked


def test_a_carried_file_that_came_to_nothing_does_not_hide_what_waits_for_its_hour(
    field: Field, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, first = committed(field, bounds=site.bounds(download_window=parse_windows("22:00-06:00")))
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    replies: list[CheckReply] = []
    checked = device.updater._check
    monkeypatch.setattr(device.updater, "_check", lambda request: replies.append(checked(request)) or replies[-1])
    waits(device, first, "closed until")

    class PulledOut:
        def read(self, file: ReleasedFile, part: Path) -> bytes:
            raise MediaError("media.truncated", f"{file.path}, {part}: the stick is gone.")

    (reply,) = replies
    delivery = Delivery(PulledOut(), device.updater._ways(reply), gated=False)
    device.updater._take(reply, m.Target.of(reply.assignment, offline=True), delivery)
    assert device.host.serving == first.digest

    site.hour = 23
    device.look()
    assert device.host.serving == second.digest


def test_a_carried_file_that_is_refused_goes_whatever_else_waits_for_its_hour(field: Field, site: Site) -> None:
    device, first = committed(field, bounds=site.bounds(download_window=parse_windows("22:00-06:00")))
    field.assign("press-1", field.release(2, flip=True))
    waits(device, first, "closed until")
    carried = device.folder / "import" / f"0000000009-{'0' * 64}.media"
    carried.write_bytes(b"no media")

    device.updater._look_at_media()

    assert not carried.exists()


def test_what_is_no_file_is_no_order_and_nothing_carried_and_holds_nobody_up(field: Field) -> None:
    device, first = committed(field)
    os.mkfifo(device.folder / "orders" / "go-back")
    (device.folder / "orders" / "something").mkdir()
    os.mkfifo(device.folder / "import" / f"0000000009-{'0' * 64}.media")

    device.updater._look_at_orders()
    device.updater._look_at_media()
    device.updater.notice()

    assert device.host.history == [first.digest]
    assert not device.updater._poke.is_set()


def test_outside_its_install_window_a_bundle_is_downloaded_and_waits_in_the_store(field: Field, site: Site) -> None:
    device, first = committed(field, bounds=site.bounds(install_window=parse_windows("22:00-06:00")))
    second = field.release(2, flip=True)
    field.assign("press-1", second)

    waits(device, first, "installations")

    assert device.updater.store.holds(second.digest)
    site.hour = 23
    device.look()
    assert device.host.serving == second.digest
    assert downloads(field) == ["2.tar.zst"]


def test_a_restart_does_not_forget_that_it_was_said(field: Field, site: Site) -> None:
    bounds = site.bounds(install_window=parse_windows("22:00-06:00"))
    device, first = committed(field, bounds=bounds)
    field.assign("press-1", field.release(2, flip=True))
    waits(device, first, "installations")

    restarted = field.boot(device.identity, bounds=bounds)
    restarted.look()

    assert ("waiting", "update.deferred") not in restarted.host.steps


def test_on_a_metered_network_nothing_is_downloaded(field: Field, site: Site) -> None:
    site.network.write_text("cellular\n")
    rules = site.bounds(network_class_file=site.network, network_classes=frozenset({"ethernet", "wifi"}))
    device, first = committed(field, bounds=rules)
    second = field.release(2, flip=True)
    field.assign("press-1", second)

    waits(device, first, "cellular")

    assert downloads(field) == []
    site.network.write_text("wifi")
    device.look()
    assert device.host.serving == second.digest


def test_a_veto_file_keeps_the_old_model_and_its_words_are_reported(field: Field, site: Site) -> None:
    site.veto.write_text("inspection until noon")
    device, first = committed(field, bounds=site.bounds(veto_file=site.veto))
    second = field.release(2, flip=True)
    field.assign("press-1", second)

    waits(device, first, "inspection until noon")

    site.veto.unlink()
    device.look()
    assert device.host.serving == second.digest


def test_a_command_that_says_later_keeps_the_old_model(field: Field, site: Site) -> None:
    later = ("/bin/sh", "-c", "echo the press is running; exit 75")
    device, first = committed(field, bounds=site.bounds(veto_command=later))
    field.assign("press-1", field.release(2, flip=True))

    waits(device, first, "the press is running")


def test_a_newer_assignment_is_noticed_while_the_one_before_waits(field: Field, site: Site) -> None:
    device, first = committed(field, bounds=site.bounds(install_window=parse_windows("22:00-06:00")))
    field.assign("press-1", field.release(2, flip=True))
    waits(device, first, "installations")
    third = field.release(3)
    field.assign("press-1", third)

    device.look()

    assert device.updater.store.holds(third.digest)
    site.hour = 23
    device.look()
    assert device.host.serving == third.digest


# Bandwidth, and what is no longer wanted ------------------------------------------------------------------------------


def test_a_bandwidth_cap_is_kept(field: Field) -> None:
    device, _ = committed(field, bounds=Bounds(rate=TokenBucket(20_000, burst=1_000)))
    second = field.release(2, flip=True)
    size = field.published(second).stat().st_size
    field.assign("press-1", second)
    began = time.monotonic()

    device.look()

    assert device.host.serving == second.digest
    assert time.monotonic() - began >= (size - 1_000) / 20_000


def test_a_download_that_is_no_longer_wanted_is_given_up_for_what_is(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, first = committed(field, bounds=Bounds(rate=TokenBucket(1_000, burst=100)))
    second, third = field.release(2, flip=True), field.release(3)
    field.assign("press-1", second)
    updater = device.updater

    def superseded(_seconds: float) -> None:
        if updater.state.floor == 2 and not updater._poke.is_set():
            field.assign("press-1", third)
            updater.poke()

    monkeypatch.setattr(updater, "_pause", superseded)
    field.fault("/targets/", times=1, cut_after=100)

    device.look()

    assert device.host.steps[-1] == ("retry", "update.superseded")
    assert device.host.serving == first.digest
    assert updater.state.penalties == {}
    assert updater._poke.is_set(), "the next look follows at once"
    device.look()
    assert device.host.serving == third.digest
    assert list(updater.store.staging.iterdir()) == []


def test_a_poke_without_news_does_not_disturb_a_download(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = committed(field, bounds=Bounds(rate=TokenBucket(1_000, burst=100)))
    second = field.release(2, flip=True)
    field.assign("press-1", second)

    def poked(_seconds: float) -> None:
        device.updater.poke()

    monkeypatch.setattr(device.updater, "_pause", poked)

    device.look()

    assert device.host.serving == second.digest


# Room -----------------------------------------------------------------------------------------------------------------


def test_a_bundle_beyond_the_quota_is_refused_before_a_byte_of_it_comes(field: Field) -> None:
    device, first = committed(field, bounds=Bounds(store_bytes=len(build(1)) + 1_000))
    field.assign("press-1", field.release(2, flip=True))

    failed(field, device, first, "storage.quota")

    assert downloads(field) == []
    assert device.updater.store.holds(first.digest)


def test_what_has_come_of_a_bundle_is_not_asked_room_for_again(field: Field) -> None:
    """Else a link that dies on the way to a bundle that just fits would end its updates for good."""
    second = field.release(2, flip=True)
    (released,) = (r for r in field.home.releases.released() if r.sha256 == second.digest)
    (packed,) = field.home.releases.targets.rglob("*2.tar.zst")
    device, _ = committed(
        field, bounds=Bounds(store_bytes=len(build(1)) + released.length + released.transport_length + 100)
    )
    device.updater.store.part(second.digest).write_bytes(packed.read_bytes()[:-10])
    field.assign("press-1", second)

    device.look()

    assert device.host.serving == second.digest


def test_garbage_is_removed_for_room_and_never_what_runs_or_ran_before(field: Field) -> None:
    size = len(build(1))
    bounds = Bounds(store_bytes=5 * size)
    device, first = committed(field, bounds=bounds)
    second, third = field.release(2, flip=True), field.release(3)
    field.assign("press-1", second)
    device.look()
    device.updater.store.path("f" * 64).write_bytes(bytes(2 * size))
    field.assign("press-1", third)

    device.look()

    assert device.host.serving == third.digest
    assert sorted(p.stem for p in device.updater.store.bundles.iterdir()) == sorted([second.digest, third.digest])
    assert first.digest not in {p.stem for p in device.updater.store.bundles.iterdir()}


def test_garbage_stays_while_there_is_room(field: Field) -> None:
    device, _ = committed(field)
    other = device.updater.store.path("f" * 64)
    other.write_bytes(b"an older bundle")

    device.updater.store.make_room(1_000, m.kept(device.updater.state))

    assert other.exists()


# The shorter way ------------------------------------------------------------------------------------------------------


def publish_patch(field: Field, old: ModelVersion, new: ModelVersion, patch: bytes) -> None:
    """List a patch with the genuine release key."""
    repository = field.home.releases
    name = delta_path(new.model, old.digest, new.digest)
    with repository._lock():
        releases = repository._load(RELEASES, Targets)
        repository._store_target(name, patch)
        releases.signed.targets[name] = TargetFile.from_data(name, patch, ["sha256"])
        repository._commit(releases)


def test_a_patch_is_fetched_instead_of_the_whole(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    publish_patch(field, first, second, make_patch(build(1), build(2, flip=True)))
    field.assign("press-1", second)

    device.look()

    assert device.host.serving == second.digest
    assert [name.rpartition(".")[2] for name in downloads(field)] == ["zpatch"]
    assert list(device.updater.store.staging.iterdir()) == []


@pytest.mark.parametrize(
    "patch",
    [b"noise", make_patch(bytes(100) + build(2, flip=True), build(2, flip=True)), make_patch(build(1), build(3))],
    ids=["no-patch-at-all", "against-another-base", "to-another-bundle"],
)
def test_a_patch_that_does_not_make_the_signed_bundle_leads_to_the_whole(field: Field, patch: bytes) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    publish_patch(field, first, second, patch)
    field.assign("press-1", second)

    device.look()

    assert device.host.serving == second.digest
    assert [name.rpartition(".")[2] for name in downloads(field)] == ["zpatch", "zst"]
    assert list(device.updater.store.staging.iterdir()) == []


def test_a_patch_that_the_server_lost_leads_to_the_whole(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    publish_patch(field, first, second, make_patch(build(1), build(2, flip=True)))
    for path in field.home.releases.targets.rglob("*.zpatch"):
        path.unlink()
    field.assign("press-1", second)

    device.look()

    assert device.host.serving == second.digest


def test_a_patch_as_heavy_as_the_whole_is_not_worth_it(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    publish_patch(field, first, second, random.Random(1).randbytes(field.published(second).stat().st_size))
    field.assign("press-1", second)

    device.look()

    assert device.host.serving == second.digest
    assert downloads(field) == ["2.tar.zst"]


def test_a_link_that_dies_under_a_patch_is_not_taken_for_the_patch_s_fault(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda *_: 0.0)
    device, first = committed(field)
    second = field.release(2, flip=True)
    publish_patch(field, first, second, make_patch(build(1), build(2, flip=True)))
    field.assign("press-1", second)
    field.fault("/targets/", cut_after=10)

    failed(field, device, first, "link.unreachable")

    assert {name.rpartition(".")[2] for name in downloads(field)} == {"zpatch"}


# Who stands before the device -----------------------------------------------------------------------------------------


def boxed(field: Field) -> tuple[Device, ModelVersion, ModelVersion]:
    """A device whose assigned bundle failed three times."""
    device, first = committed(field)
    bad = field.release(2, golden_shift=0.01)
    field.assign("press-1", bad)
    for _ in range(3):
        device.look()
    assert device.updater.penalised == 1
    return device, first, bad


def test_an_order_empties_the_penalty_box_and_the_bundle_is_tried_again(field: Field) -> None:
    device, _, _ = boxed(field)
    order = orders.leave(device.folder, "clear-penalties")

    device.updater._look_at_orders()
    assert device.updater.penalised == 0
    device.look()

    assert not order.exists()
    assert [s for s in device.host.steps if s[0] == "failed"] == [("failed", "update.golden")] * 4


def test_a_signed_retry_empties_the_box_from_afar_and_an_ordinary_assignment_does_not(field: Field) -> None:
    device, _, bad = boxed(field)

    field.assign("press-1", bad)
    device.look()
    assert device.host.steps[-1] == ("refused", "update.penalty")

    with field.home.database.write() as session:
        director.assign(
            session, field.home.keys, device="press-1", version=bad, rollout="", actor="test", retry=True
        )  # fmt: skip
    device.look()
    assert device.host.steps[-1] == ("failed", "update.golden")


def test_somebody_at_the_device_goes_back_at_once_and_what_he_left_waits(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    device.look()
    orders.leave(device.folder, "go-back", "it reads every 7 as a 1")

    device.updater._look_at_orders()

    assert device.host.serving == first.digest
    assert device.host.steps[-1] == ("failed", "update.went-back")
    device.look()
    assert device.host.serving == first.digest, "the server still assigns what was left"
    assert field.boot(device.identity).host.serving == first.digest
    third = field.release(3)
    field.assign("press-1", third)
    device.look()
    assert device.host.serving == third.digest


def test_an_order_to_go_back_that_a_cut_left_behind_is_not_carried_out_a_second_time(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going back twice is being where one was."""
    device, first = committed(field)
    field.assign("press-1", field.release(2, flip=True))
    device.look()
    order = orders.leave(device.folder, "go-back", "it reads every 7 as a 1")
    with monkeypatch.context() as cut:
        cut.setattr(orders, "done", lambda _order: None)
        device.updater._look_at_orders()
    assert order.exists()

    again = field.boot(device.identity)
    again.updater._look_at_orders()

    assert again.host.serving == first.digest
    assert [p.name for p in order.parent.iterdir()] == []


def test_an_order_to_go_back_that_was_cut_before_anything_came_of_it_is_carried_out(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    device.look()
    orders.leave(device.folder, "go-back", "it reads every 7 as a 1")
    orders.begun(orders.waiting(device.folder)[0], second.digest)

    again = field.boot(device.identity)
    again.updater._look_at_orders()

    assert again.host.serving == first.digest
    assert orders.waiting(device.folder) == []


def test_the_note_of_an_order_that_was_carried_out_does_not_stand_in_the_way_of_the_next(field: Field) -> None:
    device, first = committed(field)
    field.assign("press-1", field.release(2, flip=True))
    device.look()
    (device.folder / "orders" / ".go-back.begun").write_text("0" * 64)

    again = field.boot(device.identity)
    orders.leave(device.folder, "go-back", "")
    again.updater._look_at_orders()

    assert again.host.serving == first.digest


def test_without_a_version_before_it_nothing_is_gone_back_to(field: Field) -> None:
    device, first = committed(field)
    before = device.on_disk("orders/")
    orders.leave(device.folder, "go-back", "why not")

    device.updater._look_at_orders()

    assert device.host.history == [first.digest]
    assert device.on_disk() == before


def test_a_thief_who_drove_seq_to_the_sky_is_recovered_from_by_a_new_director_key(field: Field) -> None:
    device, first = committed(field)
    field.assign("press-1", first)
    device.look()
    old = device.updater.state.director
    with field.home.database.write() as session:
        row = session.get(AssignmentRow, "press-1")
        assert row is not None
        row.seq = 2**40
    field.assign("press-1", first)
    assert device.look() == ""
    with field.home.database.write() as session:
        row = session.get(AssignmentRow, "press-1")
        assert row is not None
        row.seq = 3
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    assert device.look() == "trust.rollback"
    assert device.host.serving == first.digest

    fresh = RoleKeys.of([field.home.keys.add("director").public_key])
    ceremonies.finish(
        field.home, [ceremonies.begin(field.home, "Rotate", {"director": fresh}, actor="test")], actor="test"
    )
    field.assign("press-1", second)

    assert device.look() == ""
    assert device.host.serving == second.digest
    state = StateFile(device.folder).load()
    assert (state.floor, state.director != old) == (5, True)


def test_an_order_that_nobody_knows_changes_nothing(field: Field) -> None:
    device, first = committed(field)
    before = device.on_disk()
    (device.folder / "orders" / "format-disk").write_text("please")

    device.updater._look_at_orders()

    assert device.host.history == [first.digest]
    assert device.on_disk() == before


def test_an_order_left_while_no_agent_ran_is_taken_by_the_next(field: Field) -> None:
    device, _, _ = boxed(field)
    orders.leave(device.folder, "clear-penalties")

    restarted = field.boot(device.identity)
    assert orders.anything(device.folder)
    restarted.updater._look_at_orders()

    assert restarted.updater.state.penalties == {}
    assert not orders.anything(device.folder)


def test_where_neither_version_can_be_read_the_failed_one_does_not_go_on_answering(field: Field) -> None:
    device, first = committed(field)
    second = field.release(2, flip=True)
    device.host.failing = {second.digest}
    field.assign("press-1", second)
    really = device.host.serve

    def lose_the_old_one(bundle: Bundle) -> None:
        really(bundle)
        device.updater.store.path(first.digest).unlink(missing_ok=True)

    device.host.serve = lose_the_old_one  # type: ignore[method-assign]

    device.look()

    assert device.host.history[-2:] == [second.digest, None]


# Time -----------------------------------------------------------------------------------------------------------------


def test_what_is_settled_is_verified_anew_once_a_day(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    device, first = committed(field)
    asked = len(field.server.asked("/metadata/"))
    device.look()
    assert len(field.server.asked("/metadata/")) == asked
    tomorrow = time.time() + VERIFY_EVERY + 60

    monkeypatch.setattr(time, "time", lambda: tomorrow)
    device.look()

    assert len(field.server.asked("/metadata/")) > asked
    assert device.host.history == [first.digest]
    assert device.host.steps == []
    assert set(device.updater.metadata_expires) >= {"root", "timestamp", "snapshot", "targets", "releases"}


def test_a_device_that_wakes_in_1970_knows_from_its_server_that_it_is_not(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, _ = committed(field)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: 1_000.0)

    restarted = field.boot(device.identity)
    restarted.look()

    assert restarted.updater.clock.now() > now - 86_400


def test_the_clock_is_taken_from_nobody_who_is_not_verified(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = committed(field)
    before = device.updater.clock.now()
    forged = field.sign(field.assignment("press-2", field.release(2), issued=int(before) + 40_000_000))
    field.deliver("press-1", forged)

    assert device.look() == "trust.foreign"

    assert device.updater.clock.now() - before < 3_600


# The child ------------------------------------------------------------------------------------------------------------


def test_by_default_an_assignment_is_checked_in_a_process_that_ends(field: Field) -> None:
    device = field.device(check=None)
    first = field.release(1)
    field.assign("press-1", first)

    device.look()

    assert device.host.serving == first.digest


def test_a_check_that_dies_is_no_verdict_and_changes_nothing(field: Field) -> None:
    def dies(_: CheckRequest) -> CheckReply:
        raise UpdateError("update.check-failed", "The checking process died of SIGSEGV: it said nothing.")

    device, first = committed(field)
    restarted = field.boot(device.identity, check=dies)
    field.assign("press-1", field.release(2, flip=True))
    before = restarted.on_disk()

    assert restarted.look() == "update.check-failed"

    assert restarted.host.history == [first.digest]
    assert restarted.on_disk() == before
    assert field.boot(device.identity, check=check).look() == ""


def test_an_answer_without_a_date_is_an_answer(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    device, first = committed(field)
    monkeypatch.setattr(device.control, "desired", lambda _: Desired(None))

    assert device.look() == ""
    assert device.host.history == [first.digest]
    assert BundleStore(device.folder).holds(first.digest)
