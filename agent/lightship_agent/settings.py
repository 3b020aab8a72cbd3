"""Settings of the agent: one table, read from the environment and from command-line flags.

Rules:
* every setting has one row in SETTINGS; docs/reference/settings.md is generated from it;
* a flag wins over the environment, the environment over the default;
* secrets are never settings: they live in files with mode 0600.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from .contract.codes import SettingsError
from .contract.manifest import PROVIDERS
from .contract.topics import check_discovery_prefix
from .monitor.redaction import parse_redaction
from .update.windows import parse_windows


class Setting(msgspec.Struct, frozen=True):
    """One row: the environment variable is LIGHTSHIP_AGENT_<NAME>."""

    name: str
    default: str
    help: str
    unit: str = ""

    @property
    def env(self) -> str:
        """The environment variable that sets it."""
        return f"LIGHTSHIP_AGENT_{self.name.upper()}"


SETTINGS: Final[tuple[Setting, ...]] = (
    Setting("state_dir", "/var/lib/lightship-agent", "Where identity, bundles and the outbox live."),
    Setting(
        "http_host",
        "127.0.0.1",
        "Address the HTTP endpoint binds to. Any but loopback needs TLS, and tokens or client certificates.",
    ),
    Setting("http_port", "8500", "Port of the HTTP endpoint; 0 picks a free one."),
    Setting(
        "http_request_seconds",
        "30",
        "How long a prediction may take from the request's first byte, unless the client says another time; 0: any.",
        "s",
    ),
    Setting("http_certificate_file", "", "PEM certificate and chain of the HTTP endpoint; empty: no TLS."),
    Setting("http_key_file", "", "Its key, PEM, not encrypted."),
    Setting("http_client_ca_file", "", "PEM of the authority whose certificates clients must show; empty: none."),
    Setting(
        "http_token_file",
        "",
        "Names and sha256 of the tokens that clients must show, as `lightship-agent token` writes it; empty: none.",
    ),
    Setting(
        "http_allowed_hosts",
        "",
        "Names in Host that this agent answers to on loopback, beside localhost and 127.0.0.1; separated by commas.",
    ),
    Setting("socket", "", "Path of a Unix socket that serves the same HTTP; empty: none."),
    Setting("frames_socket", "", "Path of a Unix socket for frames, the face of least latency; empty: none."),
    Setting(
        "bindings",
        "",
        "A TOML file that binds topics of a local MQTT broker to models (docs/serving.md); empty: none.",
    ),
    Setting("poll_seconds", "900", "How often to look for an assignment without being poked.", "s"),
    Setting("report_seconds", "300", "How often to send a heartbeat and what has been counted.", "s"),
    Setting("window_rows", "200", "Rows that a drift window has at least.", "rows"),
    Setting(
        "window_min_seconds", "3600", "A window that is younger takes more rows; 0 for windows of `window_rows`.", "s"
    ),
    Setting("window_max_seconds", "3600", "A window that is not full is closed after this time.", "s"),
    Setting("soak_seconds", "30", "How long a new model must serve without failing before it is committed.", "s"),
    Setting("reach_seconds", "120", "How long the control plane may be unreachable after a swap.", "s"),
    Setting(
        "share_labelled_rows",
        "0",
        "Rows with labels to share per report, for retraining; 0 shares none (docs/privacy.md).",
        "rows",
    ),
    Setting("share_rows_a_day", "1000", "Most rows that are shared in a day (UTC), if any.", "rows"),
    Setting("share_kb_a_day", "256", "Most bytes of rows that are shared in a day, in thousands.", "kB"),
    Setting(
        "share_redact",
        "",
        "What is taken out of rows that are shared, separated by commas: field=drop, field=hash (with a salt of this "
        "device's own) or field=round:DIGITS.",
    ),
    Setting("outbox_mb", "64", "Largest size of the on-disk outbox; beyond it the oldest reports go.", "MB"),
    Setting(
        "drain_rate",
        "20",
        "Most messages a second of reports that waited, or that go again; what is new goes at once.",
        "messages/s",
    ),
    Setting(
        "store_mb",
        "4000",
        "Most room that bundles and their downloads may take: what runs, what ran before, and what is on its way; 0: "
        "no limit but the disk's. What runs and what ran before are never removed to make room.",
        "MB",
    ),
    Setting(
        "bandwidth_kbps", "0", "Most bytes a second that downloads of bundles take, in thousands; 0: no cap.", "kB/s"
    ),
    Setting(
        "download_window",
        "",
        "When bundles may be downloaded, in local time: '22:00-06:00', or 'Mon-Fri 01:00-04:00, Sat,Sun 00:00-24:00'; "
        "empty: always.",
    ),
    Setting("install_window", "", "When a downloaded bundle may be tried and put to work; same form; empty: always."),
    Setting(
        "network_class_file",
        "",
        "A file in which a connection manager keeps one word, such as wifi, cellular or metered: the class of the "
        "network in use.",
    ),
    Setting(
        "download_network_classes",
        "",
        "Classes of network on which bundles may be downloaded, separated by commas; empty: any. Where the file can't "
        "be read, the class is unknown, and an unknown class is not an allowed one.",
    ),
    Setting("veto_file", "", "While this file exists nothing is installed; what is in it is reported as the reason."),
    Setting(
        "veto_command",
        "",
        "A command, started without a shell before each installation: exit status 0 means go, 75 later; any other, no "
        "end within 30 s, or a command that is missing, means later too, with a warning. What it prints is the reason.",
    ),
    Setting(
        "model_providers",
        "any",
        "What may compute a model besides the CPU, where its manifest wishes for it and this onnxruntime has it: any, "
        "or names separated by commas (cuda, xnnpack, …); cpu allows nothing else.",
    ),
    Setting(
        "model_threads", "0", "Most threads that one prediction may take; 0: as many as its manifest says.", "threads"
    ),
    Setting(
        "models_mb",
        "0",
        "Most memory that models may take together, as measured when they are loaded; 0: what the device has. A load "
        "that would not fit is refused, and what serves goes on.",
        "MB",
    ),
    Setting(
        "spare_models",
        "1",
        "How many models stay in memory beside those that are needed, to be gone back to at once; 0 frees the memory "
        "of the version before as soon as the next is committed.",
        "models",
    ),
    Setting(
        "model_control",
        "none",
        "none, or explicit: then programs on the device may load and unload versions that it holds over "
        "/v2/repository.",
    ),
    Setting(
        "home_assistant",
        "",
        "Prefix of Home Assistant's MQTT discovery, usually homeassistant: what the device runs and how it is goes to "
        "it over the broker; empty: nothing does, and what was announced before is removed.",
    ),
    Setting("device_class", "generic", "Hardware class that bundles may require."),
    Setting("log_level", "info", "debug, info, warning or error."),
    Setting("log_format", "text", "text, or json: one object a line (docs/logs.md)."),
)


class Settings(msgspec.Struct, frozen=True):
    """The parsed settings; field names are those of SETTINGS."""

    state_dir: Path
    http_host: str
    http_port: int
    http_request_seconds: float
    http_certificate_file: str
    http_key_file: str
    http_client_ca_file: str
    http_token_file: str
    http_allowed_hosts: str
    socket: str
    frames_socket: str
    bindings: str
    poll_seconds: float
    report_seconds: float
    window_rows: int
    window_min_seconds: float
    window_max_seconds: float
    soak_seconds: float
    reach_seconds: float
    share_labelled_rows: int
    share_rows_a_day: int
    share_kb_a_day: int
    share_redact: str
    outbox_mb: int
    drain_rate: float
    store_mb: int
    bandwidth_kbps: int
    download_window: str
    install_window: str
    network_class_file: str
    download_network_classes: str
    veto_file: str
    veto_command: str
    model_providers: str
    model_threads: int
    models_mb: int
    spare_models: int
    model_control: str
    home_assistant: str
    device_class: str
    log_level: str
    log_format: str


MAX_PORT: Final = 65_535
_POSITIVE: Final = {"poll_seconds", "report_seconds", "window_rows", "window_max_seconds", "outbox_mb", "drain_rate"}


def load_settings(environment: Mapping[str, str], overrides: Mapping[str, str | None] | None = None) -> Settings:
    """Settings from `overrides` (flags), then `environment`, then the defaults.

    Raises:
        SettingsError: settings.invalid, naming the variable and the value found.
    """
    flags = overrides or {}
    types = Settings.__annotations__
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        given = flags.get(setting.name)
        raw = given if given is not None else environment.get(setting.env, setting.default)
        values[setting.name] = _parse(setting, types[setting.name], raw)
    level = values["log_level"]
    if level not in {"debug", "info", "warning", "error"}:
        raise SettingsError(
            "settings.invalid", f"log_level: expected debug, info, warning or error, found {values['log_level']!r}."
        )
    if values["log_format"] not in {"text", "json"}:
        raise SettingsError("settings.invalid", f"log_format: expected text or json, found {values['log_format']!r}.")
    if values["model_control"] not in {"none", "explicit"}:
        message = f"model_control: expected none or explicit, found {values['model_control']!r}."
        raise SettingsError("settings.invalid", message)
    check_providers(values["model_providers"])
    parse_redaction(values["share_redact"])
    check_discovery_prefix(values["home_assistant"])
    for name in ("download_window", "install_window"):
        parse_windows(values[name], f"LIGHTSHIP_AGENT_{name.upper()}")
    return Settings(**values)


def check_providers(value: str) -> None:
    """Refuse names that are none.

    Raises:
        SettingsError: settings.invalid.
    """
    unknown = [n for n in (part.strip() for part in value.split(",")) if n and n not in (*PROVIDERS, "cpu", "any")]
    if unknown:
        message = (
            f"LIGHTSHIP_AGENT_MODEL_PROVIDERS: expected any, cpu or some of {', '.join(PROVIDERS)}, found {value!r}."
        )
        raise SettingsError("settings.invalid", message)


def _parse(setting: Setting, kind: str, raw: str) -> Any:
    try:
        value: Any = {"Path": Path, "int": int, "float": float, "str": str}[kind](raw)
    except ValueError as e:
        message = f"{setting.env}: expected {kind}, found {raw!r}."
        raise SettingsError("settings.invalid", message) from e
    if isinstance(value, int | float) and not (1e-9 if setting.name in _POSITIVE else 0) <= value < math.inf:
        expected = "above 0" if setting.name in _POSITIVE else "≥ 0"
        raise SettingsError("settings.invalid", f"{setting.env}: expected a number {expected}, found {raw!r}.")
    if setting.name.endswith("_port") and value > MAX_PORT:
        raise SettingsError("settings.invalid", f"{setting.env}: expected at most {MAX_PORT}, found {raw!r}.")
    return value
