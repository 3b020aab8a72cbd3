"""Update: a released bundle, brought into the store.

Rules:
* what is in the store already is not fetched again; otherwise the shorter way first, a patch against the bundle that
  runs, and the whole where the patch is not worth it, can't be had, or does not make the bundle that was signed;
* a link that is gone is gone for the whole as well: only what the patch itself is to blame for leads on to the whole;
* room is made first: for what travels, for what it becomes, and within what this device grants its bundles; neither
  what runs nor the one before is ever removed for it;
* what travelled is removed as soon as the bundle is in the store, or can't be made of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.codes import BundleError, LightshipError, LinkError, TrustError
from lightship_agent.contract.transport import DELTA_BASE_MAX, DELTA_WORTH, apply_patch, unpack_transport
from lightship_agent.fail_points import fail_point

from .machine import Target
from .released import ReleasedFile
from .store import BundleStore

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where released files come from."""

    def read(self, file: ReleasedFile, part: Path) -> bytes:
        """The file's `file.length` bytes, gone on with from `part`; the caller verifies their digest.

        Raises:
            LinkError: link.*.
            StorageError: storage.*.
            UpdateError: update.interrupted, update.superseded, update.deferred.
        """


class Ways(msgspec.Struct, frozen=True):
    """How one bundle may be brought here."""

    transport: ReleasedFile
    delta: ReleasedFile | None
    base: str  # the digest of the bundle that runs, which a patch starts from; empty: none
    keep: tuple[str, ...]  # digests that stay, whatever room is needed


def fetch(store: BundleStore, source: Source, target: Target, ways: Ways, allowed: Callable[[], None]) -> None:
    """Have the bundle in the store, verified.

    Args:
        store: where it belongs.
        source: where what travels comes from.
        target: the bundle.
        ways: the released files that bring it.
        allowed: asked before anything is transferred; raises where this is not the moment.

    Raises:
        TrustError: trust.digest.
        BundleError: bundle.malformed, bundle.too-large.
        LinkError: link.*.
        StorageError: storage.*.
        UpdateError: update.interrupted, update.superseded, update.deferred.
    """
    if store.holds(target.sha256):
        return
    allowed()
    # What has come already takes its room now, and must not be asked for twice.
    to_come = max(0, ways.transport.length - store.come_of(target.sha256))
    store.make_room(target.length + to_come, ways.keep)
    fail_point("fetching")
    data = _patched(store, source, target, ways) or _whole(store, source, target, ways.transport)
    try:
        read_bundle(data)
        fail_point("before-store")
        store.put(target.sha256, data)
    finally:
        store.forget_parts(target.sha256)


def _whole(store: BundleStore, source: Source, target: Target, transport: ReleasedFile) -> bytes:
    part = store.part(target.sha256)
    packed = source.read(transport, part)
    try:
        fail_point("unpacking")
        return unpack_transport(packed, packed_sha256=transport.sha256, sha256=target.sha256, length=target.length)
    except LightshipError:
        # Nothing can be made of these bytes: the next try begins anew.
        part.unlink(missing_ok=True)
        raise


def _patched(store: BundleStore, source: Source, target: Target, ways: Ways) -> bytes | None:
    """The bundle by way of the patch; None where the whole is the way."""
    delta, base = ways.delta, store.read(ways.base) if ways.delta and ways.base else None
    if delta is None or base is None or not _worth(delta, ways.transport, len(base), _size(store.part(target.sha256))):
        return None
    part = store.part(target.sha256, "zpatch")
    try:
        patch = source.read(delta, part)
    except LinkError as e:
        if e.code != "link.status":
            raise
        part.unlink(missing_ok=True)
        _say_of_no_use(e)
        return None
    try:
        fail_point("unpacking")
        return apply_patch(patch, base, patch_sha256=delta.sha256, sha256=target.sha256, length=target.length)
    except (TrustError, BundleError) as e:
        _say_of_no_use(e)
        return None
    finally:
        part.unlink(missing_ok=True)


def _say_of_no_use(e: LightshipError) -> None:
    log.warning("update: the patch is of no use, the whole is fetched: %s: %s", e.code, e)


def _worth(delta: ReleasedFile, transport: ReleasedFile, base_length: int, have: int) -> bool:
    """Whether the patch is the shorter way, by how much it weighs and what has come of the whole already."""
    light = delta.length < DELTA_WORTH * transport.length and base_length <= DELTA_BASE_MAX
    return light and delta.length < transport.length - have


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
