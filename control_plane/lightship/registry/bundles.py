"""Registry: bundles by digest, parsed once."""

from __future__ import annotations

from collections import OrderedDict

from lightship.storage.artifacts import ArtifactStore
from lightship_agent.contract.bundle import Bundle, read_bundle

KEPT = 16


class BundleCache:
    """The last few bundles that were asked for."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        """Read from `artifacts`."""
        self._artifacts = artifacts
        self._kept: OrderedDict[str, Bundle] = OrderedDict()

    def __call__(self, digest: str) -> Bundle:
        """The bundle of that digest.

        Raises:
            StorageError: storage.corrupt.
            BundleError: bundle.malformed.
        """
        bundle = self._kept.get(digest)
        if bundle is None:
            bundle = read_bundle(self._artifacts.get(digest))
        self._kept[digest] = bundle
        self._kept.move_to_end(digest)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return bundle
