"""The manifest: what an old agent does not understand it keeps, and what is nonsense it refuses."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import BundleError, DataError, InvalidNameError
from lightship_agent.contract.manifest import MAX_MANIFEST, manifest_bytes, parse_manifest
from lightship_agent.contract.schema import Feature, FeatureSchema

from .builders import manifest

WHOLE = json.loads(manifest_bytes(manifest()))
Later = st.dictionaries(
    st.from_regex(r"x_[a-z]{1,8}", fullmatch=True),
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"]))
    | st.lists(st.integers(0, 9), max_size=3),
    max_size=4,
)  # fmt: skip


def refusal(plain: object) -> BundleError:
    with pytest.raises(BundleError) as refused:
        parse_manifest(json.dumps(plain).encode())
    return refused.value


def test_a_manifest_reads_back_as_it_was() -> None:
    assert parse_manifest(manifest_bytes(manifest())) == manifest()


@given(later=Later)
def test_fields_of_a_later_version_are_kept_and_passed_on(later: dict[str, object]) -> None:
    written = json.dumps({**WHOLE, **later}).encode()

    read = parse_manifest(written)

    assert read.extra == later
    assert json.loads(manifest_bytes(read)) == {**WHOLE, **later}


def test_a_field_that_is_named_extra_is_kept_like_any_other() -> None:
    assert json.loads(manifest_bytes(parse_manifest(json.dumps({**WHOLE, "extra": {"a": 1}}).encode()))) == {
        **WHOLE,
        "extra": {"a": 1},
    }


@pytest.mark.parametrize("name", [k for k in WHOLE if k in {"model", "version", "schema", "outputs", "members"}])
def test_a_manifest_without_a_required_field_is_refused(name: str) -> None:
    assert refusal({k: v for k, v in WHOLE.items() if k != name}).code == "bundle.manifest"


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "../pump"}, {"model": 7}, {"version": 0}, {"version": -1}, {"version": "1"}, {"contract": 0},
        {"schema": {"features": []}}, {"schema": {"features": [{"name": "a"}, {"name": "a"}]}},
        {"schema": {"features": [{"name": "A B"}]}}, {"schema": {"features": [{"name": "a", "dtype": "float64"}]}},
        {"outputs": {"task": "clustering"}}, {"members": {"model.onnx": {"sha256": 1, "length": 2}}},
        {"members": []}, {"metrics": {"accuracy": "high"}}, {"requires": None},
    ],
)  # fmt: skip
def test_a_manifest_of_nonsense_is_refused(changes: dict[str, object]) -> None:
    assert refusal({**WHOLE, **changes}).code == "bundle.manifest"


@given(noise=st.binary(max_size=200))
def test_noise_is_no_manifest(noise: bytes) -> None:
    with pytest.raises(BundleError) as refused:
        parse_manifest(noise)
    assert refused.value.code == "bundle.manifest"


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a":' * 80_000, b"[]", b"null", b'"x"', b"\xff\xfe"])
def test_a_manifest_made_to_hurt_the_parser_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError) as refused:
        parse_manifest(data)
    assert refused.value.code == "bundle.manifest"


def test_a_manifest_beyond_its_bound_is_not_parsed() -> None:
    with pytest.raises(BundleError) as refused:
        parse_manifest(b" " * (MAX_MANIFEST + 1))
    assert refused.value.code == "bundle.too-large"


def test_no_manifest_is_made_with_a_name_that_is_none() -> None:
    with pytest.raises(InvalidNameError):
        manifest(model="Pump 1")


# The schema in it ----------------------------------------------------------------------------------------------------

SCHEMA = FeatureSchema(features=(Feature(name="a"), Feature(name="b", nullable=True)))


def test_the_schema_digest_depends_on_every_field_of_it() -> None:
    others = [
        msgspec.structs.replace(SCHEMA, input_name="x"),
        FeatureSchema(features=SCHEMA.features[::-1]),
        FeatureSchema(features=(SCHEMA.features[0], Feature(name="b"))),
        FeatureSchema(features=(SCHEMA.features[0], Feature(name="b", nullable=True, unit="K"))),
    ]

    assert len({SCHEMA.digest, *(s.digest for s in others)}) == 5


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([[1.0]], "data.type"),
        ([1.0, 2.0], "data.type"),
        ([[np.nan, 1.0]], "data.missing-value"),
        ([[1.0, np.inf]], "data.range"),
        ([[1.0, 1e300]], "data.range"),
    ],
)
def test_rows_that_do_not_fit_the_schema_are_refused(rows: list[object], code: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(DataError) as refused:
        SCHEMA.check_rows(np.array(rows))
    assert refused.value.code == code


def test_rows_that_fit_become_float32_in_order() -> None:
    found = SCHEMA.check_rows(np.asfortranarray([[1.0, np.nan], [2.0, 3.0]]))

    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert found.tolist()[1] == [2.0, 3.0]
