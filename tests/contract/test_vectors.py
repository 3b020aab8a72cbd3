"""Vectors arrive as they were packed, add up to the bit, and bytes that are none are refused."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import DataError, WireError
from lightship_agent.contract.messages import AnyRecord, PackedMoments, Window, packed
from lightship_agent.contract.moments import Moments
from lightship_agent.contract.vectors import BASED, MOST, SIGNED, Vector, add, check, total
from lightship_agent.contract.wire import decode, encode

MOST_COUNTED, FURTHEST = 2**53, 2**54
DIGEST = "a" * 64


def numbers(least: int = -FURTHEST, most: int = FURTHEST, longest: int = 100) -> st.SearchStrategy[list[int]]:
    """Small and large ones, and such as lie near each other far from 0."""
    anything = st.lists(st.integers(least, most), max_size=longest)
    small = st.lists(st.integers(max(least, -300), 300), max_size=longest)
    near = st.integers(300, 2**40).flatmap(
        lambda middle: st.lists(st.integers(middle - 290, middle + 290), min_size=64, max_size=longest)
    )
    return anything | small | near


@given(counted=numbers())
def test_a_vector_comes_back_as_it_was_packed(counted: list[int]) -> None:
    found = Vector(Vector(counted).packed)

    assert found == tuple(counted) == tuple(found)
    assert found == Vector(counted)
    assert (len(found), list(found), hash(found)) == (len(counted), counted, hash(tuple(counted)))
    check(found.packed, -FURTHEST, FURTHEST)


@given(vectors=st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.integers(-(2**54), 2**54), min_size=n, max_size=n), min_size=1, max_size=8)
))  # fmt: skip
def test_adding_many_at_once_is_adding_them_one_by_one(vectors: list[list[int]]) -> None:
    expected = tuple(map(sum, zip(*vectors, strict=True)))

    assert tuple(total([Vector(Vector(v).packed) for v in vectors])) == expected
    assert tuple(functools.reduce(add, [Vector(v) for v in vectors])) == expected
    assert tuple(total([tuple(v) for v in vectors])) == expected


@given(windows=st.lists(numbers(0, MOST_COUNTED, 70).filter(len), min_size=1, max_size=4), times=st.integers(1, 300))
def test_adding_is_exact_also_where_the_sum_is_too_large_for_64_bits(windows: list[list[int]], times: int) -> None:
    shortest = min(map(len, windows))
    some = [Vector(Vector(w[:shortest]).packed) for w in windows] * times

    assert list(total(some)) == [sum(column) * times for column in zip(*(w[:shortest] for w in windows), strict=True)]


def test_vectors_of_different_lengths_are_not_added() -> None:
    for one, other in (((1, 2), (1, 2, 3)), (Vector([1, 2]), Vector([1, 2, 3]))):
        for adding in (add, lambda a, b: total([a, b])):
            with pytest.raises(DataError) as refused:
                adding(one, other)
            assert refused.value.code == "data.profile-mismatch"


def test_counts_that_lie_near_each_other_take_a_byte_each() -> None:
    near = np.random.default_rng(1).integers(1_000_000, 1_000_200, 690)

    assert len(Vector(near).packed) == 1 + 8 + 690
    assert len(Vector(near[:10]).packed) == 1 + 3 * 10
    assert len(Vector([0] * 690).packed) == 1 + 690


def test_a_slice_and_an_array_of_a_vector_hold_its_numbers() -> None:
    vector = Vector(Vector([5, -6, 700]).packed)

    assert (vector[0], vector[-1], vector[1:]) == (5, 700, (-6, 700))
    assert np.asarray(vector, dtype=np.float64).tolist() == [5.0, -6.0, 700.0]
    assert vector != (5, -6)
    assert vector != [5, -6, 700]
    assert repr(vector) == "Vector([5, -6, 700])"


def test_numbers_too_large_for_seven_bytes_are_not_packed() -> None:
    with pytest.raises(DataError) as refused:
        Vector([1, 2**56]).packed  # noqa: B018 - reading it packs
    assert refused.value.code == "data.profile-mismatch"


# Bytes of somebody else -----------------------------------------------------------------------------------------------

_BASE = (2**53).to_bytes(8, "little")


@pytest.mark.parametrize(
    "spoilt",
    [
        b"",  # not even a width
        b"\x00", b"\x00\x01", b"\x08" + bytes(8), b"\x3f" + bytes(63),  # no width, or one too large
        b"\x02\x01\x02\x03",  # half a number
        bytes([1 | BASED]), bytes([1 | BASED]) + bytes(7),  # a base that is cut off
        b"\x07" + b"\xff" * 7,  # 2⁵⁶ - 1 rows
        bytes([1 | SIGNED, 0xFF]),  # -1 rows
        bytes([1 | BASED]) + _BASE + b"\x01",  # 2⁵³ + 1 rows
        bytes([1 | BASED]) + (-1).to_bytes(8, "little", signed=True) + b"\x00",
        bytes([7 | BASED]) + b"\xff" * 7 + b"\x7f" + b"\xff" * 7,  # a sum that does not fit 64 bits
        b"\x01" + bytes(MOST + 1),
    ],
)  # fmt: skip
def test_bytes_that_are_no_counts_spoil_the_message(spoilt: bytes) -> None:
    good = Window(
        s=1, t=1, model="m", version=1, digest=DIGEST, schema=DIGEST, w=1, opened=1, rows=1, counts=packed((1, 2)),
    )  # fmt: skip
    plain = {name: getattr(good, name) for name in good.__struct_fields__} | {"k": "window"}
    kind: type = AnyRecord  # type: ignore[assignment]

    assert decode(encode(plain), kind) == good
    for part in ("counts", "predictions", "scores", "distances", "values"):
        with pytest.raises(WireError) as refused:
            decode(encode({**plain, part: spoilt}), kind)
        assert refused.value.code == "wire.malformed"


@given(noise=st.binary(max_size=60))
def test_what_is_let_pass_can_be_counted_with(noise: bytes) -> None:
    try:
        check(noise, 0, MOST_COUNTED)
    except WireError:
        return

    vector = Vector(noise)
    assert len(vector) == len(list(vector))
    assert all(0 <= n <= MOST_COUNTED for n in vector)
    assert tuple(total([vector, vector])) == tuple(2 * n for n in vector)


def test_sums_may_be_negative_and_are_bounded() -> None:
    moments = Moments(rows=2, pairs=1, sums=(-3, 4), squares=(9, 70_000), lags=(0, -12))
    sent = PackedMoments.of(moments)
    assert sent is not None

    assert decode(encode(sent), PackedMoments).moments() == moments
    for spoilt in (b"\x02\x01", bytes([7 | SIGNED]) + b"\x00" * 6 + b"\x80"):
        with pytest.raises(WireError):
            decode(encode([2, 1, sent.sums, spoilt, sent.lags]), PackedMoments)


def test_numbers_one_by_one_are_read_as_before() -> None:
    old = {
        "k": "window", "s": 1, "t": 1, "model": "m", "version": 1, "digest": DIGEST, "schema": DIGEST, "w": 1,
        "opened": 1, "rows": 3, "counts": [1, 2], "scores": [3], "moments": [3, 2, [1, -1], [2, 2], [0, -2]],
    }  # fmt: skip
    kind: type = AnyRecord  # type: ignore[assignment]

    content = decode(encode(old), kind).content()

    assert (content.counts, content.scores) == ((1, 2), (3,))
    assert content.moments == Moments(rows=3, pairs=2, sums=(1, -1), squares=(2, 2), lags=(0, -2))
