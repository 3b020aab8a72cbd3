"""Serving: answers in gzip or deflate, for whoever asks for that and nothing else.

Rules:
* an Accept-Encoding of exactly `gzip` or `deflate` is a wish; a list is what HTTP libraries send unasked, and on the
  device itself compressing costs more than it saves;
* small answers stay as they are.

Source: RFC 9110, section 12.5.3; the headers of Triton's client.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Mapping
from typing import Final

from .connections import Reply

LEAST: Final = 1_024  # bytes
_LEVEL: Final = 1
_CODINGS: Final[dict[bytes, Callable[[bytes], bytes]]] = {
    b"gzip": lambda body: gzip.compress(body, _LEVEL, mtime=0),
    b"deflate": lambda body: zlib.compress(body, _LEVEL),
}


def compressed(reply: Reply, headers: Mapping[bytes, bytes]) -> Reply:
    """`reply` as the request's headers want it."""
    wish = headers.get(b"accept-encoding", b"").strip().lower()
    compress = _CODINGS.get(wish)
    if compress is None or len(reply.body) < LEAST:
        return reply
    told = (*reply.headers, (b"content-encoding", wish), (b"vary", b"accept-encoding"))
    return Reply(compress(reply.body), reply.status, reply.content_type, told)
