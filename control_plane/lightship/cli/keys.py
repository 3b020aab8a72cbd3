"""CLI: keys, and the ceremonies that change who signs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from lightship.home import Home, operator
from lightship_agent.contract.codes import ReleaseError

from .console import console, emit, json_option, say, table, with_home

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

    from lightship.release.ceremony import Ceremony
    from lightship.release.changes import RoleKeys

OFFLINE: Final = ("root", "targets", "releases")
ONLINE: Final = ("snapshot", "timestamp", "director")
FILE: Final = click.Path(path_type=Path)
KEY: Final = click.option(
    "--key", "key_files", multiple=True, type=FILE, help="A .pem or .key.json to sign with; may be repeated."
)
PASSPHRASE: Final = click.option(
    "--passphrase-file", type=FILE, help="Holds the key's passphrase, or the token's PIN; - reads standard input."
)
OUT: Final = click.option("--out", type=FILE, help="Where the file to be signed goes. Default: here, by its title.")
_MAX_SECRET: Final = 4_096


@click.group()
def keys() -> None:
    """Who may sign what: keys, thresholds, ceremonies."""


@keys.command()
@click.argument("name", type=FILE)
@PASSPHRASE
@json_option
def create(name: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """Make a key: NAME.pem, which stays where it is, and NAME.pub.json, which is carried to the ceremony."""
    from lightship.release.keyfiles import new_key

    path = name.with_name(f"{name.name}.pem")
    passphrase = secret_of(passphrase_file)("passphrase") if passphrase_file is not None else ""
    key = new_key(path, passphrase=passphrase)
    if as_json:
        emit({"keyid": key.keyid, "private": str(path), "public": f"{name}.pub.json", "sealed": bool(passphrase)})
        return
    say(
        f"Made {path} ({'sealed with the passphrase' if passphrase else 'NOT sealed: keep it on a medium of its own'})."
    )
    say(f"Carry {name}.pub.json to the ceremony. Its key id begins with {key.keyid[:8]}; all of it: {key.keyid}")


@keys.command("add-uri")
@click.argument("uri")
@click.argument("name", type=FILE)
@click.option("--pin-file", type=FILE, help="Kept in the file: where a key that signs without a person finds its PIN.")
@PASSPHRASE
@json_option
def add_uri(uri: str, name: Path, pin_file: Path | None, passphrase_file: Path | None, as_json: bool) -> None:
    """Name a key in a token, KMS or vault: NAME.key.json is used like a key, and like its public half."""
    from lightship.release.keyfiles import public_json, write_new
    from lightship.release.uris import import_uri

    path = name.with_name(f"{name.name}.key.json")
    exact, key = import_uri(uri, secret_of(passphrase_file or pin_file))
    pin = str(pin_file.absolute()) if pin_file is not None else ""
    write_new(path, public_json(key, uri=exact, pin_file=pin), mode=0o644)
    if as_json:
        emit({"keyid": key.keyid, "uri": exact, "file": str(path)})
    else:
        say(f"Made {path} for {exact}. Its key id begins with {key.keyid[:8]}; all of it: {key.keyid}")


@keys.command()
@click.option("--check", is_flag=True, help="Fail when metadata is near its end, or was not renewed in time.")
@json_option
@with_home
def show(home: Home, check: bool, as_json: bool) -> None:
    """Roles, their keys and thresholds, versions and expiries, and what can be signed here."""
    now = datetime.now(UTC)
    health = home.releases.health(now)
    trouble = [role.sentence for role in health if role.state != "ok"]
    rows = _roles(home, now)
    if as_json:
        unopened = [{"file": h.path.name, "problem": h.problem} for h in home.keys.held() if h.problem]
        emit({"roles": rows, "trouble": trouble, "unopened": unopened, "notice": home.notice()})
    else:
        cells = [
            (
                r["role"],
                r["version"],
                r["days_left"],
                f"{r['threshold']} of {len(r['keys'])}",
                [f"{k['keyid'][:8]}{' (here)' if k['here'] else ''}" for k in r["keys"]],
                r["missing"] or "",
            )
            for r in rows
        ]
        table("Keys", ("role", "version", "days left", "threshold", "keys", "signatures missing here"), cells)
        for line in filter(None, (*trouble, home.notice())):
            say(line)
    if check and trouble:
        raise ReleaseError("release.expiring", " ".join(trouble))


@keys.group()
def ceremony() -> None:
    """Change root, targets or releases: begin, sign with every key that must, finish."""


def _role_options(command: Any) -> Any:
    for role in reversed(OFFLINE):
        text = f"A .pub.json or .key.json: all keys of {role} from now on; may be repeated."
        command = click.option(f"--{role}-threshold", type=click.IntRange(1, 100), help="Default: more than half.")(
            command
        )
        command = click.option(f"--{role}", multiple=True, type=FILE, help=text)(command)
    return command


@ceremony.command("begin")
@_role_options
@click.option("--renew", multiple=True, type=click.Choice(OFFLINE), help="Sign it anew before it expires.")
@click.option("--reason", default="", help="Why; it is shown to those who sign, and audited.")
@OUT
@json_option
@with_home
def begin(home: Home, renew: tuple[str, ...], reason: str, out: Path | None, as_json: bool, **chosen: Any) -> None:
    """Propose other keys or thresholds, as a file to be signed. Roles that are not named keep theirs."""
    from lightship.registry import ceremonies

    wanted = {role: _role_keys(chosen[role], chosen[f"{role}_threshold"], home, role) for role in OFFLINE}
    given = {role: keys for role, keys in wanted.items() if keys is not None}
    if not home.releases.exists:
        given.update(_online(home))
    title = f"Keys of {', '.join(r for r in OFFLINE if r in given)}" if given else f"Renew {', '.join(renew)}"
    begun = ceremonies.begin(home, title, given, renew=renew, reason=reason, actor=operator())
    _leave(begun, out, as_json=as_json)


def sign_command(file: Path, key_files: tuple[Path, ...], passphrase_file: Path | None, as_json: bool) -> None:
    """Sign FILE. It and the key are all this needs: no home, no network. Look at `status` first."""
    from lightship.release import ceremony as files

    found = files.read(file)
    if not key_files:
        raise click.UsageError("Give the key to sign with: --key.")
    signed = {role for signer in open_keys(key_files, passphrase_file) for role in files.sign(found, signer)}
    files.write(file, found)
    _show(found, file, as_json=as_json, signed=sorted(signed))


def status_command(file: Path, as_json: bool) -> None:
    """What FILE would change, who signed it and who has yet to."""
    from lightship.release import ceremony as files

    _show(files.read(file), file, as_json=as_json)


@with_home
def finish_command(home: Home, file: tuple[Path, ...], as_json: bool) -> None:
    """Put FILE into force. Several copies, signed apart, are laid together."""
    from lightship.registry import ceremonies
    from lightship.release import ceremony as files

    changed = ceremonies.finish(home, [files.read(path) for path in file], actor=operator())
    if as_json:
        emit({"changed": changed})
    else:
        say(f"In force: {', '.join(changed)}." if changed else "It was in force already.")


def add_file_commands(group: click.Group) -> None:
    """`sign`, `status` and `finish`, which keys and releases have in common."""
    one, several = click.argument("file", type=FILE), click.argument("file", type=FILE, nargs=-1, required=True)
    group.command("sign")(one(KEY(PASSPHRASE(json_option(sign_command)))))
    group.command("status")(one(json_option(status_command)))
    group.command("finish")(several(json_option(finish_command)))


add_file_commands(ceremony)


@keys.command()
@click.argument("roles", nargs=-1, required=True, type=click.Choice((*OFFLINE, *ONLINE)))
@click.option("--new", "new", multiple=True, type=FILE, help="All keys it has from now on: .pub.json or .key.json.")
@click.option("--threshold", type=click.IntRange(1, 100), help="Default: more than half.")
@click.option("--reason", default="", help="Why; it is shown to those who sign, and audited.")
@KEY
@PASSPHRASE
@OUT
@json_option
@with_home
def rotate(
    home: Home,
    roles: tuple[str, ...],
    new: tuple[Path, ...],
    threshold: int | None,
    reason: str,
    key_files: tuple[Path, ...],
    passphrase_file: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Give ROLES new keys in place of all old ones. An online role gets a key that is made here."""
    if len(set(roles)) > 1 and (new or threshold is not None):
        raise click.UsageError("--new and --threshold go with one role.")
    signers = open_keys(key_files, passphrase_file)
    wanted = {role: _fresh(home, role, new, threshold) for role in dict.fromkeys(roles)}
    _change(home, f"Rotate {', '.join(wanted)}", wanted, reason, signers, out, as_json=as_json)


