"""The outbox: nothing is lost that was promised, nothing is numbered twice, and serving never waits for it."""

from __future__ import annotations

import errno
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.agent.link.field import Field

from lightship.monitoring import ingest
from lightship.storage.models import DeviceEpoch
from lightship_agent.contract.messages import AnyRecord, Envelope, Heartbeat, Window
from lightship_agent.contract.wire import MAX_PACKED, encode
from lightship_agent.link import outbox as whole
from lightship_agent.link import ring as module
from lightship_agent.link.outbox import Outbox

PLENTY = 10_000_000


def beats(n: int, words: str = "") -> list[AnyRecord]:
    return [Heartbeat(s=1, t=i, agent=words) for i in range(n)]


def opened(folder: Path, limit: int = PLENTY) -> Outbox:
    return Outbox(folder / "outbox", limit_bytes=limit)


def held(outbox: Outbox) -> list[int]:
    return [record.s for record in outbox.read(outbox.epoch, 0, 1_000_000)[1]]


def bytes_on_disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*.seg"))


# Stories --------------------------------------------------------------------------------------------------------------


def test_records_are_numbered_from_one_and_outlive_a_restart(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.append(beats(3))
    first.append(beats(2))

    again = opened(tmp_path)

    assert (again.epoch, held(again), again.last, again.depth) == (first.epoch, [1, 2, 3, 4, 5], 5, 5)
    again.append(beats(1))
    assert held(again)[-1] == 6


def test_records_say_what_their_times_were_worth_when_they_were_written(tmp_path: Path) -> None:
    worth: list[Any] = [0]
    outbox = Outbox(tmp_path / "outbox", limit_bytes=PLENTY, quality=lambda: worth[0])
    outbox.append(beats(2))
    worth[0] = 2
    outbox.append(beats(1))
    assert [record.q for record in outbox.read(outbox.epoch, 0, 10)[1]] == [0, 0, 2]


def test_only_the_acknowledgement_of_the_server_lets_records_go(tmp_path: Path) -> None:
    outbox = opened(tmp_path)
    outbox.append(beats(5))
    outbox.read(outbox.epoch, 0, 5)

    outbox.acknowledge(outbox.epoch, 3)

    assert (held(outbox), outbox.acked) == ([4, 5], 3)


@pytest.mark.parametrize("said", [("", 0), ("f" * 16, 5), ("", 5)])
def test_an_acknowledgement_of_another_epoch_is_none(tmp_path: Path, said: tuple[str, int]) -> None:
    outbox = opened(tmp_path)
    outbox.append(beats(5))

    outbox.acknowledge(*said)

    assert held(outbox) == [1, 2, 3, 4, 5]


def test_an_older_or_absurd_acknowledgement_changes_nothing(tmp_path: Path) -> None:
    outbox = opened(tmp_path)
    outbox.append(beats(5))
    outbox.acknowledge(outbox.epoch, 4)

    for seq in (2, -1, 2**70):
        outbox.acknowledge(outbox.epoch, seq)

    assert (held(outbox), outbox.acked) == ([5], 4)
    outbox.append(beats(1))
    assert held(outbox) == [5, 6]


def test_numbers_go_on_after_everything_was_acknowledged_and_the_agent_restarted(tmp_path: Path) -> None:
    outbox = opened(tmp_path)
    for _ in range(40):
        outbox.append(beats(100, "x" * 60))
    outbox.acknowledge(outbox.epoch, outbox.last)
    assert len(list(tmp_path.rglob("*.seg"))) == 1

    again = opened(tmp_path)
    again.append(beats(1))

    assert again.read(again.epoch, outbox.last, 10)[1][0].s == 4_001


def test_a_full_ring_drops_the_oldest_and_counts_them(tmp_path: Path) -> None:
    outbox = opened(tmp_path, limit=2 * module.SEGMENT_BYTES)
    total = 0
    while outbox.dropped == 0:
        outbox.append(beats(200, "x" * 60))
        total += 200

    seqs = held(outbox)
    assert seqs == list(range(outbox.dropped + 1, total + 1))
    assert outbox.read(outbox.epoch, 0, 1)[0] == outbox.dropped + 1
    assert bytes_on_disk(tmp_path) <= 3 * module.SEGMENT_BYTES + 100_000


def test_folders_and_files_of_others_are_left_alone(tmp_path: Path) -> None:
    strangers = tmp_path / "outbox" / "lost+found"
    strangers.mkdir(parents=True)
    (strangers / "1.seg").write_bytes(b"not ours")
    outbox = opened(tmp_path)
    outbox.append(beats(2))
    (tmp_path / "outbox" / outbox.epoch / "notes.seg").write_bytes(b"not ours")

    again = opened(tmp_path, limit=1)
    again.append(beats(2))
    again.acknowledge(again.epoch, 4)

    assert (again.epoch, again.in_memory) == (outbox.epoch, False)
    assert (strangers / "1.seg").read_bytes() == b"not ours"


def test_a_record_of_a_later_agent_ends_the_segment_and_not_the_agent(tmp_path: Path) -> None:
    outbox = opened(tmp_path)
    outbox.append(beats(2))
    (segment,) = tmp_path.rglob("*.seg")
    with segment.open("r+b") as f:
        f.seek(len(segment.read_bytes().rstrip(b"\0")))
        f.write(module._frame(3, encode({"k": "telepathy", "s": 3, "t": 1})))

    again = opened(tmp_path)

    assert held(again) == [1, 2]
    again.append(beats(1))
    assert held(again) == [1, 2, 4]
    again.acknowledge(again.epoch, 2)
    assert again.read(again.epoch, 2, 10)[0] == 4  # it is given up, and not waited for
    assert again.dropped == 1


def test_a_record_that_fits_no_message_is_not_kept_and_is_counted(tmp_path: Path) -> None:
    chance = random.Random(1)
    noise = tuple(chance.randrange(2**50) for _ in range(MAX_PACKED // 7))
    giant = Window(
        s=1, t=1, model="m", version=1, digest="a" * 64, schema="a" * 64, w=1, opened=1, rows=1, counts=noise
    )
    outbox = opened(tmp_path)

    outbox.append([*beats(1), giant, *beats(1)])

    assert held(outbox) == [1, 2]
    assert outbox.dropped == 1


# A model of it --------------------------------------------------------------------------------------------------------


class AgainstAModel(RuleBasedStateMachine):
    """What is held, numbered and acknowledged, against a list."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path("/tmp") / f"outbox-{secrets.token_hex(8)}"
        self.folder.mkdir()
        self.outbox = opened(self.folder)
        self.epoch = self.outbox.epoch
        self.expected: list[int] = []
        self.last = 0

    @rule(n=st.integers(0, 5))
    def append(self, n: int) -> None:
        self.outbox.append(beats(n))
        self.expected += range(self.last + 1, self.last + n + 1)
        self.last += n

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        seq = data.draw(st.integers(0, self.last))
        self.outbox.acknowledge(self.epoch, seq)
        self.expected = [s for s in self.expected if s > seq]

    @rule(seq=st.integers(0, 50), epoch=st.sampled_from(["", "0" * 16]))
    def acknowledge_another_epoch(self, seq: int, epoch: str) -> None:
        self.outbox.acknowledge(epoch, seq)

    @rule()
    def restart(self) -> None:
        self.outbox = opened(self.folder)
        # What was acknowledged may come again, for it may still lie in the newest segment; the server skips it.
        kept = held(self.outbox)
        assert kept[len(kept) - len(self.expected) :] == self.expected
        self.expected = kept

    @rule(noise=st.binary(min_size=1, max_size=40))
    def restart_after_a_torn_write(self, noise: bytes) -> None:
        segments = sorted(self.folder.rglob("*.seg"))
        if segments:
            with segments[-1].open("r+b") as f:
                f.seek(len(segments[-1].read_bytes().rstrip(b"\0")))
                f.write(noise)
        self.restart()

    @invariant()
    def holds_what_it_should(self) -> None:
        if not hasattr(self, "outbox"):
            return
        assert held(self.outbox) == self.expected
        assert self.outbox.depth == len(self.expected)
        assert (self.outbox.epoch, self.outbox.last, self.outbox.in_memory) == (self.epoch, self.last, False)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


AgainstAModel.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestOutboxAgainstAModel = AgainstAModel.TestCase


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 600), flip=st.none() | st.integers(0, 599), noise=st.binary(max_size=30))
def test_any_torn_or_damaged_tail_leaves_a_prefix(cut: int, flip: int | None, noise: bytes) -> None:
    folder = Path("/tmp") / f"outbox-{secrets.token_hex(8)}"
    try:
        opened(folder).append(beats(10, "words"))
        (segment,) = folder.rglob("*.seg")
        data = bytearray(segment.read_bytes()[:cut] + noise)
        if flip is not None and flip < len(data):
            data[flip] ^= 0xFF
        segment.write_bytes(bytes(data))

        again = opened(folder)

        seqs = held(again)
        assert seqs == list(range(1, len(seqs) + 1))
        again.append(beats(1))
        assert held(opened(folder)) == [*seqs, len(seqs) + 1]
    finally:
        shutil.rmtree(folder)


# Kills ----------------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from lightship_agent.contract.messages import Heartbeat
from lightship_agent.link.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]), limit_bytes=10_000_000)
while True:
    outbox.append([Heartbeat(s=1, t=1, agent="x" * 50) for _ in range(7)])
    print(outbox.epoch, outbox.last, flush=True)
"""


def test_a_process_killed_while_writing_loses_nothing_it_had_promised(tmp_path: Path) -> None:
    chance = random.Random(20)
    home = str(Path(whole.__file__).parents[2])
    promised, epochs = 0, set()
    for _ in range(20):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "outbox")], stdout=subprocess.PIPE, env={"PYTHONPATH": home}
        )
        assert writer.stdout is not None
        line = writer.stdout.readline()
        time.sleep(chance.uniform(0, 0.02))
        writer.send_signal(signal.SIGKILL)
        said = [line, *writer.stdout.read().splitlines(keepends=True)]
        writer.stdout.close()
        writer.wait()
        epoch, last = [x for x in said if x.endswith(b"\n")][-1].split()
        assert int(last) > promised
        promised = int(last)
        epochs.add(epoch)

        found = opened(tmp_path)

        # Every promised record, in order, without a hole; a batch cut in the middle may add a few.
        assert held(found) == list(range(1, found.last + 1))
        assert promised <= found.last <= promised + 7
        assert not found.in_memory
        promised = found.last
    assert len(epochs) == 1


