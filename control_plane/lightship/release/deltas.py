"""Release: patches from bundles that devices have to the one that is released, made once, when it is released.

Rules:
* a patch is only a shorter way: it is listed where it is under 60 % of what travels otherwise, and whoever lacks its
  base fetches the whole;
* bases are few, and those that most devices can use: what they run, what is champion, what was released last;
* making a patch takes seconds of CPU for some megabytes, and its memory grows with both bundles: bases are bounded in
  size and number, and nothing is made under the repository's lock;
* the list holds patches to the newest versions only: nobody goes from one old version to another, and every device
  reads the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from lightship_agent.contract.transport import (
    DELTA_BASE_MAX,
    DELTA_SUFFIX,
    DELTA_WORTH,
    PATCH_LOG_MAX,
    delta_path,
    make_patch,
)
from lightship_agent.contract.wire import sha256_hex

MAX_BASES: Final = 3
#: Patches are listed to so many of a model's newest versions.
KEPT_VERSIONS: Final = 2
_LEAST: Final = 8  # bytes that a patch needs of its base


@dataclass(frozen=True)
class Base:
    """A released bundle of the same model."""

    version: int
    digest: str
    length: int
    devices: int = 0  # that run it
    champion: bool = False


def choose_bases(candidates: Iterable[Base], *, digest: str, length: int) -> tuple[Base, ...]:
    """The bundles that patches to a new one are worth their making from, those of most use first.

    Args:
        candidates: what is released.
        digest: of the new bundle.
        length: of the new bundle.
    """
    fit = [b for b in candidates if b.digest != digest and _LEAST <= b.length <= _most(length)]
    newest = sorted(fit, key=lambda b: -b.version)
    running = sorted((b for b in newest if b.devices), key=lambda b: -b.devices)
    wanted = [*running[:2], *(b for b in newest if b.champion), *newest[:2]]
    return tuple({b.digest: b for b in wanted}.values())[:MAX_BASES]


def _most(length: int) -> int:
    """The largest base: what a device holds in memory, and what a patch can look back over."""
    return min(DELTA_BASE_MAX, (1 << PATCH_LOG_MAX) - length)


def make_deltas(
    model: str,
    bundle: bytes,
    transport_length: int,
    bases: Iterable[tuple[Base, bytes]],
    *,
    progress: Callable[[str], None] = lambda _text: None,
) -> dict[str, bytes]:
    """The patches worth listing, by the path of their target.

    Args:
        model: the name of both ends.
        bundle: the new one.
        transport_length: bytes that travel where there is no patch.
        bases: what to patch from.
        progress: told in words what is being done, and what came of it.
    """
    made = {}
    for base, old in bases:
        progress(f"patch from version {base.version}")
        patch = make_patch(old, bundle)
        share = len(patch) / transport_length
        if share < DELTA_WORTH:
            made[delta_path(model, base.digest, sha256_hex(bundle))] = patch
        progress(f"patch from version {base.version}: {_verdict(share)}")
    return made


def _verdict(share: float) -> str:
    kept = "is released" if share < DELTA_WORTH else f"not under {DELTA_WORTH:.0%}, so it is not worth it"
    return f"{share:.0%} of the whole; {kept}"


def stale_patches(listed: Mapping[str, str], model: str) -> list[str]:
    """The listed patches of `model` that lead to none of its newest versions.

    Args:
        listed: digests by path, of everything in the release list.
        model: whose.
    """
    prefix = f"bundles/{model}/"
    bundles = [p for p in listed if p.startswith(prefix) and p.endswith(".tar")]
    numbered = {int(p[len(prefix) : -4]): listed[p] for p in bundles if p[len(prefix) : -4].isdecimal()}
    ends = tuple(f"-{numbered[n][:16]}{DELTA_SUFFIX}" for n in sorted(numbered, reverse=True)[:KEPT_VERSIONS])
    return [p for p in listed if p.startswith(f"deltas/{model}/") and not p.endswith(ends)]
