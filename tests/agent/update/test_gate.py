"""The gate: windows, networks and people on site, each of whom may say "not now"."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from lightship_agent.contract.codes import SettingsError
from lightship_agent.settings import load_settings
from lightship_agent.update.gate import DeferredError, Gate, Kind, Rules
from lightship_agent.update.windows import parse_windows

NOON = datetime(2026, 11, 25, 12, 0)  # noqa: DTZ001 - a wall clock on site has no zone


def rules(**settings: object) -> Rules:
    return Rules.of(load_settings({}, {name: str(value) for name, value in settings.items()}))


def deferred(given: Rules, kind: Kind, *, veto_seconds: float = 20.0) -> DeferredError:
    with pytest.raises(DeferredError) as caught:
        Gate(given, now=lambda: NOON, veto_seconds=veto_seconds).check(kind)
    assert caught.value.code == "update.deferred"
    return caught.value


def passes(given: Rules, kind: Kind) -> None:
    Gate(given, now=lambda: NOON, veto_seconds=20.0).check(kind)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return path


# Windows --------------------------------------------------------------------------------------------------------------


def test_without_rules_every_moment_will_do() -> None:
    passes(rules(), "download")
    passes(rules(), "install")


def test_the_windows_for_downloads_and_for_installations_are_two() -> None:
    night_downloads = rules(download_window="22:00-06:00")
    night_installations = rules(install_window="22:00-06:00")

    passes(night_downloads, "install")
    passes(night_installations, "download")
    assert "until Wed 2026-11-25 22:00" in str(deferred(night_downloads, "download"))
    e = deferred(night_installations, "install")
    assert e.until == NOON.replace(hour=22).timestamp()


def test_a_window_follows_the_clock_on_the_wall_where_the_device_is() -> None:
    # One moment, two places: a process in each says whether the window is open there.
    now = time.gmtime()
    window = f"{now.tm_hour:02}:00-{now.tm_hour + 1:02}:00"
    program = (
        "from lightship_agent.settings import load_settings; from lightship_agent.update.gate import Gate, Rules\n"
        f"Gate(Rules.of(load_settings(dict(LIGHTSHIP_AGENT_DOWNLOAD_WINDOW={window!r})))).check('download')"
    )

    def ask(zone: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(sys.path)
        return subprocess.run(
            [sys.executable, "-c", program],
            env={"TZ": zone, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

    far = ask("XYZ-5")  # five hours east of Greenwich
    here = ask("UTC")
    if time.gmtime().tm_hour != now.tm_hour:
        pytest.skip("the hour ended while the test ran")

    assert here.returncode == 0, here.stderr
    assert "DeferredError: The window for downloads is closed until" in far.stderr


# Networks -------------------------------------------------------------------------------------------------------------


def test_a_download_waits_for_a_network_of_an_allowed_class(tmp_path: Path) -> None:
    told = tmp_path / "class"
    given = rules(network_class_file=told, download_network_classes="wifi, Ethernet")

    for word in ("wifi", "ethernet\n", " WiFi "):
        told.write_text(word)
        passes(given, "download")
    told.write_text("cellular\n")

    assert "'cellular'" in str(deferred(given, "download"))
    passes(given, "install")


def test_a_network_of_unknown_class_is_not_an_allowed_one(tmp_path: Path) -> None:
    told = tmp_path / "class"
    given = rules(network_class_file=told, download_network_classes="wifi")

    assert "not known" in str(deferred(given, "download"))
    told.write_bytes(b"")
    deferred(given, "download")
    told.write_bytes(b"\xff\xfe\x00wifi")
    deferred(given, "download")
    told.write_bytes(b"wifi " * 100_000)
    assert len(str(deferred(given, "download"))) < 1_000
    told.unlink()
    told.mkdir()
    deferred(given, "download")
    told.rmdir()
    os.mkfifo(told)  # nobody will ever write to it
    deferred(given, "download")


def test_where_any_network_will_do_its_class_is_not_even_read(tmp_path: Path) -> None:
    passes(rules(network_class_file=tmp_path / "absent"), "download")


def test_a_rule_about_networks_that_cannot_be_judged_is_refused() -> None:
    with pytest.raises(SettingsError, match="network_class_file"):
        rules(download_network_classes="wifi")


# People on site -------------------------------------------------------------------------------------------------------


def test_a_veto_file_defers_the_installation_and_gives_the_reason(tmp_path: Path) -> None:
    veto = tmp_path / "veto"
    given = rules(veto_file=veto)

    passes(given, "install")
    veto.write_text("a batch is running\nuntil six\x1b[31m")
    assert "a batch is running until six [31m" in str(deferred(given, "install"))
    passes(given, "download")
    veto.write_text("")
    assert "no reason" in str(deferred(given, "install"))
    veto.unlink()
    passes(given, "install")


def test_whatever_has_the_name_of_the_veto_file_is_a_veto(tmp_path: Path) -> None:
    veto = tmp_path / "veto"
    given = rules(veto_file=veto)

    veto.symlink_to(tmp_path / "nowhere")
    deferred(given, "install")
    veto.unlink()
    os.mkfifo(veto)
    deferred(given, "install")
    veto.unlink()
    veto.mkdir()
    deferred(given, "install")


def test_a_veto_file_in_a_folder_that_cannot_be_looked_into_counts_as_a_veto(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        deferred(rules(veto_file=tmp_path / ("x" * 300)), "install")  # a name no folder can hold

    assert "can't look at" in caplog.text


def test_a_command_that_says_go_lets_it_through(tmp_path: Path) -> None:
    passes(rules(veto_command=script(tmp_path / "go", "print('fine')")), "install")


def test_a_command_that_says_later_defers_and_its_words_are_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = script(tmp_path / "later", "import sys; print(sys.argv[1:]); sys.exit(75)")

    e = deferred(rules(veto_command=f"{command} 'line 3' $HOME"), "install")

    assert "['line 3', '$HOME']" in str(e)  # no shell has touched it
    assert caplog.text == ""
    passes(rules(veto_command=command), "download")


@pytest.mark.parametrize("ending", ["sys.exit(1)", "sys.exit('no')", "os.kill(os.getpid(), 9)", "raise ValueError"])
def test_a_command_that_ends_in_any_other_way_defers_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: str
) -> None:
    with caplog.at_level(logging.WARNING):
        deferred(rules(veto_command=script(tmp_path / "odd", f"import os, sys; {ending}")), "install")

    assert "counts as later" in caplog.text


def test_a_command_that_is_not_there_defers_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    not_executable = tmp_path / "text"
    not_executable.write_text("hello")

    with caplog.at_level(logging.WARNING):
        deferred(rules(veto_command=tmp_path / "absent"), "install")
        deferred(rules(veto_command=not_executable), "install")

    assert caplog.text.count("can't be started") == 2


def test_a_command_that_hangs_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    text = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r} + '.tmp', 'w').write(str(p.pid))\n"
        f"import os; os.rename({str(child)!r} + '.tmp', {str(child)!r})\n"
        "time.sleep(600)"
    )
    began = time.monotonic()

    e = deferred(rules(veto_command=script(tmp_path / "hang", text)), "install", veto_seconds=3.0)

    assert "did not end within 3 s" in str(e)
    assert time.monotonic() - began < 15
    eventually(lambda: not is_running(int(child.read_text())))


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_command_that_talks_without_end_is_neither_kept_waiting_nor_believed_at_length(tmp_path: Path) -> None:
    text = "import sys\nfor _ in range(20_000): sys.stdout.write('x' * 1_000)\nsys.exit(75)"

    e = deferred(rules(veto_command=script(tmp_path / "talk", text)), "install")

    assert "says later: xxx" in str(e)
    assert len(str(e)) < 1_000


def test_a_command_that_leaves_something_behind_is_not_waited_for_longer_than_itself(tmp_path: Path) -> None:
    text = (
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])\n"
        "print('so be it', flush=True)\nsys.exit(75)"
    )
    began = time.monotonic()

    e = deferred(rules(veto_command=script(tmp_path / "leave", text)), "install")

    assert "so be it" in str(e)
    assert time.monotonic() - began < 20


def test_a_command_sees_no_secrets_and_none_of_our_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_AGENT_STATE_DIR", "/secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    command = script(
        tmp_path / "env", "import os, sys; print(sorted(os.environ)); print(sys.stdin.read()); sys.exit(75)"
    )

    said = str(deferred(rules(veto_command=command), "install"))

    assert "PATH" in said
    assert "LIGHTSHIP" not in said
    assert "AWS" not in said


def test_a_command_with_an_open_quotation_is_refused() -> None:
    with pytest.raises(SettingsError, match="veto_command"):
        rules(veto_command="ask 'line 3")


def test_the_command_is_asked_last_and_only_when_all_else_agrees(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    command = script(tmp_path / "ask", f"open({str(asked)!r}, 'w')")

    deferred(rules(install_window="22:00-06:00", veto_command=command), "install")

    assert not asked.exists()


# Downloads that go on -------------------------------------------------------------------------------------------------


def test_a_download_that_outlasts_its_window_is_told_so() -> None:
    clock = [NOON]
    gate = Gate(Rules(download_window=parse_windows("12:00-12:30")), now=lambda: clock[0])
    still = gate.watch(lambda: False, every=0.0)

    assert still() is False
    clock[0] = NOON.replace(minute=30)
    with pytest.raises(DeferredError, match="2026-11-26 12:00"):
        still()


def test_a_watch_looks_only_now_and_then_but_passes_on_a_stop_at_once() -> None:
    stop = [False]
    gate = Gate(Rules(download_window=parse_windows("22:00-06:00")), now=lambda: NOON)
    still = gate.watch(lambda: stop[0], every=600.0)

    assert still() is False
    stop[0] = True
    assert still() is True
