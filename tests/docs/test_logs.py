"""The page on logs: every field it documents is in lines that the real programs write, and no other is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.agent.app.agents import RunningAgent
from tests.agent.link.field import open_field, until

from lightship.home import Home
from lightship_agent.logs import FIELDS

PAGE = Path(__file__).parents[2] / "docs" / "logs.md"
#: What fails in a way nobody foresaw, in a process that logs as the programs do.
FAILS = """
import logging
from lightship_agent.logs import configure
configure("lightship", "info", "json")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("lightship.fleet").exception("it failed")
"""


def rows() -> list[list[str]]:
    table = PAGE.read_text(encoding="utf-8").partition("## Fields")[2].partition("##")[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| `")]
    assert cells
    return cells


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_page_lists_the_fields_and_maps_each_to_both() -> None:
    assert [cells[0].strip("`") for cells in rows()] == list(FIELDS)
    assert all(len(cells) == 4 and all(cells) for cells in rows())
    page = PAGE.read_text(encoding="utf-8")
    filebeat, loki = page.partition("## Elastic")[2].split("## Loki")
    renamed = dict(re.findall(r'from: "ls\.(\w+)", to: "([\w.@]+)"', filebeat))
    said = {cells[0].strip("`"): cells[2].strip("`") for cells in rows()}
    assert {name: to for name, to in renamed.items() if name != "message"} == {
        name: to for name, to in said.items() if name not in ("ts", "message")
    }
    labels = re.search(r"labels: \{(.*?)\}\n", loki.partition("timestamp")[2])
    assert labels is not None
    assert set(re.findall(r"(\w+):", labels[1])) == {c[0].strip("`") for c in rows() if c[3].startswith("label")}


def lines_of_an_agent(tmp_path: Path) -> list[dict[str, Any]]:
    """Whose control plane does not answer."""
    Home.create(tmp_path / "empty").close()
    (tmp_path / "site").mkdir()
    with open_field(tmp_path / "site", tmp_path / "empty") as field:
        identity = field.enrolled("press-1")
        field.fault(".", status=500)
        with RunningAgent(identity.folder.parent, LOG_FORMAT="json", POLL_SECONDS="0.2") as agent:
            until(lambda: "link.status" in agent.log.read_text(), 180)
            agent.terminate()
            return lines(agent.log.read_text())


def test_every_documented_field_is_in_lines_of_the_running_programs(tmp_path: Path) -> None:
    agents_lines = lines_of_an_agent(tmp_path)
    failed = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, check=True, timeout=60)
    written = [*agents_lines, *lines(failed.stderr)]

    assert {name for line in written for name in line} == set(FIELDS)
    assert {line["device"] for line in agents_lines if "device" in line} == {"press-1"}
    assert "link.status" in {line.get("code") for line in agents_lines}
    assert {line["program"] for line in written} == {"lightship-agent", "lightship"}
    always = set(FIELDS) - {"code", "device", "error"}
    assert all(always <= set(line) for line in written)
