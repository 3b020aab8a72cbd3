"""The command line as a real process: what it says to people and machines, and the status it ends with."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from tests.agent.conftest import build, training_rows
from tests.agent.link.field import Field, until

import lightship_agent
from lightship.storage.models import Alarm, Device, WindowRow
from lightship_agent.contract.codes import CODES, EXIT_STATUS
from lightship_agent.update import machine as m
from lightship_agent.update.store import BundleStore, StateFile

from .agents import RunningAgent, command


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The code on standard error, after checking that the exit status is that of its family."""
    said = json.loads(done.stderr.splitlines()[-1])
    assert set(said) == {"code", "error"}
    assert done.returncode == EXIT_STATUS[said["code"].partition(".")[0]]
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return str(said["code"])


def seeded(field: Field, name: str = "press-1") -> tuple[Path, str]:
    """The state directory of a device that has version 1 committed, and the bundle's digest."""
    state, first = field.enrolled(name).folder.parent, field.release(1)
    field.assign(name, first)
    BundleStore(state).put(first.digest, build(1))
    target = m.Target.of(field.assignment(name, first, seq=1))
    StateFile(state).save(m.UpdateState(floor=1, current=target))
    return state, first.digest


# Usage ----------------------------------------------------------------------------------------------------------------


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    assert command("--version", state=tmp_path).stdout.strip() == lightship_agent.__version__


@pytest.mark.parametrize("arguments", [(), ("dance",), ("enrol",), ("run", "--speed", "9")])
def test_wrong_usage_is_status_2_and_says_how(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = command(*arguments, state=tmp_path)

    assert (done.returncode, "usage:" in done.stderr, done.stdout) == (2, True, "")


def test_a_refusal_for_people_names_its_code_and_what_to_do(tmp_path: Path) -> None:
    done = command("run", state=tmp_path)

    assert done.returncode == 21
    assert "error [enrol.not-enrolled]: " in done.stderr
    assert "lightship-agent enrol" in done.stderr
    assert "Traceback" not in done.stderr


# What can't work ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["run", "status", "verify", "doctor"])
def test_a_setting_that_cannot_work_is_refused_by_every_verb(tmp_path: Path, verb: str) -> None:
    done = command(verb, "--json", state=tmp_path, HTTP_PORT="eighty")

    assert refusal(done) == "settings.invalid"
    assert "LIGHTSHIP_AGENT_HTTP_PORT" in done.stderr


def test_a_device_that_is_not_enrolled_does_not_run(tmp_path: Path) -> None:
    assert refusal(command("run", "--json", state=tmp_path / "state")) == "enrol.not-enrolled"
    assert not (tmp_path / "state").exists()


def test_a_port_in_use_is_said_and_nothing_was_begun(field: Field) -> None:
    state = field.enrolled().folder.parent
    before = sorted(p.name for p in state.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command("run", "--json", "--http-port", str(taken.getsockname()[1]), state=state)

    assert refusal(done) == "settings.port-taken"
    assert done.returncode == 12
    assert sorted(p.name for p in state.iterdir()) == before


def test_a_broken_identity_is_said(field: Field) -> None:
    found = field.enrolled()
    (found.folder / "cert.pem").write_bytes(b"noise")

    assert refusal(command("run", "--json", state=found.folder.parent)) == "storage.corrupt"


# enrol ----------------------------------------------------------------------------------------------------------------


def test_enrolling_with_a_token_from_standard_input(field: Field, tmp_path: Path) -> None:
    arguments = ("enrol", "--json", "--server", field.url, "--device", "press-1", "--token-file", "-")

    done = command(*arguments, state=tmp_path / "state", told=field.token())

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["device"] == "press-1"
    assert refusal(command(*arguments, state=tmp_path / "state", told=field.token())) == "enrol.taken"


def test_enrolling_with_a_token_from_a_file_and_a_used_one(field: Field, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(field.token())
    arguments = ("enrol", "--json", "--server", field.url, "--token-file", str(tmp_path / "token"), "--device")

    first = command(*arguments, "press-1", state=tmp_path / "one")
    second = command(*arguments, "press-2", state=tmp_path / "two")

    assert first.returncode == 0
    assert refusal(second) == "enrol.token"
    assert not (tmp_path / "two" / "identity").exists()
    assert field.token().split(".")[1] not in first.stdout + first.stderr + second.stderr


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"--server": "http://127.0.0.1:1"}, "settings.invalid"),
        ({"--server": "https://127.0.0.1:1"}, "link.unreachable"),
        ({"--device": "Press 1"}, "name.invalid"),
        ({"--token-file": "/nowhere/token"}, "settings.invalid"),
    ],
)
def test_what_cannot_be_enrolled_is_said(field: Field, tmp_path: Path, changes: dict[str, str], code: str) -> None:
    options = {"--server": field.url, "--device": "press-1", "--token-file": "-", **changes}
    arguments = [word for pair in options.items() for word in pair]

    done = command("enrol", "--json", *arguments, state=tmp_path / "state", told=field.token())

    assert refusal(done) == code
    assert not (tmp_path / "state").exists()