# Disks that refuse ----------------------------------------------------------------------------------------------------


def refuse_writes(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSPC) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", refuse)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_makes_the_outbox_go_on_in_memory_and_what_is_on_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    outbox = opened(tmp_path)
    outbox.append(beats(3))
    disk = outbox.epoch
    outbox.acknowledge(disk, 1)
    refuse_writes(monkeypatch, number)

    outbox.append(beats(2))
    outbox.append(beats(1))

    assert outbox.in_memory
    assert outbox.epoch != disk
    assert held(outbox) == [1, 2, 3]
    assert [r.s for r in outbox.read(disk, 0, 10)[1]] == [2, 3]
    assert (outbox.depth, outbox.dropped) == (5, 0)
    monkeypatch.undo()
    assert held(opened(tmp_path))[-2:] == [2, 3]


def test_a_disk_that_takes_records_again_is_used_again_and_memory_is_sent_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_000.0]
    outbox = Outbox(tmp_path / "outbox", limit_bytes=PLENTY, clock=lambda: now[0])
    outbox.append(beats(3))
    disk = outbox.epoch
    with monkeypatch.context() as patched:
        refuse_writes(patched)
        outbox.append(beats(2))
        memory = outbox.epoch
        now[0] += whole.RETRY_DISK_SECONDS
        outbox.append(beats(1))
        assert outbox.in_memory
    now[0] += whole.RETRY_DISK_SECONDS - 1
    outbox.append(beats(1))
    assert outbox.in_memory
    now[0] += 1

    outbox.append(beats(1))

    assert (outbox.in_memory, outbox.epoch, held(outbox)) == (False, disk, [1, 2, 3, 4])
    assert [ring.epoch for ring in outbox.rings()] == [memory, disk]
    outbox.acknowledge(memory, 4)
    assert [ring.epoch for ring in outbox.rings()] == [disk]


