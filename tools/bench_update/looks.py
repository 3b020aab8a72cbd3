"""Bench update: what a look for news and an update cost, by how many bundles are released and how they are listed.

Rules: medians of runs in which our client and the stock one take turns; bytes are those on the wire, of one run; the
child that checks an assignment is measured whole, from its start to its end, over mutual TLS with the device API.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from crash_test.plane import Plane, open_plane
from lightship.home import Home
from lightship.storage.models import AssignmentRow, ModelVersion
from lightship_agent.contract.device_api import Paths
from lightship_agent.contract.transport import pack_transport
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.link.client import ControlPlane
from lightship_agent.update.check import CheckRequest, ServerSource, check_in_child

from . import bundles
from .listing import Listing, targets_of
from .peers import Job, both, copy_of
from .wire import Meter, metered

DEVICE: Final = "press-1"
SHAPES: Final = ((100, 0), (100, 16), (10_000, 0), (10_000, 256))


@dataclass
class Look:
    """One kind of look. Seconds of CPU by client (medians), bytes on the wire by client."""

    cpu: dict[str, float] = field(default_factory=dict)
    wire: dict[str, int] = field(default_factory=dict)


@dataclass
class Shape:
    """A release list, and what it costs to look at it."""

    bundles: int
    bins: int
    list_bytes: int  # of all roles together
    publish_cpu: float = 0.0
    ask: Look = field(default_factory=Look)
    warm: Look = field(default_factory=Look)
    news: Look = field(default_factory=Look)
    cold: Look = field(default_factory=Look)

    @property
    def product(self) -> bool:
        """Whether this is how the control plane lists its releases."""
        return not self.bins

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.bundles:,} bundles, {f'{self.bins} bins' if self.bins else 'one list'}"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, **asdict(self)}


def measure(folder: Path, models: tuple[bytes, bytes], runs: int) -> list[Shape]:
    """Every shape, with an old and a new bundle of these models."""
    old, new = bundles.bundle(models[0], 1), bundles.bundle(models[1], 2)
    found = []
    for number, (count, bins) in enumerate(SHAPES):
        place = folder / f"shape-{number}"
        place.mkdir(parents=True)
        with ExitStack() as stack:
            plane = stack.enter_context(open_plane(place))
            scene = _Scene(plane, place, stack, runs)
            found.append(scene.measure(count, bins, old, new))
        shutil.rmtree(place)
        print(f"  {found[-1].name}: warm look {_shown(found[-1].warm.cpu)}", flush=True)
    return found


def _shown(cpu: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds * 1_000:.0f} ms" for name, seconds in cpu.items())


class _Scene:
    """A control plane with a long list, and clients before it."""

    def __init__(self, plane: Plane, folder: Path, stack: ExitStack, runs: int) -> None:
        self._plane = plane
        self._folder = folder
        self._runs = runs
        self._tls = stack.enter_context(metered(plane.url))
        self._http = stack.enter_context(metered(stack.enter_context(plain_http(plane.home))))
        self._peers = stack.enter_context(both())
        self._state = folder / "device"
        self._identity = plane.enrol(self._state, DEVICE, self._tls.url)
        self._root = folder / "root.json"
        self._root.write_bytes(self._identity.tuf_root)

    def measure(self, count: int, bins: int, old: bytes, new: bytes) -> Shape:
        listing = Listing(self._plane.home, bins)
        version = self._plane.release(old, 1)
        listing.pad(count - 1)
        self._plane.assign(DEVICE, 1)
        shape = Shape(count, bins, self._list_bytes())
        warm = {name: self._folder / name for name in self._peers}
        for name, peer in self._peers.items():
            warm[name].mkdir()
            peer.does(self._job(warm[name], version.path))
        self._check()
        shape.ask = self._ask()
        shape.warm = self._turns(lambda name: self._job(warm[name], version.path), self._check)
        before = self._folder / "before"
        shutil.copytree(self._state, before, symlinks=True)
        self._publish(listing, bins, new)
        path = self._plane.versions[2].path
        self._plane.assign(DEVICE, 2)
        shape.news = self._turns(
            lambda name: self._job(copy_of(warm[name], f"{name}-again"), path, fetch=True),
            lambda: self._check(before),
        )
        shape.cold = self._turns(lambda name: self._job(self._empty(f"{name}-cold"), path), self._check_cold)
        shape.publish_cpu = self._publish_small(listing, bins)
        return shape

    def _publish(self, listing: Listing, bins: int, new: bytes) -> None:
        """Release a bundle; as the control plane does, where it can."""
        if not bins:
            self._plane.release(new, 2)
            return
        row = ModelVersion(
            model=bundles.NAME, version=2, run_id="run", state="released", digest=sha256_hex(new), length=len(new),
            metrics={}, created_at=0, released_at=0,
        )  # fmt: skip
        listing.add(targets_of(self._plane.home, row.path, new, pack_transport(new)))
        self._plane.versions[2] = row

    def _publish_small(self, listing: Listing, bins: int) -> float:
        """CPU of releasing a bundle that takes no time to compress."""
        began = time.process_time()
        path, data = "bundles/small/1.tar", b"small"
        if bins:
            listing.add(targets_of(self._plane.home, path, data, data))
        else:
            self._plane.home.releases.publish(path, data)
        return time.process_time() - began

    def _turns(self, job: Callable[[str], Job], check: Callable[[], float]) -> Look:
        """Ours, stock and the whole child, taking turns."""
        cpu: dict[str, list[float]] = {}
        look = Look()
        for _ in range(self._runs):
            for name, peer in self._peers.items():
                todo = job(name)
                cost = self._counted(look, name, self._http, lambda peer=peer, todo=todo: peer.does(todo).cpu)  # type: ignore[misc]
                cpu.setdefault(name, []).append(cost)
            cpu.setdefault("child", []).append(self._counted(look, "child", self._tls, check))
        look.cpu = {name: statistics.median(values) for name, values in cpu.items()}
        return look

    def _counted(self, look: Look, name: str, meter: Meter, act: Callable[[], float]) -> float:
        meter.reset()
        seconds = act()
        look.wire[name] = _settled(meter)
        return seconds

    def _ask(self) -> Look:
        """The usual look: has anything been assigned to us since? Each time over a new connection."""
        look, cpu, etag = Look(), [], sha256_hex(self._envelope())[:32]
        for _ in range(self._runs):
            plane = ControlPlane(self._identity)
            self._tls.reset()
            began = time.thread_time()
            assert plane.desired(etag).envelope is None
            cpu.append(time.thread_time() - began)
            plane.close()
            look.wire["ours"] = _settled(self._tls)
        look.cpu["ours"] = statistics.median(cpu)
        return look

    def _check(self, state: Path | None = None) -> float:
        """The agent's check in its child, with the cache of `state` (a copy of it) or the device's own; its CPU."""
        folder = copy_of(state, "again") if state else self._state
        request = CheckRequest(
            state_dir=str(folder), device=DEVICE, envelope=self._envelope(), floor=0, now=time.time(),
            source=ServerSource(metadata_url=f"{self._tls.url}{Paths.METADATA}"),
        )  # fmt: skip
        before = _children_cpu()
        check_in_child(request)
        return _children_cpu() - before

    def _envelope(self) -> bytes:
        with self._plane.home.database.read() as session:
            row = session.get(AssignmentRow, DEVICE)
            assert row is not None
            return row.envelope

    def _check_cold(self) -> float:
        fresh = copy_of(self._state, "fresh")
        shutil.rmtree(fresh / "tuf")
        return self._check(fresh)

    def _job(self, folder: Path, path: str, *, fetch: bool = False) -> Job:
        base = self._http.url
        return Job(str(folder), str(self._root), f"{base}/metadata/", f"{base}/targets/", path, fetch)

    def _empty(self, name: str) -> Path:
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _list_bytes(self) -> int:
        metadata = self._plane.home.releases.metadata
        newest: dict[str, tuple[int, int]] = {}
        for path in metadata.glob("*.json"):
            number, _, role = path.name.removesuffix(".json").partition(".")
            if number.isdecimal() and (role.startswith("bin") or role == "releases"):
                newest[role] = max(newest.get(role, (0, 0)), (int(number), path.stat().st_size))
        return sum(size for _, size in newest.values())


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _settled(meter: Meter) -> int:
    """What was counted, once the last bytes have gone over."""
    last = -1
    while meter.total != last:
        last = meter.total
        time.sleep(0.02)
    return last


@contextmanager
def plain_http(home: Home) -> Iterator[str]:
    """The files of the release repository, for clients that have no certificate."""
    app = Starlette(
        routes=[
            Mount("/metadata", StaticFiles(directory=home.releases.metadata)),
            Mount("/targets", StaticFiles(directory=home.releases.targets)),
        ]
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, name="plain-http")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the plain server did not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