# verify, doctor -------------------------------------------------------------------------------------------------------


def test_a_bundle_file_is_verified_by_trying_it(tmp_path: Path) -> None:
    (tmp_path / "good.tar").write_bytes(build(3))
    (tmp_path / "bad.tar").write_bytes(build(3, golden_shift=0.5))
    (tmp_path / "noise.tar").write_bytes(b"noise")

    good = command("verify", "--json", str(tmp_path / "good.tar"), state=tmp_path / "state")

    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["model"] == "pump@3"
    for name, code in (("bad", "update.golden"), ("noise", "bundle.malformed"), ("absent", "settings.invalid")):
        done = command("verify", "--json", str(tmp_path / f"{name}.tar"), state=tmp_path / "state")
        assert refusal(done) == code
    assert refusal(command("verify", "--json", state=tmp_path / "state")) == "bundle.malformed"
    assert not (tmp_path / "state").exists()


def test_the_committed_bundle_is_verified_by_default(field: Field) -> None:
    state, digest = seeded(field)

    done = command("verify", "--json", state=state)

    assert json.loads(done.stdout)["digest"] == digest
    BundleStore(state).path(digest).write_bytes(b"altered")
    assert refusal(command("verify", "--json", state=state)) == "bundle.malformed"


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return {f["check"]: f["code"] if not f["ok"] else "" for f in json.loads(done.stdout)}


def test_the_doctor_finds_a_healthy_device_healthy(field: Field) -> None:
    state, _ = seeded(field)

    done = command("doctor", "--json", state=state)

    assert findings(done) == dict.fromkeys(("runtime", "disk", "identity", "bundle", "server", "trust"), "")
    assert done.returncode == 0
    assert command("doctor", state=state).stdout.startswith("ok    runtime")


def test_the_doctor_names_every_ill_and_goes_on(field: Field) -> None:
    state, digest = seeded(field)
    BundleStore(state).path(digest).write_bytes(b"altered")
    (state / "identity" / "key.pem").write_bytes(b"noise")

    done = command("doctor", "--json", state=state)

    found = findings(done)
    assert done.returncode == 1
    assert {c: found[c] for c in ("runtime", "disk", "identity", "bundle")} == {
        "runtime": "", "disk": "", "identity": "", "bundle": "bundle.digest",
    }  # fmt: skip
    assert found["server"] == found["trust"] == "storage.corrupt"
    assert set(found.values()) - {""} <= set(CODES)


def test_the_doctor_of_a_device_without_anything_changes_nothing(tmp_path: Path) -> None:
    done = command("doctor", "--json", state=tmp_path / "state")

    assert findings(done)["identity"] == "enrol.not-enrolled"
    assert done.returncode == 1
    assert not (tmp_path / "state").exists()


# run, status ----------------------------------------------------------------------------------------------------------


def rows_of(n: int) -> dict[str, Any]:
    rows = training_rows(n)
    return {"inputs": [{"name": "features", "shape": list(rows.shape), "datatype": "FP32", "data": rows.tolist()}]}


