"""Update: signed metadata out of a file that was carried here, for the TUF client.

Rules:
* the client gets the file's bytes and verifies them as it verifies a server's;
* a root that is not in the file is answered as a server would, with 404: there is no newer one. Anything else that is
  missing is the file's fault, and is called so;
* a device that was online after the file was written knows a newer list, and no older one is taken in its place. While
  what it knows has not expired, that list is the measure of what the file brings: the client is shown its own
  timestamp again, which is no news to it. Where it has expired, the client sees the file's, and refuses it as older.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError
from tuf.ngclient.fetcher import FetcherInterface

from lightship_agent.contract.codes import MediaError
from lightship_agent.contract.media import MAX_METADATA, TIMESTAMP

from .media import Media, open_media

_ROOT: Final = re.compile(r"[0-9]+\.root\.json")
_MAX_TIMESTAMP: Final = 16_000  # bytes


@contextmanager
def open_fetcher(path: Path, cache: Path, now: float) -> Iterator[FetcherInterface]:
    """The metadata in the file at `path`.

    Args:
        path: the file.
        cache: the folder of the metadata that verified before.
        now: Unix seconds.

    Raises:
        MediaError: media.*.
    """
    with open_media(path) as media:
        yield MediaFetcher(media, cache / "timestamp.json", now)


class MediaFetcher(FetcherInterface):
    """The TUF client's network, where there is none."""

    def __init__(self, media: Media, known: Path, now: float) -> None:
        """Metadata comes from `media`; `known` is the timestamp that verified before, if any."""
        self._media = media
        self._known = known
        self._now = now

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """The whole of a metadata file, at most `max_length` bytes.

        Raises:
            DownloadError: and its kinds, as the TUF client knows them.
            MediaError: media.*.
        """
        file = url.rpartition("/")[2]
        name = f"metadata/{file}"
        if name not in self._media.index.entries:
            if _ROOT.fullmatch(file):
                message = f"{file} is not in the file"
                raise DownloadHTTPError(message, 404)
            raise MediaError("media.incomplete", f"There is no {name} in the file.", remedy="Export anew.")
        data = self._timestamp() if name == TIMESTAMP else self._media.read(name, MAX_METADATA)
        if len(data) > max_length:
            message = f"{name}: more than the {max_length} bytes it may have"
            raise DownloadLengthMismatchError(message)
        return data

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            return iter([self.download_bytes(url, MAX_METADATA)])
        except MediaError as e:
            raise DownloadError(str(e)) from e

    def _timestamp(self) -> bytes:
        ours = self._media.read(TIMESTAMP, _MAX_TIMESTAMP)
        try:
            with self._known.open("rb") as f:
                known = f.read(_MAX_TIMESTAMP)
        except OSError:
            return ours
        older, newer = _claims(ours), _claims(known)
        if older is None or newer is None or newer.version <= older.version or newer.expires <= self._now:
            return ours
        return known


class _Claims(NamedTuple):
    version: int
    expires: float  # Unix seconds


def _claims(data: bytes) -> _Claims | None:
    """What a timestamp says of itself. It decides which of two the client is shown, and nothing is believed of it."""
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
        signed = json.loads(data)["signed"]
        return _Claims(int(signed["version"]), datetime.fromisoformat(signed["expires"]).timestamp())
    return None
