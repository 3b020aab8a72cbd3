"""The tools behind `make bench-update` measure what they say, and its page holds what it claims."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from bench_update.agents import Act, Agent, cpu, descendants, pss
from bench_update.deltas import Delta
from bench_update.dying import Crossing
from bench_update.listing import Listing
from bench_update.looks import Look, Shape, plain_http
from bench_update.page import Figures, page
from bench_update.peers import Job, both
from bench_update.wire import metered
from lightship.home import Home
from lightship_agent.update.releases import Releases

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "update.json"
PATH = "bundles/pump/1.tar"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")


@pytest.mark.parametrize("bins", [0, 4])
def test_a_padded_list_is_one_that_both_clients_believe(home: Home, tmp_path: Path, bins: int) -> None:
    home.releases.publish(PATH, b"a bundle")
    root = tmp_path / "root.json"
    root.write_bytes(home.releases.root_bytes())

    listing = Listing(home, bins)
    listing.pad(20)

    assert listing.roles == 2 + bins
    with plain_http(home) as url, both() as peers, httpx.Client(trust_env=False) as client:
        releases = Releases(tmp_path / "device", client, f"{url}/metadata/", root.read_bytes())
        assert releases.find(PATH).length == len(b"a bundle")
        for name, peer in peers.items():
            (tmp_path / name).mkdir()
            job = Job(str(tmp_path / name), str(root), f"{url}/metadata/", f"{url}/targets/", PATH, fetch=True)
            assert peer.does(job).cpu > 0
    home.close()


def test_a_link_counts_what_went_over_it_and_dies_when_it_is_told_to(home: Home) -> None:
    content = os.urandom(50_000)
    (home.releases.targets / "file").write_bytes(content)
    with plain_http(home) as url, metered(url) as link, metered(url, dies_after=20_000) as dying:
        assert httpx.get(f"{link.url}/targets/file", trust_env=False).content == content
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{dying.url}/targets/file", trust_env=False)
        connection = http.client.HTTPConnection(urlsplit(link.url).netloc)
        connection.close()
    assert len(content) < link.down < len(content) + 1_000
    assert 0 < link.up < 1_000
    assert (dying.down, dying.connections) == (20_000, 1)
    home.close()


def test_memory_is_that_of_the_process_and_of_its_children() -> None:
    hold = "held = bytearray(40 << 20); held[::4096] = b'x' * len(held[::4096]); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in descendants(os.getpid())
        assert 40 < pss(child.pid) < 80
        assert 0 <= cpu(child.pid) < 10
        child.communicate(b"\n")
    assert pss(child.pid) == 0


def test_the_page_says_every_figure_and_which_bar_is_missed() -> None:
    look = Look({"ours": 0.01, "stock": 0.008, "child": 0.3}, {"ours": 1_000, "stock": 900, "child": 9_000})
    shapes = [Shape(n, 0, 30_000, 0.01, look, look, look, look) for n in (100, 10_000)]
    agents = [Agent(n, 80, Act(81, 110, 82.5, 0.4, 9_000), Act(130, 170, 100, 3, 700_000)) for n in (100, 10_000)]
    deltas = [
        Delta("forest, swapped", 4_000_000, 600_000, 60_000, 1.0, 0.01),
        Delta("network", 500_000, 400_000, 399_000, 1, 0),
    ]
    figures = Figures(shapes, agents, deltas, Crossing(120, 121, 25, 1.0, 1.0, 1), "a machine", 5)

    said = page(figures)

    assert [bar.name for bar in figures.bars() if not bar.holds] == ["MB of PSS that a check does not give back"]
    assert said.count("| **missed** |") == 1
    assert all(bar.name in said for bar in figures.bars())
    assert "| forest, swapped | 4,000,000 | 600,000 | 60,000 | 10% | yes |" in said
    assert "| network | 500,000 | 400,000 | 399,000 | 100% | no |" in said
    assert json.loads(json.dumps(figures.plain()))["download_120_mb"]["share"] == pytest.approx(121 / 120)


def test_what_is_published_is_whole_and_true_to_its_own_limits() -> None:
    found = json.loads(RESULTS.read_text())
    said = (RESULTS.parent / "update.md").read_text()

    assert found["command"] == "make bench-update"
    assert {look["bundles"] for look in found["looks"]} == {100, 10_000}
    assert len(found["deltas"]) == 12
    for delta in found["deltas"]:
        assert delta["listed"] == (delta["share"] < 0.6)
    for bar in found["bars"]:
        assert bar["holds"] == (bar["value"] <= bar["limit"])
        assert re.search(
            rf"^\| {re.escape(bar['name'])} \|.*\| {'holds' if bar['holds'] else '..missed..'} \|$", said, re.M
        )