def test_an_agent_serves_says_how_it_is_and_delivers_what_it_counted_before_it_stops(field: Field) -> None:
    state, digest = seeded(field)
    with RunningAgent(state, WINDOW_ROWS="1000", REPORT_SECONDS="600") as agent:
        agent.wait_for(digest)
        answer = agent._http.post("/v2/models/pump/infer", json=rows_of(30))
        assert answer.status_code == 200
        port = _port_of(agent)
        status = command("status", "--json", "--url", f"http://127.0.0.1:{port}", state=state)
        table = command("status", "--url", f"http://127.0.0.1:{port}", state=state)
        reasons = command("explain", "--json", "--newest", "3", state=state, SOCKET=str(agent.socket))
        unknown = command("explain", "--json", "--model", "press", state=state, SOCKET=str(agent.socket))
        ended = agent.terminate()

    said = json.loads(status.stdout)
    assert (said["device"], said["degraded"], said["running"][0]["digest"]) == ("press-1", [], digest)
    assert (said["link"]["mqtt"], said["link"]["server"]) == ("off", field.url)
    assert f"pump@1 ({digest[:12]})" in table.stdout
    assert [set(one) for one in json.loads(reasons.stdout)] == [{"target", "base", "explained", "reasons"}] * 3
    assert refusal(unknown) == "serving.unknown-model"
    assert ended == 0
    # The window was far from full: stopping has closed it, and sent it.
    with field.home.database.read() as session:
        device = session.get(Device, "press-1")
        assert device is not None
        assert device.running_digest == digest
        assert [w.rows for w in session.query(WindowRow)] == [30]
    assert not agent.socket.exists()


def _port_of(agent: RunningAgent) -> int:
    for line in agent.log.read_text().splitlines():
        if "serving on ('" in line:
            return int(line.rpartition(",")[2].strip(" )"))
    pytest.fail(f"no port in {agent.log.read_text()}")


def test_a_fault_of_data_does_not_wait_for_the_next_report(field: Field) -> None:
    state, digest = seeded(field)
    with RunningAgent(state, WINDOW_ROWS="60", REPORT_SECONDS="600", POLL_SECONDS="900") as agent:
        agent.wait_for(digest)
        stuck = training_rows(60)
        stuck[:, 1] = stuck[0, 1]
        request = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [60, 4], "data": stuck.tolist()}]}
        assert agent._http.post("/v2/models/pump/infer", json=request).status_code == 200

        def told() -> list[tuple[str, str]]:
            with field.home.database.read() as session:
                return [(a.kind, a.device) for a in session.query(Alarm)]

        until(lambda: bool(told()), 180)
    assert told()[0] == ("data", "press-1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_agent_whose_control_plane_is_gone_still_stops_in_order_and_keeps_its_reports(
    field: Field, number: int
) -> None:
    state, digest = seeded(field)
    field.fault(".", status=503)
    with RunningAgent(state, WINDOW_ROWS="1000") as agent:
        until(lambda: agent.serving() == [digest])
        agent._http.post("/v2/models/pump/infer", json=rows_of(5))
        agent.process.send_signal(number)
        ended = agent.process.wait(60)

    assert ended == 0, agent.log.read_text()
    assert "Traceback" not in agent.log.read_text()
    field.well_again()
    with RunningAgent(state, WINDOW_ROWS="1000") as agent:
        until(lambda: agent.status().get("link", {}).get("outbox_records") == 0)
        agent.terminate()
    with field.home.database.read() as session:
        assert [w.rows for w in session.query(WindowRow)] == [5]


def test_a_device_without_a_model_runs_and_says_so(field: Field) -> None:
    state = field.enrolled().folder.parent
    with RunningAgent(state) as agent:
        until(agent.status)
        assert agent.status()["degraded"] == ["serving.no-model"]
        assert agent._http.post("/v2/models/pump/infer", json=rows_of(1)).status_code == 503
        assert agent._http.get("/v2/health/ready").status_code == 503
        assert agent._http.get("/v2/health/live").status_code == 200
        assert agent.terminate() == 0


def test_nobody_at_home_is_a_link_error(tmp_path: Path) -> None:
    done = command("status", "--json", "--url", "http://127.0.0.1:1", state=tmp_path)

    assert refusal(done) == "link.unreachable"


