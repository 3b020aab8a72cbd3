"""System: the unit files say what systemd understands, and give away no more than they must."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lightship_agent.contract.codes import EXIT_STATUS
from lightship_agent.settings import SETTINGS, load_settings

UNITS = Path(__file__).parents[2] / "systemd"
SERVICES = ("lightship-agent.service", "lightship.service")
#: Newer than some systemd that we support: it says so, ignores them, and goes on.
NEWER_KEYS = {"RestartSteps", "RestartMaxDelaySec"}

needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
needs_root_tools = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("systemd-sysusers") is None or shutil.which("systemd-tmpfiles") is None,
    reason="needs root, systemd-sysusers and systemd-tmpfiles",
)


def analyze(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        ["systemd-analyze", *arguments, "--no-pager"], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def keys(service: str) -> dict[str, list[str]]:
    """Every key of a unit with its values."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / service).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.system
@needs_analyze
@pytest.mark.parametrize("service", SERVICES)
def test_systemd_understands_the_unit(service: str, tmp_path: Path) -> None:
    """The program is not installed on the machine that tests, so one that is takes its place."""
    unit = tmp_path / service
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", (UNITS / service).read_text(), flags=re.MULTILINE))
    _, said = analyze("verify", str(unit))
    # The status also counts faults of the machine's own units.
    ours = [line for line in said.splitlines() if service in line]
    surprises = [line for line in ours if not any(f"'{key}'" in line for key in NEWER_KEYS)]
    assert surprises == []


@pytest.mark.system
@needs_analyze
@pytest.mark.parametrize("service", SERVICES)
def test_the_units_exposure_is_at_most_three_of_ten(service: str) -> None:
    _, said = analyze("security", "--offline=true", str(UNITS / service))
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", said)
    assert found, said
    assert float(found[1]) <= 3.0


@pytest.mark.system
@needs_root_tools
def test_accounts_and_folders_are_made_with_the_modes_that_secrets_need(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    root = f"--root={tmp_path}"
    subprocess.run(["systemd-sysusers", root, str(UNITS / "sysusers.d/lightship.conf")], check=True, timeout=60)
    subprocess.run(
        ["systemd-tmpfiles", "--create", root, str(UNITS / "tmpfiles.d/lightship.conf")], check=True, timeout=60
    )
    accounts = [line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines()]
    uids = {fields[0]: int(fields[2]) for fields in accounts}
    assert set(uids) == {"lightship-agent", "lightship"}
    assert all(fields[6].endswith("nologin") for fields in accounts)
    for name, uid in uids.items():
        folder = (tmp_path / "var/lib" / name).stat()
        assert (folder.st_mode & 0o777, folder.st_uid) == (0o700, uid)


def test_the_agent_is_not_restarted_for_want_of_an_identity_and_for_all_else_is() -> None:
    unit = keys("lightship-agent.service")
    assert unit["RestartPreventExitStatus"] == [str(EXIT_STATUS["enrol"])]
    assert unit["Restart"] == ["on-failure"]
    assert unit["StartLimitIntervalSec"] == ["0"]


def test_the_agent_notifies_and_is_watched() -> None:
    unit = keys("lightship-agent.service")
    assert unit["Type"] == ["notify"]
    assert unit["NotifyAccess"] == ["main"]
    assert int(unit["WatchdogSec"][0]) >= 60, "one report over a slow HTTPS link must not look like a hang"


@pytest.mark.parametrize("service", SERVICES)
def test_onnxruntime_reports_to_nobody_and_takes_no_settings_from_a_model(service: str) -> None:
    unit = keys(service)
    assert "ORT_DISABLE_TELEMETRY=1" in unit["Environment"]
    assert "ORT_LOAD_CONFIG_FROM_MODEL" in unit["UnsetEnvironment"][0].split()


def test_the_state_directory_of_the_unit_is_the_one_that_the_settings_name() -> None:
    unit = keys("lightship-agent.service")
    named = next(v for v in unit["Environment"] if v.startswith("LIGHTSHIP_AGENT_STATE_DIR="))
    assert named.partition("=")[2].replace("%S", "/var/lib") == str(load_settings({}).state_dir)


def test_the_example_of_the_settings_file_names_real_settings_and_their_defaults() -> None:
    lines = (UNITS / "agent.env.example").read_text().splitlines()
    shown = dict(line[1:].split("=", 1) for line in lines if line.startswith("#LIGHTSHIP_"))
    defaults = {s.env: s.default for s in SETTINGS}
    assert shown
    assert set(shown) <= set(defaults)
    paths = {f"LIGHTSHIP_AGENT_{name}" for name in ("SOCKET", "FRAMES_SOCKET", "BINDINGS")}
    paths |= {s.env for s in SETTINGS if s.name.startswith("http_") and s.name.endswith("_file")}
    wrong = {k for k, v in shown.items() if v != defaults[k] and k not in paths}
    assert wrong == set(), "paths are examples; the rest are the defaults"
    load_settings(shown)
