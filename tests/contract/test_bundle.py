"""The bundle's reader accepts what the writer writes and refuses all else, always with the same kind of error."""

from __future__ import annotations

import io
import tarfile

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship_agent.contract import bundle as b
from lightship_agent.contract.bundle import Golden, Rows, build_bundle, encode_golden, read_bundle, read_members
from lightship_agent.contract.codes import BundleError
from lightship_agent.contract.profile import FeatureBins, ReferenceProfile
from lightship_agent.contract.ustar import header
from lightship_agent.contract.wire import encode, sha256_hex

from .builders import golden, manifest, members, profile

ARCHIVE = build_bundle(manifest(), members())


def refusal(data: bytes) -> BundleError:
    with pytest.raises(BundleError) as refused:
        read_bundle(data)
    return refused.value


def sealed(parts: dict[str, bytes]) -> bytes:
    """An archive that is well-formed outside, whatever its members hold."""
    return build_bundle(manifest(), parts)


@given(model=st.binary(max_size=5_000), card=st.text(max_size=600), background=st.booleans())
def test_what_is_built_is_read_back_whole(model: bytes, card: str, background: bool) -> None:
    parts = members(model, card=card.encode("utf-8", "replace"))
    if not background:
        del parts[b.BACKGROUND]

    read = read_bundle(build_bundle(manifest(), parts))

    assert (read.model, read.card.encode()) == (model, parts[b.CARD])
    assert (read.background is not None) == background
    assert read.profile == profile()
    assert read.golden == golden()
    assert set(read.manifest.members) == set(parts)


@given(order=st.permutations(list(members())))
def test_the_same_members_in_any_order_give_the_same_bytes(order: list[str]) -> None:
    parts = members()

    assert build_bundle(manifest(), {name: parts[name] for name in order}) == ARCHIVE


def test_a_bundle_is_known_by_the_digest_of_its_bytes_and_ends_on_a_block() -> None:
    assert read_bundle(ARCHIVE).digest == sha256_hex(ARCHIVE)
    assert len(ARCHIVE) % 512 == 0


def test_a_bundle_is_an_ordinary_tar_with_the_manifest_first() -> None:
    with tarfile.open(fileobj=io.BytesIO(ARCHIVE)) as tar:
        found = tar.getmembers()
        model = tar.extractfile(b.MODEL)
        assert model is not None
        assert model.read() == members()[b.MODEL]

    assert [m.name for m in found] == [name for name in b.MEMBERS if name != b.TENSORS]
    assert {(m.mode, m.uid, m.gid, m.mtime, m.type) for m in found} == {(0o644, 0, 0, 0, tarfile.REGTYPE)}


@settings(max_examples=400)
@given(at=st.integers(0, len(ARCHIVE) - 1), mask=st.integers(1, 255))
def test_one_changed_byte_is_refused_or_is_another_manifest_with_another_digest(at: int, mask: int) -> None:
    damaged = bytearray(ARCHIVE)
    damaged[at] ^= mask

    try:
        read = read_bundle(bytes(damaged))
    except BundleError:
        return

    # Only the manifest has nobody beside it who vouches for it: the signed digest does.
    assert 512 <= at < 512 + int(ARCHIVE[124:135], 8)
    assert read.digest != sha256_hex(ARCHIVE)


@settings(max_examples=200)
@given(length=st.integers(0, len(ARCHIVE) - 1))
def test_a_cut_anywhere_is_refused(length: int) -> None:
    refusal(ARCHIVE[:length])


@given(extra=st.binary(min_size=1, max_size=1_100))
def test_bytes_after_the_end_are_refused(extra: bytes) -> None:
    assert refusal(ARCHIVE + extra).code == "bundle.malformed"


@settings(max_examples=300)
@given(noise=st.binary(max_size=3_000))
def test_noise_is_refused_and_nothing_else_happens(noise: bytes) -> None:
    refusal(noise)


