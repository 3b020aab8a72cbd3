"""Update: bytes from the server, bounded in every direction.

Rules:
* raw iteration without a chunk size, so that a drip feed meets the deadline;
* an absolute deadline, no redirects, identity encoding, typed errors;
* downloads resume with Range, which needs no If-Range: a path holds its digest, so what it names never changes;
* a 4xx stops, a 5xx or a broken connection is tried again with jitter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx

from lightship_agent.contract.codes import LinkError
from lightship_agent.files import storage_error

#: Below this many bytes a second, a download is not worth waiting for.
MINIMUM_RATE: Final = 500.0
ATTEMPTS: Final = 6
_GRACE_SECONDS: Final = 30.0


def download(
    http: httpx.Client, url: str, part: Path, length: int, *, pause: Callable[[float], None] = time.sleep
) -> bytes:
    """The `length` bytes at `url`, resumed from `part` where an earlier attempt left off.

    The caller verifies the digest; here only sizes, ranges and rates are judged.

    Raises:
        LinkError: link.status (4xx, wrong range or size), link.slow, link.unreachable.
        StorageError: storage.full, storage.unwritable.
    """
    last: LinkError | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            pause(random.uniform(0, min(30.0, 0.5 * 2**attempt)))
        try:
            _attempt(http, url, part, length)
            return part.read_bytes()
        except httpx.HTTPError as e:
            last = LinkError("link.unreachable", f"{url}: {type(e).__name__}: {e}.")
        except _TryAgainError as e:
            last = e.error
        except OSError as e:
            raise storage_error(e, part) from e
    assert last is not None
    raise last


class _TryAgainError(Exception):
    def __init__(self, error: LinkError) -> None:
        super().__init__(str(error))
        self.error = error


def _attempt(http: httpx.Client, url: str, part: Path, length: int) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have > length:
        part.unlink()
        have = 0
    if have == length:
        return
    headers = {"Range": f"bytes={have}-"} if have else {}
    with http.stream("GET", url, headers=headers) as response:
        _judge(response, url, have, length)
        if have and response.status_code == 200:
            part.unlink()
            have = 0
        _receive(response, url, part, have, length)


def _judge(response: httpx.Response, url: str, have: int, length: int) -> None:
    status = response.status_code
    if status >= 500 or status == 429:
        raise _TryAgainError(LinkError("link.status", f"{url}: status {status}."))
    if status not in {200, 206}:
        raise LinkError("link.status", f"{url}: expected 200 or 206, found {status}.")
    expected = f"bytes {have}-{length - 1}/{length}"
    if status == 206 and response.headers.get("content-range") != expected:
        found = response.headers.get("content-range")
        raise LinkError("link.status", f"{url}: expected content-range {expected!r}, found {found!r}.")


def _receive(response: httpx.Response, url: str, part: Path, have: int, length: int) -> None:
    began, got = time.monotonic(), have
    with part.open("ab") as f:
        for chunk in response.iter_raw():
            got += len(chunk)
            if got > length:
                raise LinkError("link.status", f"{url}: more than the signed {length} bytes.")
            f.write(chunk)
            spent = time.monotonic() - began
            if spent > _GRACE_SECONDS and (got - have) / spent < MINIMUM_RATE:
                raise LinkError("link.slow", f"{url}: below {MINIMUM_RATE:.0f} B/s.")
    if got < length:
        raise _TryAgainError(LinkError("link.unreachable", f"{url}: ended after {got} of {length} bytes."))
