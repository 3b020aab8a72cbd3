"""One zstd frame, bounded by what was signed: bombs, cuts and tails are refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import cast

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship_agent.contract.codes import BundleError, TrustError
from lightship_agent.contract.transport import (
    WINDOW_LOG_MAX,
    apply_patch,
    decompress,
    delta_path,
    make_patch,
    pack_transport,
    unpack_transport,
)
from lightship_agent.contract.wire import sha256_hex


def unpacked(packed: bytes, data: bytes, length: int | None = None) -> bytes:
    return unpack_transport(
        packed,
        packed_sha256=sha256_hex(packed),
        sha256=sha256_hex(data),
        length=len(data) if length is None else length,
    )


@given(data=st.binary(max_size=20_000))
def test_what_was_packed_comes_out(data: bytes) -> None:
    assert unpacked(pack_transport(data), data) == data


def test_a_frame_that_inflates_beyond_the_signed_length_is_stopped() -> None:
    bomb = zstd.compress(bytes(200_000_000), level=19)

    assert len(bomb) < 20_000
    with pytest.raises(BundleError) as refused:
        decompress(bomb, 1_000)
    assert refused.value.code == "bundle.too-large"


def test_a_frame_that_asks_for_too_much_memory_is_refused() -> None:
    options = {zstd.CompressionParameter.window_log: WINDOW_LOG_MAX + 2, zstd.CompressionParameter.compression_level: 1}
    writer = zstd.ZstdCompressor(options=cast("Mapping[int, int]", options))
    greedy = writer.compress(os.urandom(100_000)) + writer.compress(bytes(1_000_000)) + writer.flush()

    with pytest.raises(BundleError) as refused:
        decompress(greedy, 2_000_000)

    assert refused.value.code == "bundle.malformed"


@settings(max_examples=60)
@given(data=st.data())
def test_a_cut_frame_is_refused(data: st.DataObject) -> None:
    whole = pack_transport(os.urandom(3_000))
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]

    with pytest.raises(BundleError) as refused:
        decompress(cut, 3_000)

    assert refused.value.code == "bundle.malformed"


@pytest.mark.parametrize("tail", [b"\0", b"x" * 100, pack_transport(b"a second frame"), b"\x50\x2a\x4d\x18\x01\0\0\0x"])
def test_bytes_after_the_frame_are_refused(tail: bytes) -> None:
    with pytest.raises(BundleError, match="follow"):
        decompress(pack_transport(b"bundle") + tail, 10_000)


@settings(max_examples=300)
@given(noise=st.binary(max_size=400), magic=st.booleans())
def test_noise_is_refused_and_ends(noise: bytes, magic: bool) -> None:
    data = (b"\x28\xb5\x2f\xfd" if magic else b"") + noise
    with contextlib.suppress(BundleError):
        assert len(decompress(data, 10_000)) <= 10_000


def test_other_bytes_than_the_signed_ones_are_refused_before_they_are_unpacked() -> None:
    with pytest.raises(TrustError) as refused:
        unpack_transport(b"never looked at", packed_sha256="0" * 64, sha256="0" * 64, length=5)

    assert refused.value.code == "trust.digest"


@pytest.mark.parametrize(("data", "length"), [(b"another bundle", 14), (b"bundle", 7)])
def test_a_frame_of_another_bundle_is_refused(data: bytes, length: int) -> None:
    packed = pack_transport(data)

    with pytest.raises(TrustError) as refused:
        unpack_transport(packed, packed_sha256=sha256_hex(packed), sha256=sha256_hex(b"bundle"), length=length)

    assert refused.value.code == "trust.digest"


# Patches --------------------------------------------------------------------------------------------------------------


def patched(patch: bytes, old: bytes, new: bytes, length: int | None = None) -> bytes:
    return apply_patch(
        patch,
        old,
        patch_sha256=sha256_hex(patch),
        sha256=sha256_hex(new),
        length=len(new) if length is None else length,
    )


@given(old=st.binary(min_size=8, max_size=5_000), kept=st.integers(0, 5_000), added=st.binary(max_size=500))
def test_a_patch_makes_the_new_from_the_old(old: bytes, kept: int, added: bytes) -> None:
    new = old[:kept] + added + old[kept:]
    assert patched(make_patch(old, new), old, new) == new


def test_a_patch_is_as_small_as_what_is_new() -> None:
    old = os.urandom(500_000)
    new = old[:250_000] + b"a little more" + old[250_000:]
    assert len(make_patch(old, new)) < 1_000


@pytest.mark.parametrize("wrong", ["another base", "a cut patch", "other patch bytes"])
def test_a_patch_that_does_not_fit_yields_an_error_and_never_other_bytes(wrong: str) -> None:
    old = os.urandom(10_000)
    new = old[:9_000] + os.urandom(500)
    patch = make_patch(old, new)
    given = patch[:-20] if wrong == "a cut patch" else patch
    base = os.urandom(10_000) if wrong == "another base" else old
    signed = sha256_hex(b"others" if wrong == "other patch bytes" else given)

    with pytest.raises((TrustError, BundleError)) as refused:
        apply_patch(given, base, patch_sha256=signed, sha256=sha256_hex(new), length=len(new))

    assert refused.value.code in {"trust.digest", "bundle.malformed"}


def test_a_patch_that_inflates_beyond_the_signed_length_is_stopped() -> None:
    old, bomb = b"the base", bytes(100_000_000)
    with pytest.raises(BundleError) as refused:
        patched(make_patch(old, bomb), old, bomb, length=1_000)
    assert refused.value.code == "bundle.too-large"


def test_a_delta_is_found_under_both_digests() -> None:
    assert delta_path("pump", "a" * 64, "b" * 64) == f"deltas/pump/{'a' * 16}-{'b' * 16}.zpatch"
