"""Receivers of alerts for the tests, each a process of its own, on loopback with certificates of a home's CA."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from tests.control_plane.things import settings_for, until

from lightship.home import Home
from lightship.settings import Settings

HERE = Path(__file__).parent
SECRET = "a secret of the test"


@dataclass
class Posts:
    """A receiver of webhooks."""

    folder: Path
    url: str

    def mood(self, mood: str) -> None:
        (self.folder / "mood").write_text(mood)

    @property
    def got(self) -> list[dict[str, Any]]:
        """What came: path, headers and body."""
        file = self.folder / "posts"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The bodies."""
        return [json.loads(g["body"]) for g in self.got]


@dataclass
class Letters:
    """A mail server."""

    folder: Path
    server: str

    @property
    def got(self) -> list[EmailMessage]:
        files = sorted(self.folder.glob("*.eml"), key=lambda p: int(p.stem))
        found = [message_from_bytes(p.read_bytes(), policy=policy.default) for p in files]
        assert all(isinstance(m, EmailMessage) for m in found)
        return found


def certificate(home: Home, folder: Path, name: str = "127.0.0.1") -> tuple[Path, Path]:
    """A server's certificate and key of the home's CA."""
    key, chain = home.ca.issue_server([name])
    folder.mkdir(exist_ok=True)
    (folder / "key.pem").write_bytes(key)
    (folder / "chain.pem").write_bytes(chain)
    return folder / "chain.pem", folder / "key.pem"


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[int]:
    """A program of ours, until it has said its port."""
    (folder / "port").unlink(missing_ok=True)
    process = subprocess.Popen(command)
    try:
        until(lambda: (folder / "port").exists() or process.poll() is not None)
        assert process.poll() is None
        yield int((folder / "port").read_text())
    finally:
        process.kill()
        process.wait()


@contextmanager
def posts(folder: Path, pair: tuple[Path, Path] | None = None) -> Iterator[Posts]:
    """A receiver of webhooks; with a certificate and its key on HTTPS."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(HERE / "receive_posts.py"), str(folder), *map(str, pair or ())]
    with running(command, folder) as port:
        yield Posts(folder, f"{'https' if pair else 'http'}://127.0.0.1:{port}/hook?a=b")


@contextmanager
def letters(folder: Path, kind: str, pair: tuple[Path, Path] | None = None) -> Iterator[Letters]:
    """A mail server: starttls, tls or plain."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(HERE / "receive_letters.py"), str(folder), kind, *map(str, pair or ())]
    with running(command, folder) as port:
        yield Letters(folder, f"127.0.0.1:{port}")


def secret_file(folder: Path, content: str = SECRET, mode: int = 0o600) -> str:
    """A file that only we may read, unless told otherwise."""
    folder.mkdir(exist_ok=True)
    path = folder / "secret"
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    path.touch(0o600)
    path.write_text(content)
    path.chmod(mode)
    return str(path)


def hooked(home: Home, receiver: str, folder: Path, **flags: Any) -> Settings:
    """Settings with a webhook, quick enough for a test; whoever tests a slow receiver gives it less time."""
    chosen = {
        "alert_webhook_url": receiver, "alert_webhook_secret": secret_file(folder),
        "alert_ca": str(home.ca.certificate_path), "alert_timeout_seconds": 20, "alert_group_seconds": 0,
        "alert_clear_seconds": 0, "alert_seconds": 0.1, "reconcile_seconds": 0.1, **flags,
    }  # fmt: skip
    return settings_for(home.path, **chosen)


def mailed(home: Home, server: str, folder: Path, **flags: Any) -> Settings:
    """Settings with a mail server."""
    chosen = {
        "alert_mail_server": server, "alert_mail_user": "lightship",
        "alert_mail_password": secret_file(folder, "right"),
        "alert_mail_from": "lightship@example.org", "alert_mail_to": "ann@example.org, bob@example.org",
        "alert_ca": str(home.ca.certificate_path), "alert_timeout_seconds": 20, **flags,
    }  # fmt: skip
    return settings_for(home.path, **chosen)
