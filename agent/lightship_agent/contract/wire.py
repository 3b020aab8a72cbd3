"""Contract: bytes on the wire and canonical JSON.

Rules:
* MessagePack, decoded straight into typed structs: a wrong type is an error, never a surprise later;
* every size is bounded before decoding, and again while inflating;
* the first byte tells the codec (0x78 zlib, otherwise MessagePack), so MQTT 3.1.1 brokers will do;
* what is hashed or signed is canonical JSON: sorted keys, no spaces, UTF-8, no NaN.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any, Final, TypeVar

import msgspec

from .codes import LightshipError, WireError

T = TypeVar("T")

MAX_PACKED: Final = 256 * 1024  # bytes on the wire
MAX_INFLATED: Final = 4 * 1024 * 1024  # bytes after zlib
#: Below one TCP segment, compression costs more than it saves.
COMPRESS_ABOVE: Final = 1_400  # bytes
_ZLIB_FIRST_BYTE: Final = 0x78
_DECODERS: Final[dict[Any, msgspec.msgpack.Decoder[Any]]] = {}


def encode(message: Any) -> bytes:
    """MessagePack of a struct or of plain data."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: type[T], *, max_bytes: int = MAX_INFLATED) -> T:
    """The `kind` in `data`.

    Raises:
        WireError: wire.too-large above `max_bytes`; wire.malformed for anything that is not a `kind`.
    """
    if len(data) > max_bytes:
        raise WireError("wire.too-large", f"Expected at most {max_bytes} bytes, found {len(data)}.")
    try:
        message: T = _decoder(kind).decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError, OverflowError, LightshipError) as e:
        # A LightshipError is what a struct says of values that contradict each other; a union has no name.
        name = getattr(kind, "__name__", str(kind))
        raise WireError("wire.malformed", f"Expected a MessagePack {name}: {e}.") from e
    return message


def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Made once: what a union of structs means takes long to work out."""
    if kind not in _DECODERS:
        _DECODERS[kind] = msgspec.msgpack.Decoder(kind)
    return _DECODERS[kind]


def pack(message: Any) -> bytes:
    """MessagePack, zlib-compressed where that pays: always something that `unpack` accepts.

    Raises:
        WireError: wire.too-large when the result exceeds `MAX_PACKED`, or inflates to more than `MAX_INFLATED`.
    """
    raw = encode(message)
    if len(raw) > MAX_INFLATED:
        raise WireError("wire.too-large", f"Expected at most {MAX_INFLATED} bytes before packing, made {len(raw)}.")
    packed = zlib.compress(raw, 1) if len(raw) > COMPRESS_ABOVE else raw
    if len(packed) > MAX_PACKED:
        raise WireError("wire.too-large", f"Expected at most {MAX_PACKED} packed bytes, made {len(packed)}.")
    return packed


def unpack(data: bytes, kind: type[T]) -> T:
    """The inverse of `pack`; inflates at most `MAX_INFLATED` bytes whatever the data claims.

    Raises:
        WireError: wire.too-large, wire.malformed.
    """
    if len(data) > MAX_PACKED:
        raise WireError("wire.too-large", f"Expected at most {MAX_PACKED} bytes, found {len(data)}.")
    if data[:1] == bytes([_ZLIB_FIRST_BYTE]):
        data = _inflate(data)
    return decode(data, kind)


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(data, MAX_INFLATED)
    except zlib.error as e:
        raise WireError("wire.malformed", f"Expected a zlib stream: {e}.") from e
    if inflater.unconsumed_tail:
        raise WireError("wire.too-large", f"Inflates to more than {MAX_INFLATED} bytes.")
    if not inflater.eof or inflater.unused_data:
        raise WireError("wire.malformed", "Expected exactly one complete zlib stream.")
    return raw


def canonical_json(value: Any) -> bytes:
    """The one JSON text of `value` (RFC 8785 in spirit): sorted keys, no spaces, UTF-8.

    Raises:
        WireError: wire.malformed for NaN, infinities and what JSON can't say.
    """
    try:
        plain = msgspec.to_builtins(value)
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, msgspec.MsgspecError) as e:
        raise WireError("wire.malformed", f"Not expressible as canonical JSON: {e}.") from e


def sha256_hex(data: bytes) -> str:
    """Lower-case hex sha256."""
    return hashlib.sha256(data).hexdigest()
