"""Contract: the bundle, a flat, uncompressed, deterministic ustar.

Rules:
* its identity is the sha256 of its bytes; the same members give the same bytes on any machine;
* members are regular files from a closed list of names: no folders, links, devices, extensions, duplicates;
* the reader is strict and works on bytes: it accepts exactly what the writer writes;
* the manifest comes first and vouches for the others by digest and length.

Source: POSIX.1-1988 ustar interchange format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from .codes import BundleError, WireError
from .manifest import Manifest, Member, manifest_bytes, parse_manifest
from .profile import ReferenceProfile
from .tensors import GoldenTensors
from .ustar import BLOCK, END, claimed_length, claimed_name, header, padding
from .wire import decode, encode, sha256_hex

MANIFEST: Final = "manifest.json"
MODEL: Final = "model.onnx"
PROFILE: Final = "profile.msgpack"
GOLDEN: Final = "golden.msgpack"
TENSORS: Final = "tensors.msgpack"
BACKGROUND: Final = "background.msgpack"
CARD: Final = "card.md"

#: Every name a bundle may hold, in archive order, with its largest size in bytes.
MEMBERS: Final[dict[str, int]] = {
    MANIFEST: 512 * 1024,
    MODEL: 1024 * 1024 * 1024,
    PROFILE: 4 * 1024 * 1024,
    GOLDEN: 4 * 1024 * 1024,
    TENSORS: 32 * 1024 * 1024,
    BACKGROUND: 4 * 1024 * 1024,
    CARD: 256 * 1024,
}
_REQUIRED: Final = (MANIFEST, MODEL, PROFILE, GOLDEN)
_ZSTD: Final = b"\x28\xb5\x2f\xfd"  # how a bundle begins while it travels
MAX_BUNDLE: Final = sum(MEMBERS.values()) + 2 * BLOCK * (len(MEMBERS) + 1)


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """A float32 matrix on the wire: little-endian, row-major."""

    rows: int
    width: int
    data: bytes

    @classmethod
    def of(cls, matrix: npt.NDArray[np.float32]) -> Rows:
        """From a float32 `[rows, width]`."""
        return cls(rows=matrix.shape[0], width=matrix.shape[1], data=matrix.astype("<f4").tobytes())

    def matrix(self) -> npt.NDArray[np.float32]:
        """Back to float32 `[rows, width]`.

        Raises:
            BundleError: bundle.malformed when the sizes disagree.
        """
        if self.rows < 0 or self.width < 1 or len(self.data) != 4 * self.rows * self.width:
            raise BundleError(
                "bundle.malformed", f"Rows: {len(self.data)} bytes are not {self.rows}×{self.width} float32."
            )
        return np.frombuffer(self.data, dtype="<f4").reshape(self.rows, self.width).astype(np.float32)


class Golden(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs, and what the model must answer to them on every CPU.

    `values` holds scores `[rows, classes]` of a classifier, or values `[rows, 1]` of a regressor.
    """

    inputs: Rows
    values: Rows
    labels: tuple[int, ...] = ()


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """A verified bundle in memory."""

    digest: str
    manifest: Manifest
    model: bytes
    profile: ReferenceProfile
    golden: Golden
    tensors: GoldenTensors | None = None  # of a model that takes tensors; `golden` then holds what is watched of them
    background: npt.NDArray[np.float32] | None = None
    card: str = ""


def build_bundle(manifest: Manifest, members: Mapping[str, bytes]) -> bytes:
    """The archive of `members`, with the manifest completed by their digests and put first.

    Raises:
        BundleError: bundle.malformed for a missing or unknown member; bundle.too-large.
    """
    listed = {name: Member(sha256=sha256_hex(members[name]), length=len(members[name])) for name in sorted(members)}
    complete = msgspec.structs.replace(manifest, members=listed)
    return _write_archive({MANIFEST: manifest_bytes(complete), **members})


def read_bundle(data: bytes) -> Bundle:
    """Check and parse the archive in `data`.

    Raises:
        BundleError: bundle.malformed, bundle.manifest, bundle.digest, bundle.too-large.
    """
    members = read_members(data)
    manifest = parse_manifest(members[MANIFEST])
    try:
        profile = decode(members[PROFILE], ReferenceProfile)
        golden = decode(members[GOLDEN], Golden)
        tensors = None
        if TENSORS in members:
            tensors = decode(members[TENSORS], GoldenTensors, max_bytes=MEMBERS[TENSORS])
        background = decode(members[BACKGROUND], Rows).matrix() if BACKGROUND in members else None
        card = members.get(CARD, b"").decode()
    except (WireError, UnicodeDecodeError) as e:
        raise BundleError("bundle.malformed", f"A member can't be read: {e}") from e
    _check_shapes(manifest, profile, golden)
    if bool(manifest.tensors) != (tensors is not None):
        raise BundleError(
            "bundle.manifest", "Golden tensors are expected of a model that takes tensors, and of no other."
        )
    if manifest.tensors and tensors is not None:
        tensors.check(manifest.tensors)
    return Bundle(
        digest=sha256_hex(data),
        manifest=manifest,
        model=members[MODEL],
        profile=profile,
        golden=golden,
        tensors=tensors,
        background=background,
        card=card,
    )


