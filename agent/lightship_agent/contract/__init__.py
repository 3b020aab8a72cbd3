"""The shared language of device and control plane.

Rules of this room:
* only the standard library, numpy and the wire codec (msgspec) may be imported;
* no I/O, no clock, no thread: bytes and numbers in, bytes and numbers out;
* what is written here is a promise: `tests/golden/` holds files of every released contract version,
  and today's code must read them.
"""

CONTRACT_VERSION = 1
