"""Bench serving: what every part is given: client, environments, models, control plane, and how long."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from . import cast, models
from .cast import Peer
from .load import Client
from .scene import Scene, open_scene
from .venvs import Environment, environment

ROW: Final = models.rows(1, seed=99)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int = 15
    seconds: float = 0.6  # of a burst
    paced_rounds: int = 4
    paced_seconds: float = 4.0
    idle_seconds: float = 120.0
    requests: int = 100_000  # after which the agent's memory is looked at again
    peer_requests: int = 20_000  # the same of the slower servers
    starts: int = 5
    updates: int = 20
    swaps: int = 1_000
    soak: int = 10_000_000
    peers: tuple[str, ...] = tuple(p.name for p in cast.PEERS)


QUICK: Final = Sizes(
    rounds=2, seconds=0.2, paced_rounds=1, paced_seconds=1.0, idle_seconds=5.0, requests=5_000, peer_requests=1_000,
    starts=1, updates=2, swaps=20, soak=50_000, peers=("fastapi-written", "fastapi"),
)  # fmt: skip


@dataclass
class Bench:
    """The workplace."""

    folder: Path
    sizes: Sizes
    client: Client
    made: Path = field(init=False)
    _environments: dict[str, Environment] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _scene: Scene | None = None

    def __post_init__(self) -> None:
        self.made = self.folder / "models"
        for name in models.NAMES:
            for version in range(1, 1 + models.VERSIONS):
                models.make(self.made, name, version)

    def environment(self, name: str) -> Environment:
        """That environment; the first time, it is brought up to date."""
        if name not in self._environments:
            self._environments[name] = environment(self.folder / "environments", name)
        return self._environments[name]

    def peers(self) -> tuple[list[Peer], dict[str, str]]:
        """Who can be measured, and why the others can't."""
        able, unable = [], {}
        for name in self.sizes.peers:
            peer = cast.peer(name)
            why_not = self.environment(peer.environment).why_not
            if why_not:
                unable[name] = why_not
            else:
                able.append(peer)
        return able, unable

    def scene(self) -> Scene:
        """The control plane; it is started when it is first asked for."""
        if self._scene is None:
            folder = self.folder / "scene"
            shutil.rmtree(folder, ignore_errors=True)
            self._scene = self._stack.enter_context(open_scene(folder, self.environment("ours"), self.made))
        return self._scene

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Afterwards nothing of a part is left but what was measured."""
        try:
            yield
        finally:
            self._stack.close()
            self._scene = None