def test_reports_share_a_sync_and_events_get_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    now = [1_000.0]
    reports = Outbox(tmp_path / "reports", limit_bytes=PLENTY, clock=lambda: now[0])
    events = Outbox(tmp_path / "events", limit_bytes=PLENTY, at_once=True)
    for _ in range(whole.SYNC_RECORDS - 1):
        reports.append(beats(1))
    assert synced == []
    reports.append(beats(1))
    assert len(synced) == 1
    reports.append(beats(1))
    now[0] += whole.SYNC_SECONDS
    reports.tick()
    assert len(synced) == 2
    reports.append(beats(1))
    held(reports)  # what is given out to be sent is durable
    assert len(synced) == 3
    for _ in range(3):
        events.append(beats(1))
    assert len(synced) == 6


def test_a_segment_is_used_again_and_what_it_held_before_is_not_read(tmp_path: Path) -> None:
    outbox = opened(tmp_path)
    for _ in range(60):
        outbox.append(beats(100, "x" * 60))
        outbox.acknowledge(outbox.epoch, outbox.last - 50)
    home = tmp_path / "outbox" / outbox.epoch
    assert len(list(home.iterdir())) <= 4  # one or two segments, the spare one, the hint

    again = opened(tmp_path)

    assert held(again) == list(range(outbox.last - 49, outbox.last + 1))
    again.append(beats(1))
    assert held(opened(tmp_path))[-1] == outbox.last + 1


