"""CLI: releases: sign and publish, list, revoke, carry away."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from lightship.home import Home, operator

from .console import emit, json_option, say, table, with_home
from .keys import KEY, OUT, PASSPHRASE, add_file_commands, leave, open_keys
from .models import show_version

if TYPE_CHECKING:
    from securesystemslib.signer import Signer


class _PublishByDefault(click.Group):
    """`lightship release digits@1` means `lightship release publish digits@1`."""

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["publish", *args]
        return super().resolve_command(context, args)


@click.group(cls=_PublishByDefault)
def release() -> None:
    """Sign and publish versions (`release REFERENCE`), list and revoke them."""


@release.command()
@click.argument("reference")
@click.option(
    "--deltas/--no-deltas", default=True, show_default=True, help="Make patches from what devices run, where they pay."
)
@KEY
@PASSPHRASE
@OUT
@json_option
@with_home
def publish(
    home: Home,
    reference: str,
    deltas: bool,
    key_files: tuple[Path, ...],
    passphrase_file: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Sign a version's bundle and publish it; where keys are missing, leave a file that others sign."""
    from lightship.api import views
    from lightship.registry import release as releasing

    signers = open_keys(key_files, passphrase_file)
    if out is not None or must_be_carried(home, signers):
        begun = releasing.propose_release(home, reference, signers=signers, deltas=deltas, progress=_progress)
        leave(begun, out, as_json=as_json)
        return
    row = releasing.release(home, reference, actor=operator(), signers=signers, deltas=deltas, progress=_progress)
    with home.database.read() as session:
        show_version(views.model_version(session, row), as_json=as_json)


@release.command("list")
@json_option
@with_home
def released(home: Home, as_json: bool) -> None:
    """What the signed repository lists."""
    rows = home.releases.released()
    if as_json:
        emit([{"path": r.path, "sha256": r.sha256, "length": r.length, "transport": r.transport_length} for r in rows])
        return
    cells = [(r.path, r.sha256[:12], r.length, r.transport_length) for r in rows]
    table("Released bundles", ("path", "sha256", "bytes", "bytes sent"), cells)


@release.command()
@click.argument("reference")
@click.option("--reason", required=True, help="Why; it is audited.")
@KEY
@PASSPHRASE
@OUT
@json_option
@with_home
def revoke(
    home: Home,
    reference: str,
    reason: str,
    key_files: tuple[Path, ...],
    passphrase_file: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """De-list a version: no device accepts it any more, its rollouts are taken back, its champion is the one before."""
    from lightship.api import views
    from lightship.fleet import rollouts
    from lightship.registry import release as releasing
    from lightship.registry import versions

    signers = open_keys(key_files, passphrase_file)
    if out is not None or must_be_carried(home, signers):
        begun = releasing.propose_revocation(home, reference, reason=reason, signers=signers)
        with home.database.write() as session:
            row = versions.resolve(session, reference)
            # Others have yet to sign; until then, at least nobody else gets it.
            rollouts.pause_version(session, row.model, row.version, actor=operator(), reason=f"To be revoked: {reason}")
        leave(begun, out, as_json=as_json)
        return
    row = releasing.revoke(home, reference, actor=operator(), reason=reason, signers=signers)
    with home.database.read() as session:
        facts = views.model_version(session, row)
        running = rollouts.running(session, row.digest)
    show_version(facts, as_json=as_json)
    if running and not as_json:
        say(f"{len(running)} devices still serve it, e.g. {', '.join(running[:5])}: roll out another version.")


def must_be_carried(home: Home, signers: list[Signer]) -> bool:
    """Whether the release list has to be signed elsewhere, too; that a key here is broken is no reason."""
    return bool(home.releases.lacking("releases", signers)) and not any(
        held.problem for held in home.keys.held() if held.role == "releases"
    )


add_file_commands(release)


class _Life(click.ParamType[timedelta]):
    """`30d`, `36h` or `90min` as a time span."""

    name = "TIME"
    _UNITS: ClassVar = {"d": "days", "h": "hours", "min": "minutes"}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Raise a usage error for anything else."""
        if isinstance(value, timedelta):
            return value
        match = re.fullmatch(r"([1-9][0-9]{0,4})(d|h|min)", str(value))
        if match is None:
            self.fail(f"expected a time such as 30d, 36h or 90min, found {value!r}.", param, ctx)
        return timedelta(**{self._UNITS[match[2]]: int(match[1])})


@release.command("export")
@click.option("--device", "devices", multiple=True, help="A device the file is for; may be repeated.")
@click.option("--group", default="", help="All active devices of this group.")
@click.option("--expires", type=_Life(), default="30d", show_default=True, help="How long the file is good: 30d, 36h.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The file, for instance on a stick."
)
@json_option
@with_home
def export_(home: Home, devices: tuple[str, ...], group: str, expires: timedelta, output: Path, as_json: bool) -> None:
    """Write one signed file that brings devices without a network what they are assigned."""
    from lightship.fleet.export import export

    if not devices and not group:
        raise click.UsageError("Give --device, which may be repeated, or --group.")
    made = export(
        home,
        output,
        devices=devices,
        group=group,
        life=expires,
        actor=operator(),
        progress=_progress,
    )
    facts = {
        "file": str(made.path),
        "bytes": made.size,
        "until": made.until.isoformat(),
        "devices": list(made.devices),
        "bundles": list(made.bundles),
    }
    if as_json:
        emit(facts)
        return
    until = f"{made.until:%Y-%m-%d %H:%M} UTC"
    say(f"{made.path}: {made.size / 1e6:.2f} MB, for {len(made.devices)} device(s), good until {until}.")
    say(f"On each of them: lightship-agent import {made.path.name}")


def _progress(text: str) -> None:
    say(f"  {text} …")
