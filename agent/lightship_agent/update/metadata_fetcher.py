"""Update: signed metadata from the server, bounded in every direction.

Rules:
* the response is opened eagerly, so that its status raises where the TUF client expects it;
* raw iteration without a chunk size, so that a drip feed meets the deadline;
* an absolute deadline from the request on, a minimum rate after a grace, no redirects, no transparent decoding;
* every error of the HTTP client becomes one of the TUF client's own, which the caller knows how to explain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import httpx
from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError, SlowRetrievalError
from tuf.ngclient.fetcher import FetcherInterface

#: What is asked for is what must come: a compressed answer would be inflated before its length is judged.
_IDENTITY: Final = {"Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Patience:
    """How long one metadata file may take."""

    seconds: float = 60.0  # for the whole of it, from the request on
    minimum_rate: float = 200.0  # bytes a second, judged once `grace` is over
    grace: float = 15.0  # seconds


class MetadataFetcher(FetcherInterface):
    """The TUF client's network, over our own HTTP client."""

    def __init__(
        self,
        http: httpx.Client,
        patience: Patience | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Use `http` for every request; `monotonic` is seconds on a clock that never jumps."""
        self._http = http
        self._patience = patience or Patience()
        self._monotonic = monotonic

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """The whole of a metadata file, at most `max_length` bytes, in memory: a device's /tmp may be full, or absent.

        Raises:
            DownloadError: and its kinds, as the TUF client knows them.
        """
        data = bytearray()
        for chunk in self.fetch(url):
            data += chunk
            if len(data) > max_length:
                message = f"{url}: more than the {max_length} bytes it may have"
                raise DownloadLengthMismatchError(message)
        return bytes(data)

    def _fetch(self, url: str) -> Iterator[bytes]:
        # Not a generator itself: the status must raise here.
        began = self._monotonic()
        try:
            request = self._http.build_request("GET", url, headers=_IDENTITY)
            response = self._http.send(request, stream=True, follow_redirects=False)
        except httpx.TimeoutException as e:
            message = f"{url}: {type(e).__name__}: {e}"
            raise SlowRetrievalError(message) from e
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            message = f"{url}: {type(e).__name__}: {e}"
            raise DownloadError(message) from e
        if response.status_code != 200:
            response.close()
            message = f"{url}: status {response.status_code}"
            raise DownloadHTTPError(message, response.status_code)
        if response.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
            response.close()
            message = f"{url}: the answer is encoded, and we asked for it as it is"
            raise DownloadError(message)
        return self._chunks(response, url, began)

    def _chunks(self, response: httpx.Response, url: str, began: float) -> Iterator[bytes]:
        got = 0
        try:
            for chunk in response.iter_raw():
                got += len(chunk)
                self._judge(url, got, self._monotonic() - began)
                yield chunk
        except httpx.TimeoutException as e:
            message = f"{url}: {type(e).__name__}: {e}"
            raise SlowRetrievalError(message) from e
        except httpx.HTTPError as e:
            message = f"{url}: {type(e).__name__}: {e}"
            raise DownloadError(message) from e
        finally:
            response.close()

    def _judge(self, url: str, got: int, spent: float) -> None:
        if spent > self._patience.seconds:
            message = f"{url}: not complete within {self._patience.seconds:g} s"
            raise SlowRetrievalError(message)
        if spent > self._patience.grace and got < spent * self._patience.minimum_rate:
            message = f"{url}: {got} bytes in {spent:.0f} s, below {self._patience.minimum_rate:g} B/s"
            raise SlowRetrievalError(message)
