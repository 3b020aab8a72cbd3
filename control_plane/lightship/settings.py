"""Settings of the control plane: one table, read from flags, the environment and `<home>/settings.toml`.

Rules: every setting has one row in SETTINGS, from which docs/reference/settings.md is generated; a flag wins over the
environment, that over the file, that over the default; secrets are files with mode 0600, never settings.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from lightship_agent.contract.codes import InvalidNameError, SettingsError
from lightship_agent.contract.names import check_name

MAX_PORT: Final = 65_535


@dataclass(frozen=True)
class Setting:
    """One row: the environment variable is LIGHTSHIP_<NAME>."""

    name: str
    default: str
    help: str
    unit: str = ""
    choices: tuple[str, ...] = ()

    @property
    def env(self) -> str:
        """The environment variable that sets it."""
        return f"LIGHTSHIP_{self.name.upper()}"


SETTINGS: Final[tuple[Setting, ...]] = (
    Setting("home", "~/.lightship", "Where the database, artifacts, keys and the release repository live."),
    Setting("tenant", "default", "First level of this fleet's topics."),
    Setting("environment", "development", "What this server is: API tokens made for another environment are refused."),
    Setting("api_host", "127.0.0.1", "Address of the operator API and the dashboard."),
    Setting("api_port", "8600", "Port of the operator API and the dashboard; 0 picks a free one."),
    Setting(
        "api_tls",
        "auto",
        "How the operator API is served: plain HTTP on loopback and HTTPS elsewhere, always HTTPS, or always plain.",
        "",
        ("auto", "on", "insecure"),
    ),
    Setting("api_cert", "", "Its certificate chain, PEM. Empty: one of the built-in CA."),
    Setting("api_key", "", "The key of api_cert, PEM."),
    Setting(
        "api_reads",
        "auto",
        "Whether reading needs a token: none on loopback in the environment development, none on loopback, always one.",
        "",
        ("auto", "open", "token"),
    ),
    Setting("device_host", "127.0.0.1", "Address the device API (HTTPS, mutual TLS) binds to."),
    Setting("device_port", "8643", "Port of the device API; 0 picks a free one."),
    Setting("public_host", "", "Host name devices use to reach us; goes into the certificate. Empty: device_host."),
    Setting("broker", "auto", "Which MQTT broker to start.", "", ("auto", "mosquitto", "embedded", "none")),
    Setting("mqtt_host", "127.0.0.1", "Address the broker binds to."),
    Setting("mqtt_port", "8883", "Port of the broker (MQTT over TLS); 0 picks a free one."),
    Setting(
        "ingest_workers",
        "0",
        "Processes that store reports, up to 16, sharing one subscription; 0: a thread of this one does.",
        "processes",
    ),
    Setting(
        "ingest_mqtt",
        "auto",
        "MQTT version of ingest. 3.1.1 costs a third less CPU; auto: that, where the broker is mosquitto.",
        "",
        ("auto", "3.1.1", "5"),
    ),
    Setting(
        "history",
        "",
        "Where reports are kept as they came: empty for a SQLite file in the home, off, or postgresql://user@host/name.",
    ),
    Setting("history_raw_days", "7", "How long reports are kept as they came.", "days"),
    Setting("history_raw_mb", "2000", "How much room they may take in SQLite; the oldest go first.", "MB"),
    Setting("history_hourly_days", "90", "How long their hourly sums are kept.", "days"),
    Setting("history_daily_days", "730", "How long their daily sums are kept.", "days"),
    Setting(
        "recovery_days",
        "90",
        "How long after its certificate ran out a device gets a new one by itself, for the proof of its key; 0: never.",
        "days",
    ),
    Setting("drift_budget", "1", "False drift alarms allowed per device and horizon.", "alarms"),
    Setting("drift_horizon_windows", "8760", "Windows in the horizon: a year of hourly windows.", "windows"),
    Setting("drift_floor", "0.02", "Smallest effect that may alarm, w² (population PSI of about the same size)."),
    Setting("drift_common_floor", "0.005", "Smallest shift of all devices together that may alarm, w²."),
    Setting("drift_levels", "6", "Window sizes watched: 1, 2, 4, … base windows."),
    Setting("drift_min_rows", "50", "Fewest rows a window needs to be judged.", "rows"),
    Setting("drift_exclude", "", "Features that drift by nature (ids, clocks) and are not watched, by commas."),
    Setting("drift_warm_up", "48", "Windows of its own after which a device is judged by its history.", "windows"),
    Setting("drift_baseline", "336", "Healthy windows of a device that make its baseline, at most.", "windows"),
    Setting("drift_segments", "", "Labels of devices by which drift is also judged, by commas: site, line …"),
    Setting("drift_season_weeks", "4", "Weeks in which each hour of the week is learnt; 0: no seasons.", "weeks"),
    Setting("retrain", "propose", "What sustained fleet drift leads to.", "", ("off", "propose", "auto")),
    Setting("retrain_min_rows", "200", "Labelled rows needed before a proposal can run.", "rows"),
    Setting("reconcile_seconds", "2", "How often rollouts and drift are looked at.", "s"),
    Setting("alert_seconds", "10", "How often it is looked whether anybody is to be told of something.", "s"),
    Setting("alert_report_seconds", "300", "How often devices report; one that misses three is silent.", "s"),
    Setting("alert_group_seconds", "60", "How long findings of a kind wait for one another before they are told.", "s"),
    Setting("alert_group_at", "5", "So many findings of a kind at once become one alert.", "findings"),
    Setting("alert_clear_seconds", "300", "How long nothing must be found before an alert is over.", "s"),
    Setting(
        "alert_remind_hours",
        "12",
        "How often what is open is told again, unless it is acknowledged; 0: never.",
        "h",
    ),
    Setting("alert_certificate_days", "1", "How long before its end a device's certificate is told of.", "days"),
    Setting("alert_dead_letters", "20", "Messages an hour that may be beyond understanding.", "messages"),
    Setting("alert_timeout_seconds", "10", "How long a receiver of alerts may take.", "s"),
    Setting("alert_ca", "", "Authorities, PEM, that receivers of alerts are trusted by, beside the system's."),
    Setting("alert_routes", "", "Who hears of what: `critical=webhook,mail; warning/GROUP=mail`. Empty: all of all."),
    Setting("alert_webhook_url", "", "Where alerts are posted to, https://…; plain http only on loopback."),
    Setting("alert_webhook_secret", "", "File with the secret that signs them, mode 0600."),
    Setting("alert_mail_server", "", "Mail server for alerts, HOST:PORT."),
    Setting(
        "alert_mail_tls",
        "starttls",
        "How the mail server is spoken to; none only on loopback.",
        "",
        ("starttls", "tls", "none"),
    ),
    Setting("alert_mail_user", "", "Who we are to the mail server. Empty: nobody in particular."),
    Setting("alert_mail_password", "", "File with that user's password, mode 0600."),
    Setting("alert_mail_from", "", "Sender of alerts by mail."),
    Setting("alert_mail_to", "", "Recipients of alerts by mail, by commas."),
    Setting("alert_alertmanager_url", "", "A Prometheus Alertmanager for alerts, http://HOST:9093."),
    Setting("alert_alertmanager_token", "", "File with a bearer token for it, mode 0600."),
    Setting(
        "home_assistant",
        "",
        "Discovery prefix under which devices may announce themselves to Home Assistant at our mosquitto. Empty: none.",
    ),
    Setting("log_level", "info", "How much is logged.", "", ("debug", "info", "warning", "error")),
    Setting("log_format", "text", "How: for people, or one JSON object a line (docs/logs.md).", "", ("text", "json")),
)


@dataclass(frozen=True)
class Settings:
    """The parsed settings; field names are those of SETTINGS."""

    home: Path
    tenant: str
    environment: str
    api_host: str
    api_port: int
    api_tls: str
    api_cert: str
    api_key: str
    api_reads: str
    device_host: str
    device_port: int
    public_host: str
    broker: str
    mqtt_host: str
    mqtt_port: int
    ingest_workers: int
    ingest_mqtt: str
    history: str
    history_raw_days: float
    history_raw_mb: float
    history_hourly_days: float
    history_daily_days: float
    recovery_days: float
    drift_budget: float
    drift_horizon_windows: int
    drift_floor: float
    drift_common_floor: float
    drift_levels: int
    drift_min_rows: int
    drift_exclude: str
    drift_warm_up: int
    drift_baseline: int
    drift_segments: str
    drift_season_weeks: int
    retrain: str
    retrain_min_rows: int
    reconcile_seconds: float
    alert_seconds: float
    alert_report_seconds: float
    alert_group_seconds: float
    alert_group_at: int
    alert_clear_seconds: float
    alert_remind_hours: float
    alert_certificate_days: float
    alert_dead_letters: int
    alert_timeout_seconds: float
    alert_ca: str
    alert_routes: str
    alert_webhook_url: str
    alert_webhook_secret: str
    alert_mail_server: str
    alert_mail_tls: str
    alert_mail_user: str
    alert_mail_password: str
    alert_mail_from: str
    alert_mail_to: str
    alert_alertmanager_url: str
    alert_alertmanager_token: str
    home_assistant: str
    log_level: str
    log_format: str

    @property
    def reachable_host(self) -> str:
        """The host name devices use."""
        return self.public_host or self.device_host


def load_settings(environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None) -> Settings:
    """Settings from `overrides` (flags), `environment`, `<home>/settings.toml`, then the defaults.

    Raises:
        SettingsError: settings.invalid, naming the setting and the value found.
    """
    flags = {k: v for k, v in (overrides or {}).items() if v is not None}
    home = Path(str(flags.get("home", environment.get("LIGHTSHIP_HOME", "~/.lightship")))).expanduser()
    file = _read_file(home / "settings.toml")
    types = {f.name: str(f.type) for f in fields(Settings)}
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        raw = flags.get(setting.name, environment.get(setting.env, file.get(setting.name, setting.default)))
        values[setting.name] = _parse(setting, types[setting.name], str(raw))
    values["home"] = home
    for name in ("tenant", "environment"):
        try:
            check_name(name, values[name])
        except InvalidNameError as e:
            raise SettingsError("settings.invalid", f"{name}: {e}") from e
    return Settings(**values)


def _read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise SettingsError("settings.invalid", f"{path} is not readable TOML: {e}.") from e
    unknown = set(values) - {s.name for s in SETTINGS}
    if unknown:
        raise SettingsError("settings.invalid", f"{path}: unknown settings {', '.join(sorted(unknown))}.")
    return values


def _parse(setting: Setting, kind: str, raw: str) -> Any:
    try:
        value: Any = {"Path": Path, "int": int, "float": float, "str": str}[kind](raw)
    except ValueError as e:
        raise SettingsError("settings.invalid", f"{setting.name}: expected {kind}, found {raw!r}.") from e
    if setting.choices and raw not in setting.choices:
        expected = ", ".join(setting.choices)
        raise SettingsError("settings.invalid", f"{setting.name}: expected one of {expected}; found {raw!r}.")
    if isinstance(value, int | float) and not 0 <= value < math.inf:
        raise SettingsError("settings.invalid", f"{setting.name}: expected a number ≥ 0, found {raw!r}.")
    if setting.name.endswith("_port") and value > MAX_PORT:
        raise SettingsError("settings.invalid", f"{setting.name}: expected at most {MAX_PORT}, found {raw!r}.")
    return value
