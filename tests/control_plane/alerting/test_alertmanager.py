"""A real Alertmanager: what it shows of ours, and what it forgets when we are gone."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.control_plane.alerting.receivers import posts, secret_file
from tests.control_plane.alerting.test_courier import make_due, right, rows, wrong
from tests.control_plane.things import settings_for, until

from lightship.alerting.channels import set_up
from lightship.alerting.courier import Courier
from lightship.alerting.evaluate import Evaluator
from lightship.fleet.broker import free_port
from lightship.home import Home
from lightship.settings import Settings
from lightship.storage.audit import now_ms
from lightship_agent.contract.codes import AlertError

PROGRAM = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
CONFIG = "route:\n  receiver: nobody\nreceivers:\n  - name: nobody\n"

needs_alertmanager = pytest.mark.skipif(PROGRAM is None, reason="prometheus-alertmanager is not installed")


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """An Alertmanager that sends nothing to anybody."""
    assert PROGRAM is not None
    (tmp_path / "am.yml").write_text(CONFIG)
    port = free_port("127.0.0.1")
    command = [
        PROGRAM, f"--config.file={tmp_path / 'am.yml'}", f"--storage.path={tmp_path / 'am'}", "--log.level=error",
        f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=",
    ]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        until(lambda: ready(f"http://127.0.0.1:{port}"), 180)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(timeout=60)


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def shown(url: str) -> list[dict[str, Any]]:
    """The alerts that it calls active."""
    with urllib.request.urlopen(f"{url}api/v2/alerts?active=true", timeout=30) as answer:
        return list(json.load(answer))


def settings_to(home: Home, url: str, **flags: Any) -> Settings:
    quick = {"alert_group_seconds": 0, "alert_clear_seconds": 0, "alert_timeout_seconds": 20, **flags}
    return settings_for(home.path, alert_alertmanager_url=url, **quick)


def look(home: Home, settings: Settings) -> None:
    evaluator = Evaluator(home, settings, ["alertmanager"], 0)
    for i in range(2):
        evaluator.look(now_ms() + i)


@needs_alertmanager
def test_it_shows_what_is_open_and_drops_what_is_over(home: Home, url: str) -> None:
    wrong(home, "press-1", "press-2")
    settings = settings_to(home, url)
    look(home, settings)
    (channel,) = set_up(settings)
    courier = Courier(home.database, channel, 5)
    assert courier.round() == 2

    until(lambda: len(shown(url)) == 2)
    labels = sorted(({**a["labels"], "alert_id": ""} for a in shown(url)), key=json.dumps)
    assert labels[0] == {
        "alertname": "LightshipClone", "alert_id": "", "kind": "clone", "severity": "critical", "group": "pumps",
        "environment": "development", "tenant": "default",
    }  # fmt: skip
    assert {a["annotations"]["devices"] for a in shown(url)} == {"press-1", "press-2"}

    right(home, "press-1")
    look(home, settings)
    assert courier.round() == 1
    until(lambda: [a["annotations"]["devices"] for a in shown(url)] == ["press-2"])


@needs_alertmanager
def test_one_that_has_forgotten_everything_is_told_again_what_is_open(home: Home, url: str) -> None:
    wrong(home, "press-1")
    settings = settings_to(home, url)
    look(home, settings)
    with home.database.write() as session:
        for row in rows(home):
            row.state = "sent"  # to the one before
            session.merge(row)
    (channel,) = set_up(settings)
    assert Courier(home.database, channel, 5).round() == 0

    until(lambda: len(shown(url)) == 1)
    (alert,) = shown(url)
    ends = time.mktime(time.strptime(alert["endsAt"][:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone
    assert 200 < ends - time.time() < 310  # it takes it for over five minutes after we are gone


def test_a_token_is_shown_and_an_alertmanager_that_refuses_is_asked_again(home: Home, tmp_path: Path) -> None:
    wrong(home, "press-1")
    with posts(tmp_path / "posts") as receiver:
        receiver.mood("400")
        token = secret_file(tmp_path / "s", "a-token")
        settings = settings_to(home, receiver.url.partition("/hook")[0] + "/am/", alert_alertmanager_token=token)
        look(home, settings)
        (channel,) = set_up(settings)
        courier = Courier(home.database, channel, 5)
        assert courier.round() == 0
        assert [(r.state, r.code) for r in rows(home)] == [("queued", "alert.status")]
        receiver.mood("200")
        make_due(home)
        assert courier.round() == 1

    assert {(g["path"], g["headers"]["authorization"]) for g in receiver.got} == {
        ("/am/api/v2/alerts", "Bearer a-token")
    }


def test_one_that_is_not_there_is_unreachable(home: Home) -> None:
    (channel,) = set_up(settings_to(home, "http://127.0.0.1:9"))
    with pytest.raises(AlertError) as e:
        channel.send([])
    assert e.value.code == "alert.unreachable"
