"""Settings: a flag wins over the environment, that over the default; nonsense is refused with its name."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import SettingsError
from lightship_agent.settings import SETTINGS, Settings, load_settings


def test_without_anything_the_defaults_hold() -> None:
    found = load_settings({})

    assert (found.http_host, found.http_port, found.socket) == ("127.0.0.1", 8500, "")
    assert found.state_dir == Path("/var/lib/lightship-agent")


def test_every_row_is_a_field_and_every_field_a_row() -> None:
    assert [s.name for s in SETTINGS] == [f.name for f in msgspec.structs.fields(Settings)]
    assert all(s.help.endswith(".") for s in SETTINGS)


def test_a_flag_wins_over_the_environment_and_that_over_the_default() -> None:
    environment = {"LIGHTSHIP_AGENT_HTTP_PORT": "9000", "LIGHTSHIP_AGENT_WINDOW_ROWS": "50"}

    found = load_settings(environment, {"http_port": "9100", "window_rows": None})

    assert (found.http_port, found.window_rows) == (9100, 50)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("http_port", "http"), ("http_port", "-1"), ("http_port", ""), ("http_port", "80.5"), ("poll_seconds", "0"),
        ("poll_seconds", "-5"), ("poll_seconds", "soon"), ("window_rows", "0"), ("outbox_mb", "0"),
        ("report_seconds", "0"), ("soak_seconds", "-0.1"), ("http_port", "65536"),
        ("poll_seconds", "nan"), ("report_seconds", "inf"), ("reach_seconds", "nan"), ("log_level", "loud"),
        ("share_labelled_rows", "-1"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings({f"LIGHTSHIP_AGENT_{name.upper()}": value})

    assert refused.value.code == "settings.invalid"
    assert name in refused.value.message.lower()


@given(name=st.sampled_from([s.name for s in SETTINGS]), value=st.text(max_size=12))
def test_any_text_is_a_setting_or_a_settings_error(name: str, value: str) -> None:
    try:
        assert isinstance(load_settings({}, {name: value}), Settings)
    except SettingsError as e:
        assert e.exit_status == 12  # noqa: PT017 - anything else than a SettingsError fails this test


@pytest.mark.parametrize(
    ("name", "value"),
    [("model_providers", "cuda,/lib/evil.so"), ("model_control", "poll"), ("models_mb", "-1"), ("model_threads", "-1")],
)
def test_settings_of_models_that_mean_nothing_are_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings({}, {name: value})
    assert refused.value.code == "settings.invalid"
    assert name.upper() in str(refused.value).upper()
