"""Whatever bytes arrive, the codec answers with a message or with a WireError, within its bounds."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship_agent.contract.codes import WireError
from lightship_agent.contract.messages import (
    AnyRecord,
    Command,
    Envelope,
    Fault,
    Heartbeat,
    Labels,
    PackedMoments,
    State,
    Together,
    Update,
    Window,
    packed,
)
from lightship_agent.contract.moments import Moments, Products
from lightship_agent.contract.quality import FOUND, REFUSED, QualityCount
from lightship_agent.contract.wire import (
    COMPRESS_ABOVE,
    MAX_INFLATED,
    MAX_PACKED,
    canonical_json,
    decode,
    encode,
    pack,
    sha256_hex,
    unpack,
)

DIGEST = "a" * 64
Json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def windows() -> st.SearchStrategy[Window]:
    counts = st.lists(st.integers(0, 2**53), max_size=400).map(tuple)
    return st.builds(
        Window,
        s=st.integers(1, 2**40),
        t=st.integers(0, 2**53),
        model=st.just("pump"),
        version=st.integers(1, 99),
        digest=st.just(DIGEST),
        schema=st.just(DIGEST),
        w=st.integers(0, 2**31),
        opened=st.integers(0, 2**53),
        rows=st.integers(0, 2**31),
        counts=counts.map(packed),
        distances=counts.map(packed),
        values=counts,
        moments=moments().map(PackedMoments.of) | st.none(),
        quality=st.lists(st.builds(QualityCount, st.sampled_from([*REFUSED, *FOUND, "later"]), st.integers(-1, 9),
                                   st.integers(0, 2**53)), max_size=3).map(tuple),
    )  # fmt: skip


def sums(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(-(2**54), 2**54), min_size=size, max_size=size).map(tuple)


def moments() -> st.SearchStrategy[Moments]:
    rows = st.integers(0, 2**31)
    return st.builds(Moments, rows=rows, pairs=rows, sums=sums(4), squares=sums(4), lags=sums(4))


def together() -> st.SearchStrategy[Together]:
    number = st.integers(0, 2**31)
    return st.builds(
        Together, s=st.integers(1, 99), t=number, model=st.just("pump"), digest=st.just(DIGEST), schema=st.just(DIGEST),
        first=number, w=number, products=st.builds(Products, rows=number, sums=sums(10)),
    )  # fmt: skip


def faults() -> st.SearchStrategy[Fault]:
    number = st.integers(0, 1_000)
    return st.builds(
        Fault, s=st.integers(1, 99), t=number, model=st.just("pump"), digest=st.just(DIGEST), schema=st.just(DIGEST),
        w=number, kind=st.sampled_from(["stuck", "unit"]), feature=st.just("speed"), raised=st.booleans(),
        rate=st.floats(0, 1),
    )  # fmt: skip


def labels() -> st.SearchStrategy[Labels]:
    number = st.integers(0, 1_000)
    return st.builds(
        Labels, s=st.integers(1, 99), t=number, model=st.just("pump"), digest=st.just(DIGEST), schema=st.just(DIGEST),
        w=number, labelled=number, errors=number, residuals=st.lists(number, max_size=24).map(tuple),
        residual_sums=st.just(()) | sums(2),
    )  # fmt: skip


@given(records=st.lists(windows() | labels() | together() | faults(), min_size=1, max_size=5), lo=st.integers(0, 2**40))
def test_an_envelope_arrives_as_it_was_sent(records: list[AnyRecord], lo: int) -> None:
    sent = Envelope(e="0123456789abcdef", b=1, us=5, lo=lo, r=tuple(records))

    assert unpack(pack(sent), Envelope) == sent


def test_only_what_is_long_is_compressed_and_the_first_byte_tells() -> None:
    def told(length: int) -> Update:
        return Update(s=1, t=1, rollout="r", seq=1, digest=DIGEST, state="failed", detail="x" * length)

    short, long = pack(told(1)), pack(told(COMPRESS_ABOVE))

    assert short[0] & 0xF0 == 0x80  # a small MessagePack map
    assert long[0] == 0x78
    assert unpack(long, Update) == told(COMPRESS_ABOVE)


@settings(max_examples=500)
@given(noise=st.binary(max_size=300))
@pytest.mark.parametrize("kind", [Envelope, Command, State])
def test_noise_is_a_wire_error_or_a_message(noise: bytes, kind: type) -> None:
    for data in (noise, b"\x78\x9c" + noise, zlib.compress(noise)):
        with contextlib.suppress(WireError):
            assert isinstance(unpack(data, kind), kind)


@settings(max_examples=300)
@given(value=Json)
@pytest.mark.parametrize("kind", [Envelope, Command, State])
def test_other_well_formed_messages_are_refused(value: object, kind: type) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(unpack(encode(value), kind), kind)


@settings(max_examples=300)
@given(data=st.data())
def test_a_message_with_one_byte_changed_is_refused_or_still_typed(data: st.DataObject) -> None:
    sent = bytearray(pack(Envelope(e="0123456789abcdef", b=1, us=5, lo=1, r=(Heartbeat(s=1, t=2, agent="0.1"),))))
    at = data.draw(st.integers(0, len(sent) - 1))
    sent[at] ^= data.draw(st.integers(1, 255))

    with contextlib.suppress(WireError):
        assert isinstance(unpack(bytes(sent), Envelope), Envelope)


def test_a_record_of_an_unknown_kind_is_a_wire_error_even_where_the_type_is_a_union() -> None:
    any_record: Any = AnyRecord
    with pytest.raises(WireError) as refused:
        decode(encode({"k": "telepathy", "s": 1, "t": 1}), any_record)

    assert refused.value.code == "wire.malformed"


@pytest.mark.parametrize("depth", [100, 10_000, 100_000])
def test_deep_nesting_is_refused_and_not_followed_to_the_end_of_the_stack(depth: int) -> None:
    nested = b"\x91" * depth + b"\xc0"
    as_map = b"\x81\xa1r" * depth + b"\xc0"

    for data in (nested, as_map):
        with pytest.raises(WireError):
            unpack(data, Envelope)
        with contextlib.suppress(WireError):
            assert isinstance(decode(data, dict), dict)


def test_a_small_message_that_inflates_without_end_is_stopped_at_the_bound() -> None:
    bomb = zlib.compress(bytes(MAX_INFLATED + 1), 9)
    bigger = zlib.compress(bytes(64 * MAX_INFLATED), 9)

    for data in (bomb, bigger[: MAX_PACKED - 1]):
        assert len(data) < MAX_PACKED
        with pytest.raises(WireError) as refused:
            unpack(data, Envelope)
        assert refused.value.code == "wire.too-large"


def test_what_is_larger_than_a_packet_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError) as refused:
        unpack(bytes(MAX_PACKED + 1), Envelope)
    assert refused.value.code == "wire.too-large"

    with pytest.raises(WireError) as unsendable:
        pack([sha256_hex(str(i).encode()) for i in range(20_000)])
    assert unsendable.value.code == "wire.too-large"


@pytest.mark.parametrize("spoil", [lambda z: z[:-1], lambda z: z + b"x", lambda z: z + z, lambda z: z[:3]])
def test_a_compressed_message_is_one_whole_stream(spoil: Callable[[bytes], bytes]) -> None:
    whole = zlib.compress(encode(State(on=True, n=1, agent="x" * 3_000)))

    with pytest.raises(WireError) as refused:
        unpack(spoil(whole), State)

    assert refused.value.code == "wire.malformed"


@pytest.mark.parametrize(
    "wrong",
    [
        {"s": 0}, {"s": -1}, {"t": -1}, {"t": 2**53 + 1}, {"q": 3}, {"w": "1"}, {"counts": [1, -1]},
        {"digest": "A" * 64}, {"digest": "a" * 63}, {"model": "m" * 65}, {"rows": 1.5}, {"rows": None},
        {"counts": [0] * 120_001},
    ],
)  # fmt: skip
def test_a_number_or_a_name_out_of_bounds_spoils_the_message(wrong: dict[str, object]) -> None:
    good = Window(s=1, t=1, model="m", version=1, digest=DIGEST, schema=DIGEST, w=1, opened=1, rows=1, counts=(1,))
    plain = {**msgspec.to_builtins(good), **wrong}
    any_record: Any = AnyRecord

    assert decode(encode(good), any_record) == good
    with pytest.raises(WireError):
        decode(encode(plain), any_record)


@pytest.mark.parametrize("wrong", [{"e": "0123"}, {"e": "0123456789abcdeg"}, {"r": []}, {"v": 2}, {"us": -1}])
def test_an_envelope_out_of_bounds_is_refused(wrong: dict[str, object]) -> None:
    good = Envelope(e="0123456789abcdef", b=1, us=5, lo=1, r=(Heartbeat(s=1, t=2),))

    with pytest.raises(WireError):
        unpack(encode({**msgspec.to_builtins(good), **wrong}), Envelope)


def test_an_envelope_of_too_many_records_is_refused() -> None:
    beats = [msgspec.to_builtins(Heartbeat(s=i + 1, t=1)) for i in range(501)]
    plain = {"e": "0123456789abcdef", "b": 1, "us": 5, "lo": 1, "v": 1}

    assert len(unpack(pack({**plain, "r": beats[:500]}), Envelope).r) == 500
    with pytest.raises(WireError):
        unpack(pack({**plain, "r": beats}), Envelope)


def test_fields_of_a_later_version_are_passed_over() -> None:
    later = {"on": True, "n": 3, "agent": "9.9", "mood": "calm"}

    assert unpack(encode(later), State) == State(on=True, n=3, agent="9.9")


@given(value=Json)
def test_canonical_json_is_json_and_does_not_depend_on_the_order_of_keys(value: object) -> None:
    text = canonical_json(value)

    assert json.loads(text) == value
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(list(value.items())))) == text
    assert canonical_json(json.loads(text)) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {1: "a", "b": 2}, object()])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(WireError):
        canonical_json({"x": value})


def test_what_a_window_does_not_have_takes_no_room() -> None:
    window = Window(s=1, t=1, model="m", version=1, digest=DIGEST, schema=DIGEST, w=1, opened=1, rows=1, counts=(1,))

    assert list(msgspec.msgpack.decode(encode(window))) == [
        "k", "s", "t", "model", "version", "digest", "schema", "w", "opened", "rows", "counts",
    ]  # fmt: skip
