"""`tuf-client`: the agent's update client as a command, with the interface of the TUF conformance suite.

    tuf-client --metadata-dir D init ROOT
    tuf-client --metadata-url U --metadata-dir D refresh
    tuf-client --metadata-url U --metadata-dir D --target-name P… --target-dir T --target-base-url B download

Rules:
* it adds nothing to what the agent does: metadata goes through `update.releases`, bytes through its downloader;
* exit status 0, or 1 with a code and a sentence on standard error;
* targets are fetched in the order given, by one client; one that is there already, with the signed bytes, is not
  fetched again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import quote

import httpx
from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import TargetFile

from lightship_agent.contract.codes import LightshipError, SettingsError, TrustError
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.files import storage_error, write_durably
from lightship_agent.update.download import download
from lightship_agent.update.releases import Releases

#: The root that `init` was given. No suffix: every `.json` in the folder is metadata that the client keeps.
PINNED: Final = "pinned-root"
_GAP_SECONDS: Final = 15.0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        match options.command:
            case "init":
                init(options.metadata_dir, options.root)
            case "refresh":
                with _http() as http:
                    _look(http, options)
            case _:
                _download(options)
    except LightshipError as e:
        print(f"{e.code}: {e}", file=sys.stderr)
        return 1
    return 0


def init(folder: Path, root: Path) -> None:
    """Pin the root in the file `root` for the metadata in `folder`.

    Raises:
        StorageError: storage.full, storage.unwritable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data = root.read_bytes()
    except OSError as e:
        raise storage_error(e, root) from e
    write_durably(folder / PINNED, data)
    write_durably(folder / "root.json", data)


def _look(http: httpx.Client, options: argparse.Namespace) -> Releases:
    if options.metadata_url is None:
        raise SettingsError("settings.missing", "--metadata-url is needed.")
    try:
        root = (options.metadata_dir / PINNED).read_bytes()
    except OSError as e:
        raise SettingsError("settings.missing", f"No root is pinned in {options.metadata_dir}: run init first.") from e
    return Releases(options.metadata_dir, http, options.metadata_url, root)


def _download(options: argparse.Namespace) -> None:
    if not options.target_name or options.target_dir is None or options.target_base_url is None:
        raise SettingsError("settings.missing", "--target-name, --target-dir and --target-base-url are needed.")
    with _http() as http:
        releases = _look(http, options)
        for name in options.target_name:
            target = releases.target(name)
            if target is None:
                raise TrustError("trust.not-released", f"{name!r} is not listed by anybody who may.")
            url = f"{options.target_base_url.rstrip('/')}/{_place(target, consistent=releases.consistent)}"
            _fetch(http, url, target, options.target_dir)


def _place(target: TargetFile, *, consistent: bool) -> str:
    """Where the repository keeps a target: any digest that it lists will do."""
    return target.get_prefixed_paths()[0] if consistent else target.path


def _fetch(http: httpx.Client, url: str, target: TargetFile, folder: Path) -> None:
    path = folder / file_name(target.path)
    part = folder / f".{path.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        if path.exists() and _is(target, path.read_bytes()):
            return
    except OSError as e:
        raise storage_error(e, path) from e
    try:
        data = download(http, url, part, target.length, pause=_brief) if target.length else b""
        if not _is(target, data):
            raise TrustError("trust.digest", f"{target.path}: the downloaded bytes are not the signed ones.")
        write_durably(path, data)
    finally:
        part.unlink(missing_ok=True)


def _is(target: TargetFile, data: bytes) -> bool:
    """Whether these are the signed bytes; a digest of an unknown kind is one that they don't have."""
    try:
        target.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        return False
    return True


def file_name(target: str) -> str:
    """One file name for a target path: whatever it holds, it stays inside its folder."""
    name = quote(target, safe="")
    if len(name) > 180:
        return sha256_hex(target.encode())
    return name.replace(".", "%2E", 1) if name.startswith(".") else name


def _brief(seconds: float) -> None:
    """Somebody waits at a terminal: try again soon."""
    time.sleep(min(seconds, 0.1))


def _http() -> httpx.Client:
    """Our HTTP rules, for a repository that anybody may read: its metadata is what is verified, not the connection."""
    return httpx.Client(
        timeout=httpx.Timeout(_GAP_SECONDS),
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},
        trust_env=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tuf-client", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--metadata-dir", type=Path, required=True, help="where trusted metadata is kept")
    parser.add_argument("--metadata-url", help="where the repository's metadata is")
    parser.add_argument("--target-name", action="append", default=[], help="a target's path; may be repeated")
    parser.add_argument("--target-dir", type=Path, help="where downloaded targets go")
    parser.add_argument("--target-base-url", help="where the repository's targets are")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    commands.add_parser("init", help="trust the root in a file").add_argument("root", type=Path)
    commands.add_parser("refresh", help="update the metadata")
    commands.add_parser("download", help="update the metadata and fetch targets")
    return parser


if __name__ == "__main__":
    sys.exit(main())
