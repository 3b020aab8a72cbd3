"""Link: how long a certificate is valid, read from its bytes.

Rules:
* it is asked for at every report, of a certificate that was looked at closely when it was kept: what reads it here does
  without cryptography, which takes 5 MB of the process;
* nothing is trusted for what is read here, and whatever is unusual is left to cryptography.

Source: RFC 5280, 4.1; X.690, 8.1 and 10.1.
"""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime
from typing import Final, NamedTuple

_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
_SEQUENCE, _INTEGER, _VERSION, _UTC_TIME, _TIME = 0x30, 0x02, 0xA0, 0x17, 0x18
_LONG: Final = 0x80  # of a length: that many bytes follow, which say it
_PIVOT: Final = 50  # years of two digits below it are of this century


class Validity(NamedTuple):
    """From when to when, in Unix seconds, and the serial number."""

    begins: float
    ends: float
    serial: int


def validity_of(pem: bytes) -> Validity:
    """Of the first certificate there.

    Raises:
        ValueError: it is none, or none that is read here.
    """
    found = _PEM.search(pem)
    if found is None:
        raise ValueError("Expected a certificate.")
    try:
        certificate = _Values(base64.b64decode(found[1]))
        body = _Values(_Values(certificate.take(_SEQUENCE)).take(_SEQUENCE))
        if body.kind == _VERSION:
            body.take(_VERSION)
        serial = int.from_bytes(body.take(_INTEGER), "big", signed=True)
        body.take(_SEQUENCE)  # the algorithm
        body.take(_SEQUENCE)  # the issuer
        times = _Values(body.take(_SEQUENCE))
        return Validity(_time(times), _time(times), serial)
    except (binascii.Error, IndexError) as e:
        message = f"Expected a certificate: {e}."
        raise ValueError(message) from e


class _Values:
    """DER values that follow each other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def kind(self) -> int:
        """The tag of the next."""
        return self._data[self._at]

    def take(self, kind: int) -> bytes:
        """What is in the next, which is to have this tag."""
        if self.kind != kind:
            message = f"Expected a certificate with tag {kind:#x} here, found {self.kind:#x}."
            raise ValueError(message)
        size, begin = self._data[self._at + 1], self._at + 2
        if size >= _LONG:
            more = size - _LONG
            size, begin = int.from_bytes(self._data[begin : begin + more], "big"), begin + more
        self._at = begin + size
        if self._at > len(self._data):
            raise ValueError("Expected a certificate, found a part of one.")
        return self._data[begin : self._at]


def _time(values: _Values) -> float:
    kind = values.kind
    text = values.take(_UTC_TIME if kind == _UTC_TIME else _TIME).decode("ascii")
    if kind == _UTC_TIME:
        text = ("20" if int(text[:2]) < _PIVOT else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
