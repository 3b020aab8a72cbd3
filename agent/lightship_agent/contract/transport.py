"""Contract: how a bundle travels, one zstd frame beside the uncompressed bytes that carry its identity.

Rules: the compressed bytes are verified before they are decompressed; the output is bounded by the signed length
of the bundle and by a window limit; the result must have the signed digest.
"""

from __future__ import annotations

import sys
from typing import Final

from .codes import BundleError, TrustError
from .wire import sha256_hex

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: What is appended to a bundle's path for the file that is downloaded.
TRANSPORT_SUFFIX: Final = ".zst"
WINDOW_LOG_MAX: Final = 25  # 32 MiB of memory at most, whatever a frame asks for
_STEP: Final = 1 << 20


def pack_transport(data: bytes) -> bytes:
    """One zstd frame of `data`: ten times smaller for tree ensembles."""
    return zstd.compress(data, level=19)


def unpack_transport(packed: bytes, *, packed_sha256: str, sha256: str, length: int) -> bytes:
    """The bundle inside verified zstd bytes.

    Raises:
        TrustError: trust.digest when either digest is wrong.
        BundleError: bundle.malformed, bundle.too-large.
    """
    if sha256_hex(packed) != packed_sha256:
        raise TrustError("trust.digest", "The downloaded bytes are not the signed ones.")
    data = decompress(packed, length)
    if len(data) != length or sha256_hex(data) != sha256:
        raise TrustError("trust.digest", "The unpacked bundle is not the signed one.")
    return data


def decompress(packed: bytes, limit: int) -> bytes:
    """One zstd frame, at most `limit` bytes.

    Raises:
        BundleError: bundle.malformed, bundle.too-large.
    """
    reader = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG_MAX})
    out = bytearray()
    feed = packed
    try:
        while not reader.eof:
            chunk = reader.decompress(feed, max_length=_STEP)
            feed = b""
            out += chunk
            if len(out) > limit:
                raise BundleError("bundle.too-large", f"Inflates to more than the signed {limit} bytes.")
            if not chunk and reader.needs_input:
                raise BundleError("bundle.malformed", "The zstd frame is cut off.")
    except zstd.ZstdError as e:
        raise BundleError("bundle.malformed", f"Not a zstd frame within bounds: {e}.") from e
    if reader.unused_data:
        raise BundleError("bundle.malformed", "Bytes follow the zstd frame.")
    return bytes(out)