@keys.command()
@click.argument("keyid")
@click.option("--replace-with", type=FILE, help="A .pub.json or .key.json that takes its place in every role.")
@click.option("--reason", required=True, help="Why; it is shown to those who sign, and audited.")
@KEY
@PASSPHRASE
@OUT
@json_option
@with_home
def revoke(
    home: Home,
    keyid: str,
    replace_with: Path | None,
    reason: str,
    key_files: tuple[Path, ...],
    passphrase_file: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Take the key KEYID (its first eight characters do) out of every role, and have signed anew what it signed."""
    from lightship.release.changes import RoleKeys
    from lightship.release.keyfiles import read_public

    now = home.releases.in_force()
    having = {role: now.role_keys(role) for role in (*OFFLINE, *ONLINE)}
    known = {k for spec in having.values() for k in spec.keyids if k.startswith(keyid) and len(keyid) >= 8}
    if len(known) != 1:
        message = (
            f"Expected the id of one key in force, or eight or more characters of it; {keyid!r} fits {len(known)}."
        )
        raise ReleaseError("release.keys", message, remedy="See `lightship keys show`.")
    (gone,) = known
    wanted = {}
    for role, spec in having.items():
        left = [k for k in spec.keys if k.keyid != gone]
        if len(left) == len(spec.keys):
            continue
        if replace_with is not None:
            left.append(read_public(replace_with))
        wanted[role] = RoleKeys.of(left, spec.threshold) if role in OFFLINE else _fresh(home, role, (), None)
    signers = open_keys(key_files, passphrase_file)
    _change(home, f"Revoke key {gone[:8]}", wanted, reason, signers, out, as_json=as_json)


def secret_of(path: Path | None) -> Callable[[str], str]:
    """What reads a passphrase or a PIN from a file, or from standard input, when it is asked for.

    Raises:
        ReleaseError: release.keys.
    """
    from lightship.release.keyfiles import no_secret

    if path is None:
        return no_secret

    def read(what: str) -> str:
        try:
            if str(path) == "-":
                data = sys.stdin.buffer.read(_MAX_SECRET + 1)
            else:
                with path.open("rb") as f:
                    data = f.read(_MAX_SECRET + 1)
            text = data.decode().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as e:
            raise ReleaseError("release.keys", f"The {what} can't be read from {path}: {e}.") from e
        if not text or len(data) > _MAX_SECRET:
            raise ReleaseError("release.keys", f"Expected a {what} of 1 to {_MAX_SECRET} bytes in {path}.")
        return text

    return read


def open_keys(files: Sequence[Path], passphrase_file: Path | None) -> list[Signer]:
    """What signs with these key files.

    Raises:
        ReleaseError: release.keys.
    """
    from lightship.release.keyfiles import open_key

    return [open_key(path, secret_of(passphrase_file)) for path in files]


def leave(begun: Ceremony, out: Path | None, *, as_json: bool) -> None:
    """Write a ceremony that others have yet to sign, and say what is to be done."""
    _leave(begun, out, as_json=as_json)


def _leave(begun: Ceremony, out: Path | None, *, as_json: bool) -> None:
    from lightship.release import ceremony as files

    path = out or Path("".join(c if c.isalnum() or c in "@." else "-" for c in begun.title.lower()) + files.SUFFIX)
    if path.exists():
        raise ReleaseError("release.exists", f"{path} exists.", remedy="Give another name with --out, or remove it.")
    files.write(path, begun)
    _show(begun, path, as_json=as_json)


def _change(
    home: Home,
    title: str,
    wanted: dict[str, RoleKeys],
    reason: str,
    signers: Sequence[Signer],
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Begin a change; finish it where all who must sign are here."""
    from lightship.registry import ceremonies

    begun = ceremonies.begin(home, title, wanted, reason=reason, signers=signers, actor=operator())
    if not begun.complete:
        _leave(begun, out, as_json=as_json)
        return
    changed = ceremonies.finish(home, [begun], actor=operator())
    if as_json:
        emit({"changed": changed})
    else:
        say(f"{title}: in force. Signed anew: {', '.join(changed)}, snapshot, timestamp.")


def _fresh(home: Home, role: str, new: Sequence[Path], threshold: int | None) -> RoleKeys:
    """The new keys of a role: those given, or one that is made here."""
    from lightship.release.changes import RoleKeys

    given = _role_keys(new, threshold, home, role)
    if given is not None:
        for path in new if role in ONLINE else ():
            home.keys.adopt(role, path)
        return given
    if role in OFFLINE and not home.keys.has(role):
        message = f"The {role} keys are kept elsewhere."
        raise ReleaseError(
            "release.keys", message, remedy="Make the new ones there, and give their .pub.json with --new."
        )
    return RoleKeys.of([home.keys.add(role).public_key])


def _role_keys(files: Sequence[Path], threshold: int | None, home: Home, role: str) -> RoleKeys | None:
    """The keys in files, with a threshold of more than half; None for no files and no threshold."""
    from lightship.release.changes import RoleKeys
    from lightship.release.keyfiles import read_public

    if not files and threshold is None:
        return None
    found = [read_public(path) for path in files]
    if not files:
        found = list(home.releases.in_force().role_keys(role).keys)
    distinct = {key.keyid: key for key in found}
    return RoleKeys.of(list(distinct.values()), threshold or len(distinct) // 2 + 1)


def _online(home: Home) -> dict[str, RoleKeys]:
    from lightship.release.changes import RoleKeys

    return {role: RoleKeys.of([home.keys.signer(role).public_key]) for role in ONLINE}


def _roles(home: Home, now: datetime) -> list[dict[str, Any]]:
    in_force, expiries = home.releases.in_force(), home.releases.expiries()
    here = {held.keyid for held in home.keys.held()}
    rows = []
    for role in (*OFFLINE, *ONLINE):
        spec, expires = in_force.role_keys(role), expiries.get(role)
        rows.append(
            {
                "role": role,
                "version": home.releases.version(role),
                "expires": expires.isoformat() if expires is not None else None,
                "days_left": round((expires - now).total_seconds() / 86_400, 1) if expires is not None else None,
                "threshold": spec.threshold,
                "keys": [{"keyid": k, "here": k in here} for k in sorted(spec.keyids)],
                "missing": home.releases.lacking(role),
            }
        )
    return rows


def _show(found: Ceremony, path: Path, *, as_json: bool, signed: Sequence[str] = ()) -> None:
    from lightship.release import ceremony as files

    lines, needs = files.describe(found), found.needs
    if as_json:
        facts = [
            {
                "document": n.document,
                "whose": n.whose,
                "threshold": n.threshold,
                "signed": list(n.signed),
                "waiting": sorted(set(n.keyids) - set(n.signed)),
                "missing": n.missing,
            }
            for n in needs
        ]
        emit({"file": str(path), "title": found.title, "fingerprint": found.fingerprint, "complete": found.complete,
              "signed_now": list(signed), "needs": facts, "changes": lines})  # fmt: skip
        return
    out = console()
    out.print(f"{found.title}{f' ({found.reason})' if found.reason else ''}, begun {found.begun}")
    out.print("\n".join(lines))
    out.print(f"fingerprint {found.fingerprint}")
    for need in needs:
        waiting = ", ".join(k[:8] for k in sorted(set(need.keyids) - set(need.signed)))
        left = f"{need.missing} more of {waiting}" if need.missing else "enough"
        out.print(f"{need.document}: {len(need.signed)} of {need.threshold} {need.whose} signed: {left}")
    if signed:
        say(f"Signed {', '.join(signed)}.")
    if found.complete:
        say(f"All have signed. At the server: lightship keys ceremony finish {path}")
    else:
        say(f"Nothing is in force yet. Carry {path} to the next key: lightship keys ceremony sign {path} --key KEY")
