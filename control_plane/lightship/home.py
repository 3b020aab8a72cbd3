"""The control plane's home folder, opened: the things that every command and every server needs.

    <home>/lightship.db    database            <home>/keys/        signing keys (0600)
    <home>/artifacts/      by digest           <home>/ca/          certificate authority (0600)
    <home>/datasets/       by digest           <home>/tuf/         release repository
    <home>/operator-token  bearer token for the operator API (0600)

Rules: `Home.create` makes all of it or says why not; `Home.open` refuses a folder that is not a home.
"""

from __future__ import annotations

import os
import pwd
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lightship_agent.contract.codes import ReleaseError, StorageError
from lightship_agent.files import storage_error, write_durably

from .data.store import DatasetStore
from .fleet.ca import CertificateAuthority
from .release.keys import DEVELOPMENT_NOTICE, OFFLINE_ROLES, KeyFolder
from .release.repository import ReleaseRepository
from .storage import audit
from .storage.artifacts import FolderArtifacts
from .storage.database import Database

_SECRET: Final = {".key", ".pem", ".toml"}


@dataclass(frozen=True)
class Home:
    """An opened home."""

    path: Path
    database: Database
    artifacts: FolderArtifacts
    datasets: DatasetStore
    keys: KeyFolder
    ca: CertificateAuthority
    releases: ReleaseRepository

    @classmethod
    def create(cls, path: Path, *, production: bool = False) -> Home:
        """Make a new home, or complete one that was begun. What devices trust already is never made a second time.

        Args:
            path: where.
            production: without the keys of root, targets and releases, and so without a release repository, which the
                first ceremony makes; once begun so, a home stays so.

        Raises:
            StorageError: storage.full, storage.unwritable, storage.corrupt for a home without its CA.
            ReleaseError: release.keys for a home without the keys of its release repository, release.exists for
                `production` in a home that has development keys already.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)  # also where somebody made it before us
        except OSError as e:
            raise storage_error(e, path) from e
        home = cls.at(path)
        if production and not home.keys.production and any(home.keys.has(role) for role in OFFLINE_ROLES):
            message = f"{path} has development keys already."
            remedy = "Move it to keys of your own: `lightship keys ceremony begin`."
            raise ReleaseError("release.exists", message, remedy=remedy)
        if home.releases.exists:
            home.keys.require_online()
            home.ca.require()
        elif production or home.keys.production:
            home.keys.create_online()
            home.ca.create()
        else:
            home.keys.create()
            home.ca.create()
            home.releases.create()
        fresh = not (path / "lightship.db").exists()
        home.upgrade()
        if fresh:
            with home.database.write() as session:
                audit.append(session, actor=operator(), verb="home.create", subject=str(path.name))
        if not home.token_path.exists():
            home.make_operator_token(audited=not fresh)
        return home

    @classmethod
    def open(cls, path: Path) -> Home:
        """Open an existing home.

        Raises:
            StorageError: storage.not-initialised, storage.schema.
        """
        if not (path / "lightship.db").exists():
            message = f"{path} is not a Lightship home."
            raise StorageError("storage.not-initialised", message, remedy="Run `lightship init`.")
        home = cls.at(path)
        home.database.check_schema()
        return home

    @classmethod
    def at(cls, path: Path) -> Home:
        """The parts of a home at `path`, with no check that it is one."""
        keys = KeyFolder(path / "keys")
        return cls(
            path=path,
            database=Database(f"sqlite:///{path / 'lightship.db'}"),
            artifacts=FolderArtifacts(path / "artifacts"),
            datasets=DatasetStore(path / "datasets"),
            keys=keys,
            ca=CertificateAuthority(path / "ca"),
            releases=ReleaseRepository(path / "tuf", keys),
        )

    def upgrade(self) -> None:
        """Bring the schema to this version.

        Raises:
            StorageError: as `Database.upgrade`.
        """
        before = self.database.revision()
        self.database.upgrade()
        after = self.database.revision()
        if before not in (None, after):
            with self.database.write() as session:
                detail = {"from": before, "to": after}
                audit.append(session, actor=operator(), verb="home.upgrade", subject=str(self.path.name), detail=detail)

    def make_operator_token(self, *, audited: bool = True) -> None:
        """Make the credential that may do everything; who has the home has it.

        Raises:
            StorageError: storage.full, storage.unwritable.
        """
        with self.database.write() as session:
            if audited:
                detail = {"role": "admin", "file": self.token_path.name}
                audit.append(session, actor=operator(), verb="access.grant", subject="operator-token", detail=detail)
            write_durably(self.token_path, secrets.token_urlsafe(32).encode(), mode=0o600)

    def exposed(self) -> list[Path]:
        """What others on this machine may look into, and should not: the home, and folders and files of secrets."""
        secret = [self.path, self.token_path]
        for name in ("keys", "ca", "broker"):
            folder = self.path / name
            secret += [folder, *(p for p in folder.glob("*") if p.suffix in _SECRET or p.name.endswith("-password"))]
        return [p for p in secret if p.exists() and p.stat().st_mode & 0o077 and not _is_public(p)]

    def notice(self) -> str:
        """What is to be said loudly about the keys; "" where there is nothing to be said."""
        kept = any(self.keys.has(role) for role in OFFLINE_ROLES)
        return DEVELOPMENT_NOTICE if kept else ""

    @property
    def token_path(self) -> Path:
        """Where the operator token is."""
        return self.path / "operator-token"

    def close(self) -> None:
        """Close the database."""
        self.database.close()


def _is_public(path: Path) -> bool:
    """Whether a file that ends like a key is none: certificates and public halves are for everybody."""
    return path.is_file() and path.suffix == ".pem" and b"PRIVATE KEY" not in path.read_bytes()


def operator() -> str:
    """Who acts, for the audit log: the system user this process runs as, as the kernel says and no variable can."""
    try:
        return f"user:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:
        return f"uid:{os.getuid()}"


def terminal(environment: Mapping[str, str]) -> str:
    """From where a command came, for the audit log. Variables say so, which whoever acts can set: a hint, no proof."""
    client = environment.get("SSH_CONNECTION", "").partition(" ")[0]
    parts = [f"ssh {client}" if client else "console"]
    if sudo := environment.get("SUDO_USER", ""):
        parts.append(f"sudo by {sudo}")
    return ", ".join(parts)[:120]
