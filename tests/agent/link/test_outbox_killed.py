"""Two hundred kills, torn tails and a disk that refuses: nothing is lost that the outbox had promised to keep."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightship_agent.link import outbox as module
from lightship_agent.link.outbox import Outbox

KILLS = 200
#: Below a segment: no new one can be made, and old ones can't be written beyond it.
SMALL = 100_000

# One interpreter forks a writer for each line it is given: the greatest file it may write, or 0.
WRITERS = """
import os, resource, sys
from pathlib import Path
from lightship_agent.contract.messages import Heartbeat
from lightship_agent.link.outbox import Outbox
for line in sys.stdin:
    limit, pid = int(line), os.fork()
    if pid == 0:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        outbox = Outbox(Path(sys.argv[1]), limit_bytes=20_000_000, at_once=True)
        while True:
            outbox.append([Heartbeat(s=1, t=1, agent="x" * 60, health={f"m{n}": 1.5 for n in range(20)})] * 3)
            said = "memory" if outbox.in_memory else f"{outbox.epoch} {outbox.last}"
            os.write(1, f"{said}\\n".encode())
    os.write(1, f"pid {pid}\\n".encode())
    os.waitpid(pid, 0)
    os.write(1, b"end\\n")
"""


def tear(folder: Path, chance: random.Random) -> None:
    """What a write leaves that was cut off, behind the last whole record."""
    newest = max(folder.rglob("*.seg"))
    with newest.open("r+b") as f:
        f.seek(len(newest.read_bytes().rstrip(b"\0")))
        f.write(bytes(chance.randrange(1, 256) for _ in range(chance.randrange(1, 400))))


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing_that_was_promised(tmp_path: Path) -> None:
    chance, folder = random.Random(200), tmp_path / "outbox"
    home = str(Path(module.__file__).parents[2])
    writers = subprocess.Popen(
        [sys.executable, "-c", WRITERS, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": home}, text=True, bufsize=1,
    )  # fmt: skip
    assert writers.stdin is not None
    assert writers.stdout is not None
    promised, refused, epochs, opened = 0, 0, set[str](), []
    for n in range(KILLS):
        writers.stdin.write(f"{SMALL if n % 5 == 4 else 0}\n")
        said: list[str] = []
        pid = 0
        while not pid or len(said) < 1:
            line = writers.stdout.readline().strip()
            if line.startswith("pid "):
                pid = int(line[4:])
            else:
                said.append(line)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        while (line := writers.stdout.readline().strip()) != "end":
            said.append(line)
        refused += said.count("memory") > 0
        kept = [line.split() for line in said if line != "memory" and line.count(" ") == 1]
        epochs |= {epoch for epoch, _ in kept}
        promised = max([promised, *(int(last) for _, last in kept)])
        if n % 3:
            tear(folder, chance)

        began = time.process_time()
        found = Outbox(folder, limit_bytes=20_000_000)
        opened.append(time.process_time() - began)

        assert not found.in_memory
        assert promised <= found.last <= promised + 3
        first, records = found.read(found.epoch, found.last - 200, 10_000)
        assert [r.s for r in records] == list(range(max(first, found.last - 199), found.last + 1))
        promised = found.last
        found.close()
    writers.stdin.close()
    writers.stdout.close()
    writers.wait(60)
    everything = Outbox(folder, limit_bytes=20_000_000)
    assert [r.s for r in everything.read(everything.epoch, 0, 10**9)[1]] == list(range(1, promised + 1))
    assert len(epochs) == 1
    assert refused >= KILLS // 10
    assert sorted(opened)[KILLS // 2] < 0.05
    print(f"{KILLS} kills, {refused} times refused, {promised} records, opened in {1e3 * sorted(opened)[-1]:.1f} ms")