@settings(max_examples=300)
@given(noise=st.binary(min_size=1, max_size=200), at=st.integers(0, 511))
def test_a_header_overwritten_by_noise_is_refused(noise: bytes, at: int) -> None:
    damaged = bytearray(ARCHIVE)
    damaged[at : at + len(noise)] = noise
    if bytes(damaged) == ARCHIVE:
        return

    try:
        read = read_bundle(bytes(damaged[: len(ARCHIVE)]))
    except BundleError:
        return
    assert read.digest != sha256_hex(ARCHIVE)


@pytest.mark.parametrize(
    ("foreign", "says"),
    [(b"GIF89a" + bytes(2_000), "ustar archive"), (b"\x28\xb5\x2f\xfd" + bytes(2_000), "zstd -d")],
)
def test_what_is_no_bundle_at_all_is_told_what_one_is(foreign: bytes, says: str) -> None:
    found = refusal(foreign)

    assert found.code == "bundle.malformed"
    assert says in str(found)


# Foreign archives ---------------------------------------------------------------------------------------------------


def tar_of(
    entries: list[tarfile.TarInfo], form: int = tarfile.USTAR_FORMAT, pax: dict[str, str] | None = None
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, pax_headers=pax) as tar:
        for entry in entries:
            body = members().get(entry.name, b"x") if entry.isreg() else b""
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    return out.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