def test_a_restart_sends_little_again(tmp_path: Path) -> None:
    outbox = opened(tmp_path)
    outbox.append(beats(300))
    outbox.acknowledge(outbox.epoch, 290)
    assert held(opened(tmp_path)) == list(range(291, 301))
    (tmp_path / "outbox" / outbox.epoch / "acked").write_bytes(b"torn")
    assert len(held(opened(tmp_path))) == 300  # the server skips what it has


def test_a_ring_of_an_earlier_agent_is_opened_and_carried_on(tmp_path: Path) -> None:
    """It wrote segments record by record, to whatever size they got, and kept no hint."""
    home = tmp_path / "outbox" / ("a" * 16)
    home.mkdir(parents=True)
    for first in (1, 4):
        frames = [module._frame(s, encode(Heartbeat(s=s, t=s))) for s in range(first, first + 3)]
        (home / f"{first:020d}.seg").write_bytes(b"".join(frames))

    outbox = opened(tmp_path)

    assert (outbox.epoch, held(outbox)) == ("a" * 16, [1, 2, 3, 4, 5, 6])
    outbox.append(beats(2))
    outbox.acknowledge(outbox.epoch, 5)
    assert held(opened(tmp_path)) == [6, 7, 8]


def test_memory_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = opened(tmp_path)
    refuse_writes(monkeypatch)

    outbox.append(beats(2_500))

    assert (outbox.depth, outbox.dropped) == (2_000, 500)
    assert outbox.read(outbox.epoch, 0, 1)[0] == 501


def test_a_folder_that_cannot_be_made_is_no_reason_not_to_start(tmp_path: Path) -> None:
    (tmp_path / "outbox").write_bytes(b"a file where a folder should be")

    outbox = opened(tmp_path)
    outbox.append(beats(2))

    assert outbox.in_memory
    assert len(outbox.epoch) == 16
    assert held(outbox) == [1, 2]


def test_no_number_is_given_out_twice_after_a_time_in_memory(
    field: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field.enrolled("press-1")
    stored: list[list[tuple[str, int]]] = []  # and its length is the server's clock

    def deliver(outbox: Outbox, after: int = 0) -> None:
        oldest, records = outbox.read(outbox.epoch, after, 100)
        envelope = Envelope(e=outbox.epoch, b=1, us=1, lo=oldest, r=records)
        with field.home.database.write() as session:
            assert ingest.receive(session, "press-1", "tele", encode(envelope), len(stored)).code == ""
            epoch, _, seq = ingest.acknowledged(session, "press-1").partition(":")
            stored.append([(c.epoch, c.next_seq) for c in session.query(DeviceEpoch)])
        outbox.acknowledge(epoch, int(seq))

    outbox = opened(tmp_path)
    outbox.append(beats(3))
    deliver(outbox)
    with monkeypatch.context() as patched:
        refuse_writes(patched)
        outbox.append(beats(4))
        deliver(outbox)
    assert outbox.depth == 0

    again = opened(tmp_path)
    again.append(beats(2))
    deliver(again)

    # Each of the two new records was stored as news, not taken for one of those that had been sent from memory.
    assert again.depth == 0
    assert sum(seq - 1 for _, seq in stored[-1]) == 3 + 4 + 2


def test_numbers_the_server_has_seen_and_the_disk_has_lost_are_not_used_again(tmp_path: Path) -> None:
    outbox = opened(tmp_path)
    outbox.append(beats(10))
    (segment,) = tmp_path.rglob("*.seg")
    os.truncate(segment, len(segment.read_bytes().rstrip(b"\0")) // 2)
    again = opened(tmp_path)
    assert again.last < 10

    again.acknowledge(again.epoch, 10)
    again.append(beats(1))

    assert held(again) == [11]
    assert held(opened(tmp_path))[-1] == 11


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    beat = Heartbeat(s=1, t=5, q=2, agent="0.1", health={"cpu": 0.5})
    outbox = opened(tmp_path)
    outbox.append([beat])

    (read,) = (again := opened(tmp_path)).read(again.epoch, 0, 1)[1]

    assert read == msgspec.structs.replace(beat, s=1)
