"""Contract: how a bundle travels: one zstd frame, alone (`.zst`) or against an older bundle (`.zpatch`).

Rules:
* the bytes that travel are verified before they are decompressed;
* the output is bounded by the signed length of the bundle and by a window limit; it must have the signed digest,
  whatever it was patched from;
* a patch is only a shorter way: where it does not fit, the whole is fetched.

Source: RFC 8878; `zstd --patch-from`, whose patches apply here and the other way round.
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
DELTA_SUFFIX: Final = ".zpatch"
#: A patch that is not much smaller than the whole is not worth the memory it takes.
DELTA_WORTH: Final = 0.6
WINDOW_LOG_MAX: Final = 25  # 32 MiB of memory at most, whatever a frame asks for
#: A patch looks back over the old bundle: old and new together, 128 MiB at most.
PATCH_LOG_MAX: Final = 27
#: The largest old bundle that is patched, for patching holds old and new in memory.
DELTA_BASE_MAX: Final = 48 << 20
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


def delta_path(model: str, old_sha256: str, new_sha256: str) -> str:
    """The TUF target of the patch from one bundle to another."""
    return f"deltas/{model}/{old_sha256[:16]}-{new_sha256[:16]}{DELTA_SUFFIX}"


def make_patch(old: bytes, new: bytes) -> bytes:
    """One zstd frame that holds what `new` has and `old`, of at least 8 bytes, has not. Some seconds for 5 MB."""
    reach = min(PATCH_LOG_MAX, max(10, (len(old) + len(new)).bit_length()))
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: 19,
        zstd.CompressionParameter.window_log: reach,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
        zstd.CompressionParameter.checksum_flag: 1,
    }
    return zstd.compress(new, options=options, zstd_dict=zstd.ZstdDict(old, is_raw=True).as_prefix)


def apply_patch(patch: bytes, old: bytes, *, patch_sha256: str, sha256: str, length: int) -> bytes:
    """The new bundle, from verified patch bytes and the old one.

    Raises:
        TrustError: trust.digest when a digest is wrong, as it is when `old` is not what the patch was made from.
        BundleError: bundle.malformed, bundle.too-large.
    """
    if sha256_hex(patch) != patch_sha256:
        raise TrustError("trust.digest", "The downloaded patch is not the signed one.")
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: PATCH_LOG_MAX}
    reader = zstd.ZstdDecompressor(zstd_dict=zstd.ZstdDict(old, is_raw=True).as_prefix, options=options)
    data = _inflate(reader, patch, length)
    if len(data) != length or sha256_hex(data) != sha256:
        raise TrustError("trust.digest", "The patched bundle is not the signed one.")
    return data


def decompress(packed: bytes, limit: int) -> bytes:
    """One zstd frame, at most `limit` bytes.

    Raises:
        BundleError: bundle.malformed, bundle.too-large.
    """
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG_MAX}
    return _inflate(zstd.ZstdDecompressor(options=options), packed, limit)


def _inflate(reader: zstd.ZstdDecompressor, packed: bytes, limit: int) -> bytes:
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