class _Stranger(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.said)  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("said", [b"<html>", b"[]", b"{}", b'"ok"', b'{"device": "x"}'])
def test_a_stranger_on_the_port_is_not_taken_for_an_agent(tmp_path: Path, said: bytes) -> None:
    with HTTPServer(("127.0.0.1", 0), _Stranger) as stranger:
        stranger.said = said  # type: ignore[attr-defined]
        thread = Thread(target=stranger.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{stranger.server_port}"
        assert httpx.get(url).content == said
        done = command("status", "--json", "--url", url, state=tmp_path)
        stranger.shutdown()
        thread.join()

    assert refusal(done) == "link.unreachable"


def test_an_agent_started_twice_on_one_port_leaves_the_first_alone(field: Field) -> None:
    state, digest = seeded(field)
    other = field.enrolled("press-2").folder.parent
    with RunningAgent(state) as agent:
        agent.wait_for(digest)
        done = command("run", "--json", "--http-port", str(_port_of(agent)), state=other)
        assert refusal(done) == "settings.port-taken"
        assert agent.serving() == [digest]
        assert agent.terminate() == 0


def test_no_secret_is_written_to_the_log(field: Field) -> None:
    state, digest = seeded(field)
    with RunningAgent(state, LOG_LEVEL="debug") as agent:
        agent.wait_for(digest)
        agent.terminate()
    key = (state / "identity" / "key.pem").read_text().splitlines()[1]

    assert key not in agent.log.read_text()
    assert (state / "identity" / "key.pem").stat().st_mode & 0o077 == 0


def test_an_agent_is_not_reached_from_other_machines_by_anybody(field: Field) -> None:
    state, _ = seeded(field)

    done = command("run", "--json", "--http-host", "0.0.0.0", state=state)

    assert refusal(done) == "settings.exposed"
    assert not (state / "boot").exists()


def test_a_token_is_shown_once_and_opens_the_agent(field: Field, tmp_path: Path) -> None:
    state, digest = seeded(field)
    tokens, shown = tmp_path / "tokens", tmp_path / "token"
    key, chain = field.home.ca.issue_server(["localhost"])
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "cert.pem").write_bytes(chain)
    secured = {
        "HTTP_HOST": "0.0.0.0", "HTTP_TOKEN_FILE": str(tokens),
        "HTTP_CERTIFICATE_FILE": str(tmp_path / "cert.pem"), "HTTP_KEY_FILE": str(tmp_path / "key.pem"),
    }  # fmt: skip
    shown.write_text(command("token", "scada", state=state, HTTP_TOKEN_FILE=str(tokens)).stdout)
    again = command("token", "scada", "--json", state=state, HTTP_TOKEN_FILE=str(tokens))
    assert refusal(again) == "settings.invalid"
    assert shown.read_text().strip() not in tokens.read_text()

    with RunningAgent(state, **secured) as agent:
        agent.wait_for(digest)
        url = f"https://localhost:{_port_of(agent)}"
        ca = ("--ca", str(field.home.ca.certificate_path))
        told = command("status", "--json", "--url", url, *ca, "--token-file", str(shown), state=state)
        without = command("status", "--json", "--url", url, *ca, state=state)
        by_socket = command("status", "--json", state=state, SOCKET=str(agent.socket), **secured)
        assert agent.terminate() == 0

    assert [r["digest"] for r in json.loads(told.stdout)["running"]] == [digest]
    assert refusal(without) == "serving.token"
    assert json.loads(by_socket.stdout)["device"] == json.loads(told.stdout)["device"]


# import ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code"), [(None, "media.unreadable"), (b"", "media.malformed"), (b"no media" * 200, "media.malformed")]
)
def test_what_is_no_media_file_is_refused_and_leaves_nothing(
    field: Field, tmp_path: Path, content: bytes | None, code: str
) -> None:
    state, _ = seeded(field)
    before = sorted(p.name for p in state.iterdir())
    stick = tmp_path / "stick.media"
    if content is not None:
        stick.write_bytes(content)

    done = command("import", "--json", str(stick), state=state)

    said = json.loads(done.stderr.splitlines()[-1])
    assert (said["code"], done.returncode, done.stdout) == (code, EXIT_STATUS["media"], "")
    assert sorted(p.name for p in state.iterdir()) == before


def test_nothing_is_imported_where_no_device_is_enrolled(tmp_path: Path) -> None:
    done = command("import", "--json", str(tmp_path / "stick.media"), state=tmp_path / "state")

    assert json.loads(done.stderr.splitlines()[-1])["code"] == "enrol.not-enrolled"
    assert not (tmp_path / "state").exists()
