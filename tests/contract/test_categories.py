"""Words and the numbers that stand for them: read alike on both sides, and schemas without them as they always were."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.categories import MAX_CATEGORIES, MAX_WORD, category, infer_categories
from lightship_agent.contract.codes import DataError
from lightship_agent.contract.schema import Feature, FeatureSchema
from lightship_agent.contract.wire import canonical_json, decode, encode


def material(**more: object) -> Feature:
    plain = {"name": "material", "kind": "categorical", "categories": ["brass", "iron", "steel"], **more}
    return msgspec.convert(plain, Feature)


def refused(**more: object) -> DataError:
    with pytest.raises(DataError) as caught:
        material(**more)
    return caught.value


def test_a_schema_without_categories_keeps_the_digest_it_had_before_there_were_any() -> None:
    schema = FeatureSchema(features=(Feature(name="t", low=0.0, unit="K"), Feature(name="v", nullable=True)))

    assert schema.digest == "41842a49172ece095a39249bc4ae1997d336c138c2e39c5efb2c0eb1b0df659f"
    assert b"categories" not in encode(schema)
    assert b"unknown" not in encode(schema)


def test_words_become_their_places_and_a_gap_becomes_nan() -> None:
    codes = material().encode(["steel", None, "brass"])

    assert codes.dtype == np.float32
    assert codes.tolist()[::2] == [2.0, 0.0]
    assert np.isnan(codes[1])


def test_a_word_that_is_no_category_is_refused_by_name_and_row() -> None:
    with pytest.raises(
        DataError, match=r"Row 1: feature 'material': expected one of 'brass', 'iron', 'steel'"
    ) as caught:
        material().encode(["iron", "wood"])

    assert caught.value.code == "data.category"


def test_a_word_that_is_no_category_is_one_more_than_the_last_where_the_schema_says_so() -> None:
    feature = material(unknown="code")

    assert feature.unknown_code == 3
    assert feature.encode(["wood", "iron"]).tolist() == [3.0, 1.0]


@pytest.mark.parametrize("written", ["steel", "  steel\t", "\u00a0steel"])
def test_spaces_around_a_word_are_not_part_of_it(written: str) -> None:
    assert category(written) == "steel"


def test_a_letter_written_in_two_ways_is_one_category() -> None:
    assert category("acier trempe\u0301") == category("acier tremp\u00e9")


@pytest.mark.parametrize("gap", ["", "  ", "NA", "n/a", "NaN", "null", "None"])
def test_what_means_a_gap_in_a_table_is_one_here(gap: str) -> None:
    assert category(gap) is None


@given(st.text(max_size=40))
def test_reading_a_word_twice_reads_the_same(text: str) -> None:
    once = category(text)

    assert once is None or category(once) == once


@given(st.sets(st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=8), min_size=1))
def test_inferred_categories_encode_every_word_they_were_inferred_from(texts: set[str]) -> None:
    words = [word for word in map(category, texts) if word is not None]
    if not words:
        return
    found = infer_categories("any", words)
    feature = Feature(name="any", kind="categorical", categories=found)

    codes = feature.encode(words)

    assert [found[int(code)] for code in codes] == words
    FeatureSchema(features=(feature,)).check_rows(codes.reshape(-1, 1))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"categories": []}, "expected 1 to"),
        ({"categories": [f"c{i}" for i in range(MAX_CATEGORIES + 1)]}, "expected 1 to"),
        ({"categories": ["iron", "iron"]}, "'iron' occurs twice"),
        ({"categories": [" iron"]}, "is no category"),
        ({"categories": ["none"]}, "is no category"),
        ({"categories": ["a\nb"]}, "is no category"),
        ({"categories": ["a" * (MAX_WORD + 1)]}, "is no category"),
        ({"kind": "numeric"}, "is numeric"),
    ],
)
def test_what_can_be_no_category_is_refused(more: dict[str, object], said: str) -> None:
    error = refused(**more)

    assert error.code == "data.category"
    assert said in str(error)


def test_a_number_has_no_unknown_words() -> None:
    with pytest.raises(DataError, match="is numeric") as caught:
        Feature(name="t", unknown="code")

    assert caught.value.code == "data.category"


def test_too_many_words_in_a_column_are_text_and_no_categories() -> None:
    with pytest.raises(DataError, match="expected at most 100 categories, found 101") as caught:
        infer_categories("serial", [f"s{i}" for i in range(101)])

    assert caught.value.code == "data.category"


@pytest.mark.parametrize("number", [0.5, -1.0, 3.0, 1e9])
def test_a_number_that_stands_for_no_category_is_refused_in_a_row(number: float) -> None:
    schema = FeatureSchema(features=(Feature(name="t"), material()))

    with pytest.raises(DataError, match="Row 1: feature 'material' is a category") as caught:
        schema.check_rows(np.array([[1.5, 2.0], [1.5, number]]))

    assert caught.value.code == "data.category"


def test_the_number_of_an_unknown_word_is_taken_only_where_unknown_words_are() -> None:
    rows = np.array([[3.0]], dtype=np.float32)

    assert FeatureSchema(features=(material(unknown="code"),)).check_rows(rows).tolist() == [[3.0]]
    with pytest.raises(DataError):
        FeatureSchema(features=(material(),)).check_rows(rows)


def test_a_gap_is_taken_only_where_the_category_may_be_missing() -> None:
    rows = np.array([[np.nan]], dtype=np.float32)

    assert np.isnan(FeatureSchema(features=(material(nullable=True),)).check_rows(rows)).all()
    with pytest.raises(DataError) as caught:
        FeatureSchema(features=(material(),)).check_rows(rows)
    assert caught.value.code == "data.missing-value"


def test_a_schema_with_categories_travels_both_ways_and_its_digest_tells_them_apart() -> None:
    schema = FeatureSchema(features=(Feature(name="t"), material(unknown="code")))

    assert msgspec.json.decode(canonical_json(schema), type=FeatureSchema) == schema
    assert decode(encode(schema), FeatureSchema) == schema
    others = [material(), material(unknown="error"), material(categories=["iron", "brass", "steel"])]
    digests = {FeatureSchema(features=(Feature(name="t"), f)).digest for f in others} | {schema.digest}
    assert len(digests) == 4
