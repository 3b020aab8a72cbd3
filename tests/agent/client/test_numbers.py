"""An application's numbers reach the agent once, whatever became of it in between."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.agent.client.test_client import Awaited

from lightship_agent import Metrics
from lightship_agent.client import AppSample, Client
from lightship_agent.contract.app_metrics import MAX_METRICS, AppHistogram
from lightship_agent.contract.codes import LinkError, ServingError
from lightship_agent.monitor.application import ApplicationNumbers
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import create_app
from lightship_agent.serving.server import HttpServer

unclosed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Listener:
    """An agent's HTTP face that takes numbers, on a Unix socket; not there until it is started."""

    def __init__(self, path: Path) -> None:
        self.kept = ApplicationNumbers(since=1)
        self.address = f"unix:{path}"
        self._path = path
        self._server: HttpServer | None = None

    def start(self) -> None:
        app = create_app(DataPlane(print), status=dict, metrics=str, told=self.kept.take)
        self._server = HttpServer(app, unix_socket=self._path)
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(tmp_path / "a.sock")
    yield made
    made.stop()


def test_numbers_are_gathered_in_the_program_and_told_together(agent: Listener) -> None:
    agent.start()
    with Metrics(agent.address, every=0) as metrics:
        parts, oven = metrics.counter("parts_made"), metrics.gauge("oven_c")
        cycle = metrics.histogram("cycle_seconds", edges=(1, 2))
        threads = [threading.Thread(target=lambda: [parts.add() for _ in range(1_000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        oven.set(180)
        oven.set(181)
        for value in (0.5, 1.5, 9):
            cycle.observe(value)

        assert metrics.flush() == 3
        assert metrics.flush() == 0
        parts.add(0.5)

    told = agent.kept.numbers
    assert (told.counters, told.gauges) == ({"parts_made": 4_000.5}, {"oven_c": 181.0})
    assert told.histograms == {"cycle_seconds": AppHistogram(edges=(1.0, 2.0), counts=(1, 1, 1), sum=11.0)}


@unclosed
def test_while_no_agent_answers_what_was_counted_is_kept_and_told_once_it_does(agent: Listener) -> None:
    with Metrics(Client(agent.address, timeout=1), every=0) as metrics:
        metrics.counter("parts").add(3)
        metrics.histogram("cycle").observe(1)
        metrics.gauge("oven").set(1)
        with pytest.raises(LinkError, match="can't be reached"):
            metrics.flush()
        metrics.counter("parts").add(4)
        metrics.gauge("oven").set(2)

        agent.start()
        metrics.flush()

    told = agent.kept.numbers
    assert (told.counters, told.gauges) == ({"parts": 7.0}, {"oven": 2.0})
    assert sum(told.histograms["cycle"].counts) == 1
    gc.collect()  # what the library left open of the call that failed goes here, where it is expected


def test_one_number_that_the_agent_refuses_keeps_no_other_from_it(agent: Listener) -> None:
    agent.start()
    agent.kept.take([AppSample(name="parts", kind="gauge", value=1.0)])
    with Metrics(agent.address, every=0) as metrics:
        metrics.counter("parts").add()
        metrics.counter("scrap").add(2)

        with pytest.raises(ServingError) as refused:
            metrics.flush()

    assert refused.value.code == "serving.metric-kind"
    assert (agent.kept.numbers.gauges, agent.kept.numbers.counters) == ({"parts": 1.0}, {"scrap": 2.0})


def test_what_can_be_no_number_is_refused_where_it_is_made(agent: Listener) -> None:
    metrics = Metrics(agent.address, every=0)
    metrics.counter("parts")
    metrics.histogram("cycle", edges=(1, 2))
    codes = []
    for wrong in (
        lambda: metrics.counter("Parts"),
        lambda: metrics.gauge("parts"),
        lambda: metrics.histogram("cycle", edges=(1, 3)),
        lambda: metrics.histogram("other", edges=(2, 1)),
        lambda: metrics.counter("parts").add(-1),
        lambda: metrics.counter("parts").add(float("nan")),
        lambda: metrics.gauge("oven").set(float("inf")),
        lambda: metrics.histogram("cycle", edges=(1, 2)).observe(float("nan")),
        lambda: [metrics.counter(f"n{i}") for i in range(MAX_METRICS)],
    ):
        with pytest.raises(ServingError) as refused:
            wrong()
        codes.append(refused.value.code.removeprefix("serving.metric-"))

    assert codes == ["name", "kind", "kind", "value", "value", "value", "value", "value", "full"]


def test_a_coroutine_tells_too_and_over_frames_nobody_is_told(agent: Listener) -> None:
    agent.start()
    with Awaited(agent.address) as client:
        client.tell(
            AppSample(name="parts", kind="counter", value=1.0), AppSample(name="parts", kind="counter", value=2.0)
        )

    assert agent.kept.numbers.counters == {"parts": 3.0}
    with Client("frames:/nowhere") as frames, pytest.raises(ServingError) as refused:
        frames.tell(AppSample(name="parts", kind="counter", value=1.0))
    assert refused.value.code == "serving.not-found"
