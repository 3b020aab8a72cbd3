"""Serving: A/B, which arm answers a request.

Rules:
* pure: a key and the arms in, a version out; the same key falls to the same arm, here, elsewhere and after a restart;
* each experiment deals its own keys, so that two do not share their cards;
* without a key a request is the champion's, unless an arm asks for single requests too; then each is dealt for itself;
* an arm that is not there yet, or no longer, is answered for by the champion: no other key moves for it.
"""

from __future__ import annotations

import random

import msgspec

from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.experiment import MAX_KEY, point_of


class Arm(msgspec.Struct, frozen=True):
    """A version beside the champion, and the share of the keys that are its own."""

    experiment: str
    version: int
    share: float
    per_request: bool = False


class Split(msgspec.Struct, frozen=True):
    """The arms of one model, in the order in which they take."""

    arms: tuple[Arm, ...]

    @property
    def per_request(self) -> bool:
        """Whether requests without a key are dealt too."""
        return any(arm.per_request for arm in self.arms)

    def choose(self, key: str) -> int | None:
        """The version that answers `key`; None: the champion.

        Raises:
            ServingError: serving.malformed for a key that is too long.
        """
        if len(key) > MAX_KEY:
            message = f"Expected a key of at most {MAX_KEY} characters, found {len(key)}."
            raise ServingError("serving.malformed", message)
        for arm in self.arms:
            point = point_of(arm.experiment, key) if key else random.random() if arm.per_request else 1.0
            if point < arm.share:
                return arm.version
        return None
