"""CSV files: what is read, and what is said about what can't be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightship.data.csv_loader import load_csv
from lightship_agent.contract.codes import DataError


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "rows.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path, **options: object) -> DataError:
    with pytest.raises(DataError) as caught:
        load_csv(path, name="rows", target="kind", **options)  # type: ignore[arg-type]
    return caught.value


def test_text_targets_become_sorted_classes_and_titles_become_feature_names(tmp_path: Path) -> None:
    path = write(tmp_path, "Temp (°C),kind,Speed\n1.5,pump,2\n2.5,fan,3\n")
    loaded = load_csv(path, name="rows", target="kind")
    assert loaded.task == "classification"
    assert loaded.labels == ("fan", "pump")
    assert loaded.y.tolist() == [1, 0]
    assert loaded.schema.names == ("temp_c", "speed")
    assert loaded.titles == ("Temp (°C)", "Speed")
    assert [f.integer for f in loaded.schema.features] == [False, True]
    assert (loaded.schema.features[0].low, loaded.schema.features[0].high) == (1.5, 2.5)


def test_few_whole_numbers_are_classes_in_numeric_order_and_many_are_values(tmp_path: Path) -> None:
    few = load_csv(write(tmp_path, "a,kind\n1,10\n2,2\n3,1.0\n"), name="rows", target="kind")
    assert few.labels == ("1", "2", "10")
    rows = "".join(f"1,{i}\n" for i in range(30))
    many = load_csv(write(tmp_path, f"a,kind\n{rows}"), name="rows", target="kind")
    assert many.task == "regression"
    assert many.y.dtype == np.float32


def test_the_task_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a,kind\n1,1\n2,2\n")
    assert load_csv(path, name="rows", target="kind", task="regression").labels == ()


def test_a_byte_order_mark_quotes_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf"a",kind\r\n"1",x\r\n\r\n2,y\r\n')
    loaded = load_csv(path, name="rows", target="kind")
    assert loaded.titles == ("a",)
    assert loaded.rows == 2


@pytest.mark.parametrize("gap", ["", "NA", "nan", " N/A ", "NULL"])
def test_a_gap_is_refused_with_its_line_and_column(tmp_path: Path, gap: str) -> None:
    error = refused(write(tmp_path, f"a,b,kind\n1,2,x\n1,{gap},y\n"))
    assert error.code == "data.missing-value"
    assert "line 3, column 'b'" in str(error)


def test_gaps_are_kept_where_they_are_allowed(tmp_path: Path) -> None:
    loaded = load_csv(write(tmp_path, "a,b,kind\n1,2,x\n1,,y\n"), name="rows", target="kind", allow_missing=True)
    assert np.isnan(loaded.x[1, 1])
    assert [f.nullable for f in loaded.schema.features] == [False, True]


def test_a_target_without_value_is_refused_even_where_gaps_are_allowed(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "a,kind\n1,x\n2,\n"), allow_missing=True)
    assert error.code == "data.missing-value"
    assert "line 3" in str(error)


def test_a_column_without_any_value_is_refused(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "a,b,kind\n1,,x\n2,,y\n"), allow_missing=True)
    assert error.code == "data.missing-value"
    assert "'b'" in str(error)


def test_a_text_among_numbers_names_line_column_and_value(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "a,kind\n1,x\nwarm,y\n"))
    assert error.code == "data.type"
    assert "line 3, column 'a': expected a number, found 'warm'" in str(error)


def test_python_spellings_of_numbers_are_not_numbers(tmp_path: Path) -> None:
    assert refused(write(tmp_path, "a,kind\n1_000,x\n2,y\n")).code == "data.type"


@pytest.mark.parametrize("cell", ["1e39", "-1e400", "inf", "-Infinity"])
def test_numbers_that_float32_cannot_hold_are_refused(tmp_path: Path, cell: str) -> None:
    error = refused(write(tmp_path, f"a,kind\n{cell},x\n2,y\n"))
    assert error.code == "data.range"
    assert cell in str(error)


def test_the_first_five_failures_are_shown_in_line_order_and_the_rest_counted(tmp_path: Path) -> None:
    rows = "".join(f"{'x' if i % 2 else 1},{'y' if i % 2 == 0 else 1},k\n" for i in range(10))
    error = refused(write(tmp_path, f"a,b,kind\n{rows}"))
    text = str(error)
    assert "10 cells" in text
    assert "and 5 more" in text
    assert [text.index(f"line {n}, ") for n in range(2, 7)] == sorted(text.index(f"line {n}, ") for n in range(2, 7))
    assert "line 7" not in text


def test_a_missing_target_lists_the_columns_and_the_nearest(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "a,Kinds\n1,x\n"))
    assert error.code == "data.column-missing"
    assert "a, Kinds" in str(error)
    assert "Did you mean 'Kinds'" in str(error)


def test_columns_of_the_same_title_are_refused(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "a,a,kind\n1,2,x\n"))
    assert error.code == "data.column-unexpected"


def test_a_row_index_without_title_is_refused(tmp_path: Path) -> None:
    error = refused(write(tmp_path, ",a,kind\n0,2,x\n"))
    assert error.code == "data.column-unexpected"
    assert "index" in error.remedy


def test_ragged_rows_are_refused_with_their_lines(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "a,b,kind\n1,2,x\n1,x\n1,2,3,x\n"))
    assert error.code == "data.unreadable"
    assert "line 3 has 2" in str(error)
    assert "line 4 has 4" in str(error)


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "a,kind\n1,groß\n".encode("latin-1")))
    assert error.code == "data.unreadable"
    assert "0xdf" in str(error)


@pytest.mark.parametrize("text", ["", "\n", "a,kind\n", "kind\nx\n"])
def test_files_without_rows_or_features_are_refused(tmp_path: Path, text: str) -> None:
    assert refused(write(tmp_path, text)).code == "data.empty"


@pytest.mark.parametrize(("text", "word"), [("a;kind\n1;x\n", "semicolons"), ("a\tkind\n1\tx\n", "tabs")])
def test_other_separators_are_named(tmp_path: Path, text: str, word: str) -> None:
    assert word in str(refused(write(tmp_path, text)))


def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "absent.csv").code == "data.unreadable"
    assert refused(tmp_path).code == "data.unreadable"


def test_an_unclosed_quote_is_refused(tmp_path: Path) -> None:
    assert refused(write(tmp_path, 'a,kind\n"1,x\n2,y\n')).code == "data.unreadable"


def test_a_regression_column_with_a_slip_is_not_taken_for_classes(tmp_path: Path) -> None:
    rows = "".join(f"1,{i + 0.5}\n" for i in range(30))
    error = refused(write(tmp_path, f"a,kind\n{rows}1,12.5x\n"))
    assert error.code == "data.type"
    assert "12.5x" in str(error)


def test_a_column_of_identifiers_is_not_a_target(tmp_path: Path) -> None:
    rows = "".join(f"1,id-{i}\n" for i in range(30))
    error = refused(write(tmp_path, f"a,kind\n{rows}"))
    assert "identifier" in str(error)


def test_data_added_to_a_model_may_come_in_another_column_order(tmp_path: Path) -> None:
    first = load_csv(write(tmp_path, "a,b,kind\n1,2,x\n3,4,y\n"), name="rows", target="kind")
    path = write(tmp_path, "kind,b,a\ny,20,10\n")
    added = load_csv(path, name="more", target="kind", schema=first.schema, labels=first.labels)
    assert added.x.tolist() == [[10, 20]]
    assert added.y.tolist() == [1]
    assert added.schema.names == first.schema.names


def test_data_added_to_a_model_must_have_its_columns_and_classes(tmp_path: Path) -> None:
    first = load_csv(write(tmp_path, "a,b,kind\n1,2,x\n3,4,y\n"), name="rows", target="kind")
    assert refused(write(tmp_path, "a,kind\n1,x\n"), schema=first.schema).code == "data.column-missing"
    assert refused(write(tmp_path, "a,b,c,kind\n1,2,3,x\n"), schema=first.schema).code == "data.column-unexpected"
    error = refused(write(tmp_path, "a,b,kind\n1,2,z\n"), schema=first.schema, labels=first.labels)
    assert error.code == "data.type"
    assert "'z' is not a class" in str(error)
