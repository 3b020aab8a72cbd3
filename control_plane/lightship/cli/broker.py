"""CLI: the MQTT broker: whether one gives what Lightship relies on."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from lightship.home import Home, operator
from lightship.settings import Settings
from lightship_agent.contract.codes import SettingsError
from lightship_agent.files import storage_error, write_durably

from .console import console, emit, json_option, opened, say, table, with_home

if TYPE_CHECKING:
    from lightship.fleet.broker_contract import Finding
    from lightship.fleet.broker_trials import Target

_PORTS = {"mqtt": 1_883, "mqtts": 8_883}
#: Names of ours that no worker goes by, unless there are as many as there may be.
_SEATS = (15, 14)
_COLOURS = {"ok": "green", "missing": "yellow", "broken": "red", "unknown": "dim"}


@click.group()
def broker() -> None:
    """The MQTT broker."""


def _credential_options(command: Any) -> Any:
    roles = (
        ("", "of who tries it; it may read and write below the prefix, as ingest may below lightship/v1"),
        ("second-", "of another like it; needed where the broker names sessions by who connects"),
        ("device-", "of a device, to see what it may not do"),
    )
    for prefix, whose in reversed(roles):
        for name, what in (
            ("key", "Its key, PEM, not encrypted"),
            ("cert", "Client certificate, PEM"),
            ("password-file", "A file with the password"),
            ("username", "User name"),
        ):
            kind = None if name == "username" else click.Path(exists=True, dir_okay=False)
            command = click.option(f"--{prefix}{name}", type=kind, help=f"{what}, {whose}.")(command)
    return command


@broker.command()
@click.argument("url", required=False)
@click.option("--ca", type=click.Path(exists=True, dir_okay=False), help="PEM of who vouches for it.")
@_credential_options
@click.option("--device-name", default="", help="What the device is called in topics. Default: its user name.")
@click.option("--prefix", default="lightship/v1/_check", show_default=True, help="Throw-away topics begin with it.")
@click.option(
    "--offline-messages",
    type=click.IntRange(1, 1_000_000),
    default=2_000,
    show_default=True,
    help="How many are sent to a session that is away.",
)
@json_option
@click.pass_obj
def check(
    settings: Settings, /, url: str | None, prefix: str, offline_messages: int, as_json: bool, **given: str | None
) -> None:
    """Find out whether a broker gives what Lightship relies on, and what is lost where it doesn't.

    URL is mqtts://HOST:PORT or mqtt://HOST:PORT; without one, the broker of `lightship up` is checked, with
    certificates made for it. It takes half a minute. Nothing stays behind, but a dead letter where ingest is running.
    A broker with a bug may not survive it: try one that nobody uses yet.

    Exit status: 0 nothing is missing, 3 something is and Lightship works without, 4 it should not be used like this, 22
    it can't be reached or lets us in by no name, 12 or 2 wrong usage.
    """
    import msgspec

    from lightship.fleet.broker_contract import exit_status, judge
    from lightship.fleet.broker_trials import check as hold

    with _given(url, given) if url else _ours(settings) as target:
        chosen = replace(target, prefix=prefix.rstrip("/"), offline=offline_messages)
        facts = hold(chosen, begin=_progress(as_json))
    findings = judge(facts)
    if as_json:
        emit({"findings": [f.facts() for f in findings], "facts": msgspec.to_builtins(facts)})
    else:
        _print(findings)
    sys.exit(exit_status(findings))


@broker.command("home-assistant")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="A folder for what it needs (0700)."
)
@json_option
@with_home
def home_assistant(home: Home, out: Path, as_json: bool) -> None:
    """Issue the certificate by which Home Assistant may read what devices tell it, at our mosquitto.

    With the setting home_assistant, here and on the devices; see docs/brokers.md.
    """
    from lightship.fleet.broker import admit_home_assistant

    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise storage_error(e, out) from e
    key, chain = admit_home_assistant(home.database, home.ca, actor=operator())
    names = {"ca": out / "ca.pem", "certificate": out / "home-assistant.pem", "key": out / "home-assistant.key"}
    write_durably(names["ca"], home.ca.certificate_pem())
    write_durably(names["certificate"], chain)
    write_durably(names["key"], key, mode=0o600)
    if as_json:
        emit({name: str(path) for name, path in names.items()})
    else:
        say("\n".join(f"{name:<12}{path}" for name, path in names.items()))


def _progress(as_json: bool) -> Callable[[str], None]:
    def begin(name: str) -> None:
        if not as_json and sys.stderr.isatty():
            click.echo(f"\r\x1b[K{name} …", nl=False, err=True)

    return begin


def _print(findings: list[Finding]) -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)
    rows = [(f.level.value, f.name, f.found) for f in findings]
    table("The broker", ("", "what", "found"), rows)
    out = console()
    for f in findings:
        if f.level in ("missing", "broken"):
            out.print(f"{f.level.value}: {f.name}", style=_COLOURS[f.level.value])
            out.print(f"  lost: {f.loses}.\n  {f.remedy}")
    unknown = [f.name for f in findings if f.level == "unknown"]
    if unknown:
        say(f"Not found out: {'; '.join(unknown)}.")


@contextmanager
def _given(url: str, given: dict[str, str | None]) -> Iterator[Target]:
    """The broker at that address, and the credentials that were given."""
    from lightship.fleet.broker_doors import context
    from lightship.fleet.broker_seat import Credential
    from lightship.fleet.broker_trials import Target

    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        port = 0
    if not port or not parts.hostname or parts.path.strip("/"):
        raise SettingsError("settings.invalid", f"Expected mqtts://HOST[:PORT] or mqtt://HOST[:PORT], found {url!r}.")
    if parts.password or parts.username:
        remedy = "Give --username and --password-file."
        raise SettingsError("settings.invalid", "An address may hold no credentials.", remedy=remedy)
    tls = parts.scheme == "mqtts"

    def credential(role: str) -> Credential | None:
        cert, key, user = (given[f"{role}{name}"] for name in ("cert", "key", "username"))
        if bool(cert) != bool(key):
            raise SettingsError("settings.invalid", f"--{role}cert and --{role}key go together.".replace("_", "-"))
        if role and not (cert or user):
            return None
        pair = (cert, key) if cert and key else None
        secret = given[f"{role}password_file"]
        password = Path(secret).read_text(encoding="utf-8").strip() if secret else ""
        return Credential(context(given["ca"], pair) if tls else None, user or "", password)

    main = credential("")
    assert main is not None
    name = given["device_name"] or given["device_username"] or _common_name(given["device_cert"])
    yield Target(
        host=parts.hostname,
        port=port,
        main=main,
        bare=Credential(context(given["ca"]) if tls else None),
        second=credential("second_"),
        device=credential("device_"),
        device_name=name,
        certificate=(given["cert"], given["key"]) if given["cert"] and given["key"] else None,
    )


def _common_name(cert: str | None) -> str:
    if not cert:
        return ""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        subject = x509.load_pem_x509_certificate(Path(cert).read_bytes()).subject
    except ValueError as e:
        raise SettingsError("settings.invalid", f"{cert} holds no certificate: {e}.") from e
    return "".join(str(a.value) for a in subject.get_attributes_for_oid(NameOID.COMMON_NAME)[:1])


@contextmanager
def _ours(settings: Settings) -> Iterator[Target]:
    """The broker of `lightship up`, with certificates for an hour, or its passwords."""
    from lightship.fleet.broker import known_broker, worker_name
    from lightship.fleet.broker_doors import context
    from lightship.fleet.broker_seat import Credential
    from lightship.fleet.broker_trials import Target

    with opened(settings) as home, TemporaryDirectory(prefix="lightship-check-") as folder:
        info = known_broker(home.path / "broker")
        ca = str(home.ca.certificate_path)
        device = f"check-{secrets.token_hex(4)}"
        bare = Credential(context(ca))
        if info.auth == "password":
            main = Credential(bare.tls, info.control_username, info.control_password)
            theirs = Credential(bare.tls, info.device_username, info.device_password)
            yield Target(host=info.host, port=info.port, main=main, bare=bare, device=theirs, device_name=device)
            return
        names = [*(worker_name(n) for n in _SEATS), device]
        pairs = [_certificate(home, Path(folder), name) for name in names]
        main, second, theirs = (Credential(context(ca, pair)) for pair in pairs)
        yield Target(
            host=info.host,
            port=info.port,
            main=main,
            second=second,
            bare=bare,
            device=theirs,
            device_name=device,
            certificate=pairs[0],
        )


def _certificate(home: Home, folder: Path, name: str) -> tuple[str, str]:
    key, chain = home.ca.issue_client(name, timedelta(hours=1))
    write_durably(folder / f"{name}.key", key, mode=0o600)
    write_durably(folder / f"{name}.pem", chain)
    return str(folder / f"{name}.pem"), str(folder / f"{name}.key")
