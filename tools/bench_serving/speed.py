"""Bench serving: what a prediction takes, everywhere, with every server alive at once.

Rules: bursts are short and take turns, shuffled anew each round: whatever else the machine does meets everybody; before
anything is measured each server has said to the same row what the model says; bare calls of the runtime take turns with
the servers.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

from . import cast, models
from .awake import awake
from .bench import ROW, Bench
from .cast import versions_of
from .helpers import Helper
from .load import Burst, Client, LoadError, Target
from .process import end

CONCURRENCIES: Final = (1, 8, 32)
PACE: Final = 100  # requests a second
_ECHO_BYTES: Final = 330
#: Names of ourselves, by face.
OURS: Final = {"http": "ours", "unix": "ours-unix", "frames": "ours-frames"}
TITLES: Final = {
    "echo": "a server in C that answers without looking (the floor)",
    "ours": "Lightship, HTTP (JSON)",
    "ours-unix": "Lightship, HTTP on a Unix socket",
    "ours-frames": "Lightship, frames on a Unix socket",
    **{p.name: p.title for p in cast.PEERS},
}
#: Who is paced: ourselves, and whoever users compare with, as they come and tuned.
_PACED: Final = ("ours", "fastapi-written", "fastapi", "mlserver", "mlserver-default", "litserve", "bentoml")


@dataclass
class Company:
    """Everybody who answers, by (who, model), and who does not, and why."""

    targets: dict[tuple[str, str], Target]
    absent: dict[str, str]
    versions: dict[str, str]


@contextmanager
def company(bench: Bench, names: tuple[str, ...]) -> Iterator[Company]:
    """All of them alive, and in agreement about those models, until the end of the block."""
    with contextlib.ExitStack() as stack:
        able, absent = bench.peers()
        found = Company({}, absent, {})
        started = []
        for peer in able:
            environment = bench.environment(peer.environment)
            found.versions[peer.name] = versions_of(environment, _DISTRIBUTION.get(peer.environment, peer.environment))
            server = cast.start(peer, environment, bench.folder / "run", bench.made, names)
            started.append(stack.enter_context(cast.running(server)))
        _ours(bench, stack, found, names)
        for server in started:
            try:
                for name in names:
                    cast.agrees(server.first_answer(name, ROW), name, bench.made, ROW)
                    found.targets[server.peer.name, name] = server.target(bench.client, name, ROW)
            except LoadError as e:
                found.absent[server.peer.name] = str(e)
                found.targets = {key: t for key, t in found.targets.items() if key[0] != server.peer.name}
                end(server.process)
        found.targets["echo", "hgb"] = stack.enter_context(_echo(bench.client))
        yield found


_DISTRIBUTION: Final = {"pytriton": "nvidia_pytriton"}


def _ours(bench: Bench, stack: contextlib.ExitStack, found: Company, names: tuple[str, ...]) -> None:
    for name in names:
        agent = stack.enter_context(bench.scene().serving(f"speed-{name}", name))
        cast.agrees(agent.first_answer(name, ROW), name, bench.made, ROW)
        request = cast.oip(name, ROW)
        found.targets["ours", name] = agent.target(bench.client, request, name)
        found.targets["ours-unix", name] = agent.target(bench.client, request, name, "unix")
        found.targets["ours-frames", name] = agent.target(bench.client, cast.frame(ROW), name, "frames")


@contextmanager
def _echo(client: Client) -> Iterator[Target]:
    where = f"127.0.0.1:{cast.free_ports(1)}"
    command = [str(client.program), "echo", where, str(_ECHO_BYTES)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield Target(where, client.request("echo", cast.oip("hgb", ROW)), (process.pid,))
    finally:
        end(process)


def measure(bench: Bench) -> dict[str, Any]:
    """Rounds of bursts at each concurrency, and paced ones."""
    sizes = bench.sizes
    order = random.Random(4)
    with (
        company(bench, models.NAMES) as found,
        Helper(bench.environment("ours"), "inside.py", str(bench.made)) as inside,
    ):
        for who, why in found.absent.items():
            print(f"  without {who}: {why}", flush=True)
        bursts: list[dict[str, Any]] = []
        calls: list[dict[str, Any]] = []
        jobs: list[tuple[str, str, int]] = _jobs(found)
        for number in range(sizes.rounds):
            print(f"  round {number + 1} of {sizes.rounds}", flush=True)
            order.shuffle(jobs)
            with awake():
                for who, model, connections in jobs:
                    if who == "inside":
                        inside.tell(f"{model} {sizes.seconds}")
                        calls.append({"model": model, **inside.answer()})
                        continue
                    burst = _asked(bench, found, who, model, "-c", connections, "-t", sizes.seconds)
                    if burst is not None:
                        seen = {"who": who, "model": model, "c": connections, "rate": burst.rate}
                        bursts.append(seen | asdict(burst))
        paced = _paced(bench, found, order)
    return {"bursts": bursts, "inside": calls, "paced": paced, "absent": found.absent, "versions": found.versions}


def _jobs(found: Company) -> list[tuple[str, str, int]]:
    jobs = [(who, "hgb", c) for (who, model) in found.targets if model == "hgb" for c in CONCURRENCIES]
    others = [name for name in models.NAMES if name != "hgb"]
    jobs += [(who, model, 1) for (who, model) in found.targets if model in others]
    return jobs + [("inside", name, 1) for name in models.NAMES]


def _paced(bench: Bench, found: Company, order: random.Random) -> list[dict[str, Any]]:
    seen = []
    jobs = [(who, model) for (who, model) in found.targets if who in _PACED and model in {"hgb", "rf"}]
    for number in range(bench.sizes.paced_rounds):
        print(f"  paced round {number + 1} of {bench.sizes.paced_rounds}", flush=True)
        order.shuffle(jobs)
        for who, model in jobs:
            burst = _asked(bench, found, who, model, "-r", PACE, "-t", bench.sizes.paced_seconds)
            if burst is not None:
                seen.append({"who": who, "model": model, **asdict(burst)})
    return seen


def _asked(bench: Bench, found: Company, who: str, model: str, *options: str | float) -> Burst | None:
    """What a burst found; None of a peer that has failed, which is said, and asked no more.

    Raises:
        LoadError: we have failed.
    """
    if who in found.absent:
        return None
    try:
        target = found.targets[who, model]
        if options[:2] == ("-c", 1):
            return bench.client.ask_alone(target, *options[2:])
        return bench.client.ask(target, *options)
    except LoadError as e:
        if who in (*OURS.values(), "echo"):
            raise
        print(f"  {who} failed: {e}", flush=True)
        found.absent[who] = f"It failed on the way: {e}"
        return None
