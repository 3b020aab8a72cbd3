"""Update: where released files come from: the control plane, or a file that was carried here.

Rules:
* a source transfers and bounds; it verifies nothing but sizes: that is `fetch`'s;
* a transfer stops between two chunks when the agent stops, when its window closes, or when what it brings is no longer
  wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from lightship_agent.contract.device_api import Paths
from lightship_agent.link.client import ControlPlane

from .rate import TokenBucket
from .released import ReleasedFile


class ServerFiles(msgspec.Struct, frozen=True):
    """The control plane's release files, over mutual TLS."""

    plane: ControlPlane
    pause: Callable[[float], None]
    rate: TokenBucket | None
    stopped: Callable[[], bool]

    def read(self, file: ReleasedFile, part: Path) -> bytes:
        """The file's bytes, gone on with from `part`.

        Raises:
            LinkError: link.*.
            StorageError: storage.*.
            UpdateError: update.interrupted, and what `stopped` raises.
        """
        from .download import download

        url = f"{self.plane.server}{Paths.TARGETS}{file.url_path}"
        return download(self.plane.http, url, part, file.length, pause=self.pause, rate=self.rate, stopped=self.stopped)


class MediaFiles(msgspec.Struct, frozen=True):
    """The released files in a file that was carried here."""

    path: Path

    def read(self, file: ReleasedFile, part: Path) -> bytes:  # noqa: ARG002 - nothing is gone on with: all is here
        """The file's bytes.

        Raises:
            MediaError: media.*.
            TrustError: trust.digest where its length is not the released one.
        """
        from .media import open_transport

        with open_transport(self.path, file) as f:
            return f.read()
