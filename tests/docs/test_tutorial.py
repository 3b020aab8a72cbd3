"""The tutorial is followed word for word: its files are written, its commands typed, its programs started.

How blocks are marked: `file=NAME` is written; `console` runs and must succeed; `console fails` must not;
`console background` is started in a terminal of its own and goes on; `console retry` is repeated until what is
expected is there; `console skip` is for a fresh clone, which this is not. In expected lines `…` stands for anything, an
eight-digit id for whichever id there was, and runs of spaces for one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from tests.docs.fences import ROOT, Block, Command, blocks

from lightship.fleet.broker import free_port

PORTS = ("8600", "8643", "8883", "8501", "8502")
ID = re.compile(r"\b[0-9a-f]{8}\b")
PATIENCE = 300.0  # seconds until a repeated command shows what is expected


@pytest.mark.slow
def test_the_tutorial_works_word_for_word(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    try:
        for block in blocks(ROOT / "docs" / "tutorial.md"):
            reader.follow(block)
    finally:
        left = reader.stop()
    assert left == [], "programs that did not end when they were asked to"


class Reader:
    """Somebody who follows the tutorial in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids: dict[str, str] = {}
        self.programs: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("LIGHTSHIP_")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PYTHONUNBUFFERED": "1",
            "LIGHTSHIP_API_PORT": self.ports["8600"],
            "LIGHTSHIP_DEVICE_PORT": self.ports["8643"],
            "LIGHTSHIP_MQTT_PORT": self.ports["8883"],
        }

    def follow(self, block: Block) -> None:
        if block.file:
            (self.folder / block.file).write_text(self.translate(block.body), encoding="utf-8")
        if block.language != "console" or "skip" in block.words:
            return
        how: Callable[[Command], None] = self.run
        how = self.start if "background" in block.words else how
        how = self.refuse if "fails" in block.words else how
        how = self.repeat if "retry" in block.words else how
        for command in block.commands:
            how(command)

    def run(self, command: Command) -> None:
        status, said = self.type(command.text)
        assert status == 0, f"$ {command.text}\n{said}\nexit {status}"
        self.compare(command, said)

    def refuse(self, command: Command) -> None:
        status, said = self.type(command.text)
        assert status not in (0, 1), f"$ {command.text}\n{said}\nexit {status}: expected a refusal with a code"
        self.compare(command, said)

    def repeat(self, command: Command) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            status, said = self.type(command.text)
            if status == 0 and self.missing(command.expected, said) is None:
                return
            if time.monotonic() > end:
                self.compare(command, said)
            time.sleep(0.5)

    def start(self, command: Command) -> None:
        said = self.folder / f"terminal-{len(self.programs) + 2}.log"
        with said.open("wb") as output:
            program = subprocess.Popen(
                ["bash", "-c", f"exec {self.translate(command.text)}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.programs.append((command.text, program))
        end = time.monotonic() + PATIENCE
        while self.missing(command.expected, said.read_text()) is not None:
            assert program.poll() is None, f"$ {command.text}\n{said.read_text()}\nended with {program.returncode}"
            if time.monotonic() > end:
                self.compare(command, said.read_text())
            time.sleep(0.1)

    def type(self, text: str) -> tuple[int, str]:
        """Run a line as a shell would, keeping what it exports; its exit status and words."""
        kept = self.folder / ".environment"
        done = subprocess.run(
            ["bash", "-c", f'{self.translate(text)}\nstatus=$?; env -0 > "{kept}"; exit $status'],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        pairs = (p.partition("=") for p in kept.read_text().split("\0") if p)
        self.environment = {k: v for k, _, v in pairs}
        return done.returncode, done.stdout

    def compare(self, command: Command, said: str) -> None:
        missing = self.missing(command.expected, said)
        assert missing is None, f"$ {command.text}\n{said}\nmissing: {missing}"

    def missing(self, expected: Sequence[str], said: str) -> str | None:
        """The first expected line that does not come, in order; ids are learned on the way."""
        lines = [" ".join(line.split()) for line in said.splitlines()]
        at = 0
        for wanted in expected:
            pattern, unknown = self.pattern(wanted)
            found = next((i for i in range(at, len(lines)) if pattern.fullmatch(lines[i])), None)
            if found is None:
                return wanted
            match = pattern.fullmatch(lines[found])
            assert match is not None
            self.ids.update(zip(unknown, match.groups(), strict=True))
            at = found if wanted.strip() == "…" else found + 1
        return None

    def pattern(self, wanted: str) -> tuple[re.Pattern[str], list[str]]:
        """What matches an expected line, and the ids in it that are not known yet, one group each."""
        unknown: list[str] = []

        def spell(text: str) -> str:
            if not ID.fullmatch(text):
                return re.escape(text)
            if text in self.ids:
                return re.escape(self.ids[text])
            unknown.append(text)
            return r"([0-9a-f]{8})"

        words = " ".join(self.with_ports(wanted).split())
        parts = re.split(r"(…|\b[0-9a-f]{8}\b)", words)
        return re.compile("".join(".*" if p == "…" else spell(p) for p in parts)), unknown

    def translate(self, text: str) -> str:
        """A command or a file with this run's ports and ids."""
        return ID.sub(lambda m: self.ids.get(m[0], m[0]), self.with_ports(text))

    def with_ports(self, text: str) -> str:
        return re.sub(r"\b(\d{4})\b", lambda m: self.ports.get(m[0], m[0]), text)

    def stop(self) -> list[str]:
        """End the programs as Ctrl-C would, the last first; those that left something behind."""
        left = []
        for text, program in reversed(self.programs):
            program.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                program.wait(timeout=60)
            try:
                os.killpg(program.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            program.wait()
            left.append(text)
        return left


def free_ports(count: int) -> list[str]:
    """Ports that nobody listens on now, all different."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port("127.0.0.1"))
    return [str(port) for port in found]