FOREIGN = {
    "gnu": tar_of([entry(b.MODEL)], tarfile.GNU_FORMAT),
    "pax": tar_of([entry(b.MODEL)], tarfile.PAX_FORMAT, {"comment": "hello"}),
    "gnu-long-name": tar_of([entry("m" * 150)], tarfile.GNU_FORMAT),
    "symlink": tar_of([entry(b.MODEL, tarfile.SYMTYPE, "/etc/passwd")]),
    "hard-link": tar_of([entry(b.MODEL, tarfile.LNKTYPE, "/etc/passwd")]),
    "folder": tar_of([entry(b.MODEL, tarfile.DIRTYPE)]),
    "device-node": tar_of([entry(b.MODEL, tarfile.CHRTYPE)]),
    "pipe": tar_of([entry(b.MODEL, tarfile.FIFOTYPE)]),
    "traversal": tar_of([entry(f"../../{b.MODEL}")]),
    "absolute": tar_of([entry(f"/{b.MODEL}")]),
    "dotted": tar_of([entry(f"./{b.MODEL}")]),
    "stranger": tar_of([entry("model.pkl")]),
    "prefixed": tar_of([entry("a" * 90 + "/" + b.MODEL)]),
    "empty": tar_of([]),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_archive_of_another_kind_is_refused(kind: str) -> None:
    assert refusal(FOREIGN[kind]).code == "bundle.malformed"


def test_a_tar_with_a_hundred_thousand_members_is_refused_at_the_second() -> None:
    header = ARCHIVE[: 512 + 512 * -(-int(ARCHIVE[124:135], 8) // 512)]

    assert refusal(header * 1_000 + bytes(1024)).code == "bundle.malformed"


@pytest.mark.parametrize("swap", [(b.PROFILE, b.MODEL), (b.GOLDEN, b.PROFILE)])
def test_members_out_of_order_are_refused(swap: tuple[str, str]) -> None:
    first, second = swap
    whole = members()
    blocks = {name: header(name, len(whole[name])) + whole[name] + bytes(-len(whole[name]) % 512) for name in whole}
    manifest_end = ARCHIVE.index(blocks[b.MODEL])

    assert refusal(ARCHIVE[:manifest_end] + blocks[first] + blocks[second] + bytes(1024)).code == "bundle.malformed"


def test_a_length_beyond_the_members_bound_is_refused_before_it_is_believed() -> None:
    huge = header(b.CARD, b.MEMBERS[b.CARD] + 1) + bytes(1024)
    not_octal = bytearray(ARCHIVE)
    not_octal[124:136] = b"\x80" + b"\xff" * 11

    assert refusal(huge).code == "bundle.too-large"
    assert refusal(bytes(not_octal)).code == "bundle.malformed"


# Members that do not say what they should ----------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [b.MODEL, b.PROFILE, b.GOLDEN])
def test_a_bundle_without_a_required_member_is_refused(absent: str) -> None:
    parts = {name: data for name, data in members().items() if name != absent}

    assert absent in refusal(sealed(parts)).message


def test_a_member_the_manifest_does_not_vouch_for_is_refused() -> None:
    with_card, without = members(), members()
    del without[b.CARD]
    spliced = sealed(without)[:-1024] + ARCHIVE[ARCHIVE.index(header(b.CARD, len(with_card[b.CARD]))) :]

    assert refusal(spliced).code == "bundle.manifest"


def test_a_member_of_another_bundle_of_the_same_length_is_refused() -> None:
    other = sealed(members(b"NOT REALLY A GRAPH"))
    at = other.index(b"NOT REALLY A GRAPH")
    mixed = ARCHIVE[:at] + other[at : at + 18] + ARCHIVE[at + 18 :]

    assert refusal(mixed).code == "bundle.digest"


def test_golden_rows_of_another_width_are_refused() -> None:
    narrow = Golden(inputs=Rows.of(np.zeros((4, 1), np.float32)), values=golden().values, labels=(1, 1, 1, 1))
    short = Golden(inputs=golden().inputs, values=golden().values, labels=(1,))
    none = Golden(inputs=Rows(rows=0, width=2, data=b""), values=Rows(rows=0, width=2, data=b""))

    for wrong in (narrow, short, none):
        assert refusal(sealed(members(golden=encode_golden(wrong)))).code == "bundle.manifest"


@given(rows=st.integers(-(2**62), 2**62), width=st.integers(-(2**62), 2**62), data=st.binary(max_size=64))
def test_rows_are_as_many_as_they_say_or_refused(rows: int, width: int, data: bytes) -> None:
    try:
        matrix = Rows(rows=rows, width=width, data=data).matrix()
    except BundleError:
        return
    assert matrix.shape == (rows, width)
    assert matrix.size * 4 == len(data)


def test_a_profile_of_other_features_is_refused() -> None:
    other = msgspec.structs.replace(profile(), features=profile().features[::-1])

    assert refusal(sealed(members(profile=encode(other)))).code == "bundle.manifest"


@pytest.mark.parametrize(
    "bins",
    [
        {"name": "temperature", "low": 1.0, "high": 0.0, "edges": [], "counts": [0, 0, 0, 0]},
        {"name": "temperature", "low": 0.0, "high": 9.0, "edges": [5.0, 4.0], "counts": [0] * 6},
        {"name": "temperature", "low": float("nan"), "high": 9.0, "edges": [], "counts": [0] * 4},
        {"name": "temperature", "low": 0.0, "high": 9.0, "edges": [], "counts": [0, 0, -1, 0]},
        {"name": "temperature", "low": 0.0, "high": 9.0, "edges": [], "counts": [0]},
    ],
)
def test_a_profile_whose_bins_contradict_themselves_is_a_broken_bundle(bins: dict[str, object]) -> None:
    second = msgspec.to_builtins(profile().features[1])
    broken = encode({**msgspec.to_builtins(profile()), "features": [bins, second]})

    assert refusal(sealed(members(profile=broken))).code == "bundle.malformed"


@pytest.mark.parametrize("name", ["profile", "golden", "background", "card"])
def test_a_member_of_noise_is_a_broken_bundle(name: str) -> None:
    assert refusal(sealed(members(**{name: b"\xff\xfe\x00noise"}))).code == "bundle.malformed"


def test_building_refuses_what_reading_would() -> None:
    with pytest.raises(BundleError, match="model.pkl"):
        build_bundle(manifest(), {**members(), "model.pkl": b""})
    with pytest.raises(BundleError) as too_large:
        build_bundle(manifest(), members(card=b"x" * (b.MEMBERS[b.CARD] + 1)))
    assert too_large.value.code == "bundle.too-large"


def test_bins_are_checked_when_they_are_made_too() -> None:
    made = FeatureBins(name="temperature", low=0.0, high=1.0, edges=(0.5,), counts=(0, 1, 2, 0, 0))

    assert ReferenceProfile(rows=3, features=(made, made)).offsets == (0, 5, 10)
    assert read_members(ARCHIVE)[b.CARD] == members()[b.CARD]
