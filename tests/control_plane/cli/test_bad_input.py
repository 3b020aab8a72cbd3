"""What an operator may get wrong: each is an error with a code and its exit status, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import pytest

from lightship.cli import cli, main
from lightship.integrations import mosquitto, rumqttd
from lightship_agent.contract.codes import EXIT_STATUS

WIDTHS = [f"{i % 7 + 0.5},{i % 11},{'even' if i % 2 == 0 else 'odd'}" for i in range(120)]
#: What a refused command may add: the run that was refused, the record of it, and the log beside the database.
RECORDS = {"runs", "audit_events"}
BESIDE = ("lightship.db", "lightship.db-wal", "lightship.db-shm")


@pytest.fixture
def place(fresh_home: Path, tmp_path: Path) -> Path:
    """A folder with a home, and one CSV file that is right."""
    shutil.copytree(fresh_home, tmp_path / "home")
    csv(tmp_path / "good.csv", WIDTHS)
    return tmp_path


def csv(path: Path, lines: list[str], header: str = "width,height,kind") -> Path:
    path.write_text("\n".join([header, *lines, ""]))
    return path


def run(place: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status and what was said on both streams."""
    capsys.readouterr()
    try:
        main(["--home", str(place / "home"), *words])
        status = 0
    except SystemExit as e:
        status = int(e.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def kept(home: Path) -> dict[str, Any]:
    """Every file of a home by content, and every table that is not a record by its rows."""
    files = {p: p.read_bytes() for p in home.rglob("*") if p.is_file() and p.name not in BESIDE}
    with closing(sqlite3.connect(home / "lightship.db")) as db:
        names = [name for (name,) in db.execute("select name from sqlite_master where type = 'table'")]
        rows = {n: db.execute(f"select * from {n}").fetchall() for n in names if n not in RECORDS}
    return {"files": files, "rows": rows}


def refused(place: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """Run a command that must be refused: its error, after a look at the exit status and at what it left."""
    before = kept(place / "home")
    error = failed(place, capsys, *words)
    assert kept(place / "home") == before
    return error


def failed(place: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    status, out, err = run(place, capsys, *words, "--json")
    error: dict[str, str] = json.loads(err.strip().splitlines()[-1])
    assert status == EXIT_STATUS[error["code"].partition(".")[0]]
    assert out == ""
    return error


DATA = ("--name", "shapes", "--target", "kind")


@pytest.mark.parametrize(
    ("lines", "header", "code", "says"),
    [
        pytest.param(WIDTHS, "width,height,sort", "data.column-missing", "No column 'kind'", id="no target"),
        pytest.param(
            [*WIDTHS, "wide,3,odd"], "width,height,kind", "data.type", "line 122, column 'width'", id="a word"
        ),
        pytest.param([*WIDTHS, "NaN,3,odd"], "width,height,kind", "data.missing-value", "line 122", id="NaN"),
        pytest.param([*WIDTHS, ",3,odd"], "width,height,kind", "data.missing-value", "line 122", id="no value"),
        pytest.param([*WIDTHS, "inf,3,odd"], "width,height,kind", "data.range", "float32", id="infinity"),
        pytest.param([*WIDTHS, "3,odd"], "width,height,kind", "data.unreadable", "line 122 has 2", id="a cell short"),
        pytest.param([], "width,height,kind", "data.empty", "", id="no rows"),
    ],
)
def test_data_that_cannot_be_used_is_refused_with_its_place(
    place: Path, capsys: pytest.CaptureFixture[str], lines: list[str], header: str, code: str, says: str
) -> None:
    bad = csv(place / "bad.csv", lines, header)

    error = refused(place, capsys, "data", "add", str(bad), *DATA)

    assert error["code"] == code
    assert says in error["error"]


@pytest.mark.parametrize(
    ("estimator", "code", "says"),
    [
        ("forest", "train.unknown-estimator", "Did you mean random-forest"),
        ("sklearn.svm.Nope", "train.unknown-estimator", "There is no 'sklearn.svm.Nope'"),
        ("os.system", "train.unknown-estimator", "a path under: sklearn"),
        ("sklearn.dummy.DummyClassifier", "convert.failed", "lightship model import"),
    ],
)
def test_an_estimator_that_is_unknown_or_has_no_converter_leaves_no_version(
    place: Path, capsys: pytest.CaptureFixture[str], estimator: str, code: str, says: str
) -> None:
    assert run(place, capsys, "data", "add", str(place / "good.csv"), *DATA)[0] == 0

    error = refused(place, capsys, "train", "shapes", "--model", "shapes", "--estimator", estimator)

    assert error["code"] == code
    assert says in error["error"]


def test_a_file_that_is_no_model_leaves_no_version(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "broken.onnx").write_bytes(b"nonsense" * 40)
    reference = ("--data", str(place / "good.csv"), "--target", "kind")

    error = refused(place, capsys, "model", "import", str(place / "broken.onnx"), "--model", "mine", *reference)

    assert error["code"] == "convert.invalid-onnx"


@pytest.mark.parametrize("port", ["api", "device", "mqtt"])
def test_a_port_that_is_taken_is_named_with_its_setting(
    place: Path, capsys: pytest.CaptureFixture[str], port: str
) -> None:
    ports = dict.fromkeys(("api", "device", "mqtt"), "0")
    with closing(socket.create_server(("127.0.0.1", 0))) as stranger:
        ports[port] = str(stranger.getsockname()[1])
        flags = [word for name, value in ports.items() for word in (f"--{name}-port", value)]
        status, _, err = run(place, capsys, "up", *flags)

    assert status == EXIT_STATUS["settings"]
    assert "error [settings.port-taken]" in err
    assert f"Set {port}_port to another port" in err


def test_where_there_is_no_broker_at_all_the_control_plane_does_not_start(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosquitto, "find", lambda: None)
    monkeypatch.setattr(rumqttd, "available", lambda: False)

    status, _, err = run(place, capsys, "up", "--api-port", "0", "--device-port", "0", "--mqtt-port", "0")

    assert status == EXIT_STATUS["link"]
    assert "error [link.broker]" in err


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not made or made.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.system
@pytest.mark.parametrize(
    "words",
    [("data", "add", "good.csv", *DATA), ("device", "token"), ("train", "old", "--model", "old", "--estimator", "svc")],
    ids=lambda words: words[0],
)
def test_a_full_disk_is_said_to_be_full_and_the_command_works_once_there_is_room(
    place: Path,
    tiny_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(place)
    shutil.move(place / "home", tiny_disk)
    run(tiny_disk, capsys, "data", "add", "good.csv", "--name", "old", "--target", "kind")
    before, room = kept(tiny_disk / "home"), os.statvfs(tiny_disk)
    (tiny_disk / "ballast").write_bytes(bytes((room.f_bavail - 2) * room.f_frsize))

    error = failed(tiny_disk, capsys, *words)
    (tiny_disk / "ballast").unlink()

    assert error["code"] == "storage.full"
    assert kept(tiny_disk / "home") == before
    assert run(tiny_disk, capsys, *words)[0] == 0


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
            if command.invoke_without_command:
                yield (*words, name), command
        else:
            yield (*words, name), command


def test_every_command_speaks_json() -> None:
    every = dict(commands(cli))

    assert {"up", "train", "release publish", "rollout watch", "audit verify"} <= {" ".join(words) for words in every}
    assert [words for words, command in every.items() if "as_json" not in {p.name for p in command.params}] == []