def read_members(data: bytes) -> dict[str, bytes]:
    """The archive's members, each as its manifest promises.

    Raises:
        BundleError: bundle.malformed, bundle.manifest, bundle.digest, bundle.too-large.
    """
    members = _read_archive(data)
    absent = [name for name in _REQUIRED if name not in members]
    if absent:
        raise BundleError("bundle.malformed", f"Missing from the bundle: {', '.join(absent)}.")
    manifest = parse_manifest(members[MANIFEST])
    if set(manifest.members) != set(members) - {MANIFEST}:
        raise BundleError("bundle.manifest", "The manifest lists other members than the archive holds.")
    for name, promised in manifest.members.items():
        if len(members[name]) != promised.length or sha256_hex(members[name]) != promised.sha256:
            raise BundleError("bundle.digest", f"Member {name!r} is not the one the manifest vouches for.")
    return members


def encode_golden(golden: Golden) -> bytes:
    """The member bytes of golden rows."""
    return encode(golden)


def _check_shapes(manifest: Manifest, profile: ReferenceProfile, golden: Golden) -> None:
    width = manifest.input_schema.width
    if tuple(f.name for f in profile.features) != manifest.input_schema.names:
        raise BundleError("bundle.manifest", "Profile and schema name different features.")
    if manifest.tensors:
        manifest.tensors.check_projections(profile.projections)
    elif profile.projections:
        raise BundleError("bundle.manifest", "Projections are expected of a model that takes tensors, and of no other.")
    inputs, values = golden.inputs.matrix(), golden.values.matrix()
    if inputs.shape[1] != width or len(inputs) != len(values) or not len(inputs):
        raise BundleError("bundle.manifest", f"Golden rows: expected [n ≥ 1, {width}], found {list(inputs.shape)}.")
    if manifest.outputs.task == "classification" and len(golden.labels) != len(inputs):
        raise BundleError("bundle.manifest", "Golden rows: one label per row is expected.")


def _write_archive(members: Mapping[str, bytes]) -> bytes:
    out = bytearray()
    unknown = set(members) - set(MEMBERS)
    if unknown:
        raise BundleError("bundle.malformed", f"Not a bundle member: {', '.join(sorted(unknown))}.")
    for name in MEMBERS:
        if name not in members:
            continue
        body = members[name]
        if len(body) > MEMBERS[name]:
            raise BundleError("bundle.too-large", f"Member {name!r}: {len(body)} bytes exceed {MEMBERS[name]}.")
        out += header(name, len(body)) + body + bytes(padding(len(body)))
    return bytes(out + END)


def _read_archive(data: bytes) -> dict[str, bytes]:
    """Accept exactly what `_write_archive` writes, by rebuilding each header from the name and length it claims."""
    if len(data) > MAX_BUNDLE:
        raise BundleError("bundle.too-large", f"Expected at most {MAX_BUNDLE} bytes, found {len(data)}.")
    members: dict[str, bytes] = {}
    view, at = memoryview(data), 0
    order = list(MEMBERS)
    while at + BLOCK <= len(data) and any(view[at : at + BLOCK]):
        name, length = _claims(bytes(view[at : at + BLOCK]))
        if name in members or (members and order.index(name) < order.index(list(members)[-1])):
            raise BundleError("bundle.malformed", f"Member {name!r} is out of order or twice in the archive.")
        body = at + BLOCK
        end = body + length + padding(length)
        if end > len(data):
            raise BundleError("bundle.malformed", f"Member {name!r} is cut off.")
        if any(view[body + length : end]):
            raise BundleError("bundle.malformed", f"Member {name!r}: padding is not zero.")
        members[name] = bytes(view[body : body + length])
        at = end
    if len(data) - at != 2 * BLOCK or any(view[at:]):
        raise BundleError("bundle.malformed", "The archive does not end in exactly two zero blocks.")
    return members


def _claims(block: bytes) -> tuple[str, int]:
    if block.startswith(_ZSTD):
        message = "The bundle is compressed, as it travels."
        raise BundleError("bundle.malformed", message, remedy="Decompress it first, e.g. with `zstd -d`.")
    if block[257:262] != b"ustar":
        raise BundleError("bundle.malformed", "Expected a bundle, which is a ustar archive; these bytes are none.")
    name, length = claimed_name(block), claimed_length(block)
    if name not in MEMBERS:
        raise BundleError("bundle.malformed", f"{name[:60]!r} is not a bundle member.")
    if length is None:
        raise BundleError("bundle.malformed", f"Member {name!r}: the length is not octal.")
    if length > MEMBERS[name]:
        raise BundleError("bundle.too-large", f"Member {name!r}: {length} bytes exceed {MEMBERS[name]}.")
    if block != header(name, length):
        raise BundleError("bundle.malformed", f"Member {name!r}: not a plain deterministic ustar header.")
    return name, length
