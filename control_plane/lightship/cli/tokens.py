"""CLI: API tokens of operators and their programs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import click

from lightship.access.rules import Role
from lightship.home import Home, operator
from lightship.settings import Settings
from lightship_agent.files import write_durably

from .console import ago, emit, json_option, opened, say, stamp, table, with_home

_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
LONGEST: Final = 366 * 86_400


def _span(_context: click.Context, _option: click.Parameter, value: str) -> int:
    """`90d` as seconds."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", value)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 60 <= seconds <= LONGEST:
        message = f"expected a number with s, m, h or d, from 60s to 366d; found {value!r}"
        raise click.BadParameter(message)
    return seconds


@click.group()
def token() -> None:
    """API tokens: who may do what through the operator API. (Join tokens of devices: `device token`.)"""


@token.command()
@click.argument("name")
@click.option("--role", type=click.Choice([r.value for r in Role]), required=True, help="What it may do.")
@click.option("--environment", help="Where it is good. Default: this server's environment.")
@click.option(
    "--ttl",
    metavar="SPAN",
    callback=_span,
    default="90d",
    show_default=True,
    help="How long it is good: 45m, 12h, 90d.",
)
@click.option("--reason", default="", help="Why; it is audited.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the token to a file (0600) instead of the screen.")
@json_option
@click.pass_obj
def create(
    settings: Settings,
    name: str,
    role: str,
    environment: str | None,
    ttl: int,
    reason: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Make an API token. It is shown once; only its hash is stored."""
    from lightship.access import tokens

    where = environment or settings.environment
    with opened(settings) as home, home.database.write() as session:
        made = tokens.create(
            session,
            name=name,
            role=Role(role),
            environment=where,
            ttl_seconds=ttl,
            actor=operator(),
            reason=reason,
        )
        if out is not None:
            # Before the commit: a token nobody has seen must not stay behind.
            write_durably(out, made.encode(), mode=0o600)
            made = f"written to {out}"
    if as_json:
        emit({"name": name, "role": role, "environment": where, "ttl": ttl, "token": made})
    else:
        click.echo(made)


@token.command("list")
@json_option
@with_home
def list_(home: Home, as_json: bool) -> None:
    """All tokens, also expired and revoked ones; never their secrets."""
    from lightship.api import views

    with home.database.read() as session:
        rows = views.api_tokens(session)
    if as_json:
        emit(rows)
        return
    cells = [
        (
            r["name"],
            r["role"],
            r["environment"],
            r["state"],
            stamp(r["expires_at"]),
            ago(r["last_used_at"]),
            r["last_used_from"],
            r["created_by"],
        )
        for r in rows
    ]
    table("API tokens", ("name", "role", "environment", "state", "expires", "used", "from", "made by"), cells)


@token.command()
@click.argument("name")
@click.option("--reason", required=True, help="Why; it is audited.")
@json_option
@with_home
def revoke(home: Home, name: str, reason: str, as_json: bool) -> None:
    """Refuse a token from its next request on, and end the browser sessions it began."""
    from lightship.access import tokens

    with home.database.write() as session:
        tokens.revoke(session, name, actor=operator(), reason=reason)
    if as_json:
        emit({"name": name, "state": "revoked"})
    else:
        say(f"The token {name} is revoked.")
