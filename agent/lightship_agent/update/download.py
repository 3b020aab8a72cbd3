"""Update: the bytes of a bundle, over a link that may be slow, metered, lying, or gone every few megabytes.

Rules:
* what has come stays in a `.part` and is gone on with by Range; where the file has a strong ETag and the disk keeps
  extended attributes, If-Range says which file it was (one answer to the contrary is believed, a second one is not:
  replicas of a server name the same bytes differently, and the digest decides in the end anyway);
* a 4xx, a redirect and an answer that is not the file stop at once; a 5xx, a 429 and a broken connection are tried
  again, with full jitter and as Retry-After says; progress gives all attempts back;
* everything is bounded: the head of the answer, the silence between two bytes, the rate, the whole, the bytes received
  in all attempts together, and the room left on the disk;
* the sender must know the length, and it must be the signed one, before anything that is here is given up for it;
* between two chunks the caller may stop it, and a token bucket may slow it down.

Sources: RFC 9110 §10.2.3 (Retry-After), §13.1.5 (If-Range), §14 (Range); full jitter: Brooker, "Exponential Backoff
And Jitter", 2015.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Final

import httpx

from lightship_agent.contract.codes import LinkError, StorageError, UpdateError
from lightship_agent.files import storage_error

from .rate import TokenBucket

#: Requests in a row that bring nothing worth while.
ATTEMPTS: Final = 6
#: Longest wait that a Retry-After is granted, in seconds; a server that asks for more is left alone until next time.
MAX_RETRY_AFTER: Final = 300.0
_MAX_BACKOFF: Final = 30.0
_POLL: Final = 0.2  # seconds between two looks at `stopped` while the head of an answer is awaited
_SYNC_BYTES: Final = 8 << 20  # so that a power cut costs little, and the disk is never busy for long at a time
_ETAG_ATTRIBUTE: Final = "user.lightship.etag"
_STRONG_ETAG: Final = re.compile(r'"[\x21\x23-\x7e]{0,200}"')


@dataclass(frozen=True)
class Terms:
    """What a download may cost."""

    attempts: int = ATTEMPTS
    worthwhile: int = 64 << 10  # bytes of progress that give all attempts back
    traffic: float = 2.0  # bytes received in all attempts together, in lengths of the file
    seconds: float = 6 * 3600.0  # for the whole of it
    answer_seconds: float = 60.0  # from asking until the head of the answer is complete
    silence_seconds: float = 15.0  # between two bytes
    minimum_rate: float = 500.0  # bytes a second, judged over each stretch of `grace_seconds`
    grace_seconds: float = 30.0
    reserve: int = 16 << 20  # bytes that must stay free on the disk


def download(
    http: httpx.Client,
    url: str,
    part: Path,
    length: int,
    *,
    pause: Callable[[float], None] = time.sleep,
    rate: TokenBucket | None = None,
    stopped: Callable[[], bool] = lambda: False,
    terms: Terms | None = None,
) -> bytes:
    """The `length` bytes at `url`, gone on with from `part` where an earlier attempt left off.

    The caller verifies the digest; here only sizes, ranges and rates are judged. `part` stays, complete or not; it is
    removed only where its bytes can't be used. `pause` waits so many seconds, between attempts and for `rate`;
    `stopped` is asked between chunks, and may raise what the caller wants to be raised.

    Raises:
        LinkError: link.status (the answer is not the file, or not now), link.slow, link.unreachable.
        StorageError: storage.full, storage.unwritable.
        UpdateError: update.interrupted, when `stopped` says so.
    """
    try:
        return _Download(http, url, part, length, pause, rate, stopped, terms or Terms()).run()
    except OSError as e:
        error = storage_error(e, part)
        if error.code == "storage.full":
            # The room it took is needed by others more; without it the next try is refused before it begins.
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        raise error from e


class _TryAgainError(Exception):
    """This attempt failed with `error`; another, after `seconds` if the server named them, may not."""

    def __init__(self, error: LinkError, seconds: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.seconds = seconds


@dataclass
class _Download:
    http: httpx.Client
    url: str
    part: Path
    length: int
    pause: Callable[[float], None]
    rate: TokenBucket | None
    stopped: Callable[[], bool]
    terms: Terms

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.terms.seconds
        self._received = 0
        self._names_file = True  # whether If-Range is still worth sending

    def run(self) -> bytes:
        farthest = have = self._have()
        self._check_room(self.length - have)
        tries = 0
        while have < self.length:
            try:
                self._attempt(have)
            except _TryAgainError as e:
                have = self._have()
                progressed = have - farthest >= self.terms.worthwhile
                tries = 1 if progressed else tries + 1
                # Only new ground counts: a file that starts over and over again gets nowhere.
                farthest = max(have, farthest) if progressed else farthest
                if tries >= self.terms.attempts:
                    raise e.error from e
                self._wait(tries, e)
            have = self._have()
        if not self.length:
            self.part.touch()
        return self.part.read_bytes()

    def _have(self) -> int:
        try:
            size = self.part.stat().st_size
        except FileNotFoundError:
            return 0
        if size > self.length:
            self.part.unlink()
            return 0
        return size

    def _check_room(self, need: int) -> None:
        disk = os.statvfs(self.part.parent)
        free = disk.f_bavail * disk.f_frsize
        if need and free < need + self.terms.reserve:
            message = (
                f"{self.part.parent}: expected {need} bytes free and {self.terms.reserve} in reserve, found {free}."
            )
            raise StorageError("storage.full", message, remedy="Free space and try again.")

    def _check(self) -> None:
        if self.stopped():
            raise UpdateError("update.interrupted", f"{self.url}: stopped; what has come is kept for the next time.")
        if time.monotonic() > self._end:
            message = f"{self.url}: not complete within {self.terms.seconds:g} s; what has come is kept."
            raise LinkError("link.slow", message)

    def _wait(self, tries: int, e: _TryAgainError) -> None:
        jitter = random.uniform(0, min(_MAX_BACKOFF, 0.5 * 2**tries))
        if e.seconds is not None and e.seconds > MAX_RETRY_AFTER:
            raise e.error from e
        # A fleet that was told the same moment must not come back in it: the jitter is added.
        self.pause((e.seconds or 0.0) + jitter)

    def _attempt(self, have: int) -> None:
        self._check()
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            etag = _kept_etag(self.part) if self._names_file else ""
            if etag:
                headers["If-Range"] = etag
        try:
            with contextlib.closing(self._send(headers)) as response:
                self._judge(response, have)
                self._receive(response, have if response.status_code == 206 else 0)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as e:
            raise LinkError("link.unreachable", f"{self.url[:200]}: {e}.") from e
        except httpx.HTTPError as e:
            code = "link.slow" if isinstance(e, httpx.TimeoutException) else "link.unreachable"
            raise _TryAgainError(LinkError(code, f"{self.url}: {type(e).__name__}: {e}.")) from e

    def _send(self, headers: dict[str, str]) -> httpx.Response:
        """The answer, as soon as its head is complete.

        Another thread waits for it: the timeouts of the client begin anew with each byte of a head, so that one
        that drips would outlast them all.
        """
        timeout = httpx.Timeout(self.terms.silence_seconds)
        request = self.http.build_request("GET", self.url, headers=headers, timeout=timeout)
        answers: queue.SimpleQueue[httpx.Response | Exception] = queue.SimpleQueue()
        abandoned = threading.Event()

        def ask() -> None:
            try:
                answers.put(self.http.send(request, stream=True, follow_redirects=False))
            except Exception as e:  # noqa: BLE001 - it is raised in the thread that waits for it
                answers.put(e)
            if abandoned.is_set():
                _close_unread(answers)

        threading.Thread(target=ask, name="download-head", daemon=True).start()
        try:
            answer = self._await_head(answers)
        except BaseException:
            abandoned.set()
            _close_unread(answers)
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _await_head(self, answers: queue.SimpleQueue[httpx.Response | Exception]) -> httpx.Response | Exception:
        end = time.monotonic() + self.terms.answer_seconds
        while True:
            with contextlib.suppress(queue.Empty):
                return answers.get(timeout=_POLL)
            self._check()
            if time.monotonic() > end:
                message = f"{self.url}: no answer within {self.terms.answer_seconds:g} s."
                raise _TryAgainError(LinkError("link.slow", message))

    def _judge(self, response: httpx.Response, have: int) -> None:
        """Return if this is the file, from its beginning (200) or from where we are (206)."""
        status, headers = response.status_code, response.headers
        if status == 429 or status >= 500:
            raise _TryAgainError(LinkError("link.status", f"{self.url}: status {status}."), _retry_after(headers))
        if status == 206 and have:
            self._judge_range(headers, have)
        elif status != 200:
            if status == 416:
                # The file ends before our part does: whatever we have, it is not the beginning of that file.
                self.part.unlink(missing_ok=True)
            hint = " (redirects are not followed)" if 300 <= status < 400 else ""
            raise LinkError("link.status", f"{self.url}: expected 200 or, for a range, 206, found {status}{hint}.")
        self._judge_body(headers, self.length - (have if status == 206 else 0))

    def _judge_range(self, headers: httpx.Headers, have: int) -> None:
        expected, found = f"bytes {have}-{self.length - 1}/{self.length}", headers.get("content-range", "")
        if found != expected:
            if not found.startswith(f"bytes {have}-"):
                # A server that counts otherwise would do so the next time too: that one begins anew, without a range.
                self.part.unlink(missing_ok=True)
            raise LinkError("link.status", f"{self.url}: expected content-range {expected!r}, found {found!r}.")

    def _judge_body(self, headers: httpx.Headers, expected: int) -> None:
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"", "identity"}:
            raise LinkError("link.status", f"{self.url}: expected the file as it is, found it encoded: {encoding!r}.")
        found, kind = headers.get("content-length"), headers.get("content-type", "")
        if "transfer-encoding" in headers or (found is None and kind.startswith("text/html")):
            # A chunked body can drip for ever between two chunks; who has the file knows its length.
            raise LinkError(
                "link.status", f"{self.url}: expected a body of known length, found {kind or 'one without'}."
            )
        if found is not None and found != str(expected):
            message = f"{self.url}: expected {expected} bytes, found {found[:20]} of {kind or 'an unknown type'}."
            raise LinkError("link.status", message, remedy="Is there a portal between this device and its server?")

    def _receive(self, response: httpx.Response, have: int) -> None:
        if not have:
            self._names_file = self._names_file and not self.part.exists()
            self.part.unlink(missing_ok=True)
        with self.part.open("ab") as f:
            if not have:
                _keep_etag(self.part, response.headers.get("etag", ""))
            try:
                have = self._copy(response, f, have)
            finally:
                f.flush()
                os.fdatasync(f.fileno())
        if have < self.length:
            raise _TryAgainError(
                LinkError("link.unreachable", f"{self.url}: ended after {have} of {self.length} bytes.")
            )

    def _copy(self, response: httpx.Response, f: IO[bytes], have: int) -> int:
        pace, unsynced = _Pace(self.terms, time.monotonic()), 0
        for chunk in response.iter_raw():
            have += len(chunk)
            if have > self.length:
                self.part.unlink(missing_ok=True)
                raise LinkError("link.status", f"{self.url}: more than the signed {self.length} bytes.")
            f.write(chunk)
            unsynced += len(chunk)
            if unsynced >= _SYNC_BYTES:
                f.flush()
                os.fdatasync(f.fileno())
                unsynced = 0
            self._judge_traffic(len(chunk))
            if not pace.keeps(len(chunk), time.monotonic()):
                raise LinkError("link.slow", f"{self.url}: below {self.terms.minimum_rate:g} B/s.")
            self._check()
            if self.rate is not None:
                pace.excuse(self._slow_down(self.rate, len(chunk)))
        return have

    def _judge_traffic(self, amount: int) -> None:
        self._received += amount
        if self._received > self.terms.traffic * self.length:
            message = f"{self.url}: {self._received} bytes came, and the file of {self.length} is still not complete."
            raise LinkError("link.unreachable", message)

    def _slow_down(self, rate: TokenBucket, amount: int) -> float:
        """Wait as the bucket says; for how many seconds."""
        before = time.monotonic()
        # What is not read is not sent: the kernel widens its window only for those who read fast.
        wait = rate.take(amount, before)
        if wait:
            self.pause(wait)
        return time.monotonic() - before


class _Pace:
    """Whether each stretch of time brought enough: an average of the whole would let a fast start pay for a drip."""

    def __init__(self, terms: Terms, now: float) -> None:
        self._terms = terms
        self._since = now
        self._got = 0

    def keeps(self, amount: int, now: float) -> bool:
        self._got += amount
        spent = now - self._since
        if spent < self._terms.grace_seconds:
            return True
        enough = self._got >= spent * self._terms.minimum_rate
        self._since, self._got = now, 0
        return enough

    def excuse(self, seconds: float) -> None:
        """So long nothing was read because we did not want to."""
        self._since += seconds


def _close_unread(answers: queue.SimpleQueue[httpx.Response | Exception]) -> None:
    with contextlib.suppress(queue.Empty):
        answer = answers.get_nowait()
        if isinstance(answer, httpx.Response):
            answer.close()


def _keep_etag(part: Path, etag: str) -> None:
    """Note which file these are the first bytes of, as an attribute of the part: it comes and goes with it."""
    if _STRONG_ETAG.fullmatch(etag):
        with contextlib.suppress(OSError):  # not every disk has attributes; without one, Range alone must do
            os.setxattr(part, _ETAG_ATTRIBUTE, etag.encode())


def _kept_etag(part: Path) -> str:
    try:
        etag = os.getxattr(part, _ETAG_ATTRIBUTE).decode(errors="replace")
    except OSError:
        return ""
    return etag if _STRONG_ETAG.fullmatch(etag) else ""


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that the server asks for; None where it says nothing sensible."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:12])
    try:
        # By the server's own clock where it tells it: ours may be years off.
        now = parsedate_to_datetime(headers["date"]).timestamp() if "date" in headers else time.time()
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None
