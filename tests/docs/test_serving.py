"""docs/serving.md is run as it stands: its Python on a device that serves `pump`, its answers compared.

In expected lines `…` stands for anything.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.agent import tensored
from tests.agent.conftest import build
from tests.docs.fences import ROOT, Block, blocks

from lightship.convert.declared import read_declared
from lightship.fleet.broker import free_port
from lightship.integrations import mosquitto
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.monitor.monitor import Monitor
from lightship_agent.runtime.model import load_model
from lightship_agent.serving.bindings import parse_bindings
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.frames import FrameFace
from lightship_agent.serving.http import create_app
from lightship_agent.serving.mqtt import MqttFace
from lightship_agent.serving.server import HttpServer
from lightship_agent.update.machine import Target, UpdateState

PAGE = ROOT / "docs" / "serving.md"


class Device:
    """A device as the page has it, and the reader's program beside it."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.names: dict[str, Any] = {}
        self.places = {"/var/lib/lightship-agent": str(self.state), "/run/lightship-agent": str(folder)}
        data = build()
        digest = sha256_hex(data)
        (self.state / "bundles").mkdir(parents=True)
        (self.state / "bundles" / f"{digest}.tar").write_bytes(data)
        target = Target(model="pump", version=1, path="p", sha256=digest, length=len(data), seq=1, rollout="")
        (self.state / "update.json").write_bytes(msgspec.json.encode(UpdateState(current=target)))
        monitor = Monitor(200)
        self.plane = plane = DataPlane(monitor.observe, observe_row=monitor.observe_row, feedback=monitor.feedback)
        plane.install(load_model(read_bundle(data)))
        app = create_app(plane, status=dict, metrics=str)
        frames = folder / "frames.sock"
        self.server = HttpServer(app, port=0, frames=FrameFace(plane), frames_socket=frames)
        self.server.start()
        self.places["127.0.0.1:8500"] = "{}:{}".format(*(self.server.address or ()))

    def show_eye(self) -> None:
        """The device serves a model of images as well: the one that the page declares."""
        (declared,) = (b.body for b in blocks(PAGE) if b.file == "eye.toml")
        (self.state / "eye.toml").write_text(declared)
        told = read_declared(self.state / "eye.toml")
        assert told == tensored.COLOUR
        self.plane.install(
            load_model(read_bundle(tensored.bundle(tensored.conv_net(), told, tensored.colour_arrays())))
        )

    def run(self, program: str) -> str:
        for written, here in self.places.items():
            program = program.replace(written, here)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(program, str(PAGE), "exec"), self.names)
        return said.getvalue()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    started = Device(tmp_path)
    yield started
    started.server.stop()


@pytest.fixture
def broker(device: Device, tmp_path: Path) -> Iterator[None]:
    """A broker as the page has it, and the bindings that the page writes; none where mosquitto is missing."""
    program = mosquitto.find()
    if program is None:
        yield
        return
    port = free_port("127.0.0.1")
    device.places |= {"1883": str(port)}
    (tmp_path / "m.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    text = next(b.body for b in blocks(PAGE) if b.file == "bindings.toml").replace("1883", str(port))
    with subprocess.Popen([str(program), "-c", str(tmp_path / "m.conf")], stderr=subprocess.DEVNULL) as running:
        face = MqttFace(device.plane, parse_bindings(text, "bindings.toml"), client_id="lightship-press-1")
        face.start()
        try:
            assert face.listening.wait(60)
            yield
        finally:
            face.stop()
            running.terminate()


def pairs() -> list[tuple[Block, Block]]:
    """Each Python block with the block of text behind it."""
    found = blocks(PAGE)
    return [(a, b) for a, b in pairwise(found) if a.language == "python"]


@pytest.mark.usefixtures("broker")
def test_every_example_prints_what_the_page_says(device: Device) -> None:
    assert len(pairs()) >= 5
    for program, expected in pairs():
        if "mqtt" in program.words and mosquitto.find() is None:
            continue
        if "eye" in program.words:
            device.show_eye()
        assert expected.language == "text", f"{program.body}\nhas no output behind it"
        said = device.run(program.body)
        device.plane.remove("eye")
        pattern = ".*".join(re.escape(part) for part in expected.body.split("…"))
        assert re.fullmatch(pattern, said), f"{program.body}\nsaid\n{said}\nand not\n{expected.body}"
