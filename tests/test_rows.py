"""Pairs in the files that people have: nothing of a row is lost, and what cannot be read is said in one line."""

import csv
import gzip
import json
import resource

import pytest

pytest.importorskip("datasets")

import datasets

from normbt_kernels.data.preferences import load_preferences
from normbt_kernels.data.rows import READERS
from normbt_kernels.errors import UserError


def load(path, text=None, **options):
    if text is not None:
        path.write_text(text, newline="")
    return load_preferences(str(path), None, "train", **options)


# --- rows ----------------------------------------------------------------------------------------------------------

GOOD = {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, {"chosen": "a"}], "row 2: no column 'rejected' (columns: chosen)"),
        ([GOOD, "{"], "row 2: not JSON"),
        ([GOOD, [1]], "row 2: not an object"),
        ([GOOD, GOOD, {"chosen": "a", "rejected": ""}], "row 3: 'rejected' is neither text nor"),
        ([{"chosen": "a", "rejected": [{"role": "user", "content": "b"}]}], "row 1: 'chosen' and 'rejected' must both"),
        ([{"chosen": [{"content": "a"}], "rejected": "b"}], "row 1: 'chosen' has a message that is not"),
        ([GOOD | {"margin": "wide"}], "row 1: 'margin' is not a finite number: 'wide'"),
        ([GOOD | {"margin": 10**400}], "row 1: 'margin' is not a finite number: 1000"),
        ([GOOD | {"margin": 1}, GOOD], "row 2: no margin, but other rows have one"),
        ([], ": no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, lines, message):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    with pytest.raises(UserError) as error:
        load_preferences(str(path), None, "train")
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_row_numbers_are_line_numbers_despite_blank_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n\n{}\n")
    with pytest.raises(UserError, match="row 4"):
        load_preferences(str(path), None, "train")


# --- CSV -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["p,4, I think,5", "p,4"], ids=["a comma without quotes", "a column too few"])
def test_a_row_of_csv_that_does_not_fit_its_header_is_refused(tmp_path, row):
    number = 1 + row.count(",")
    with pytest.raises(UserError, match=rf"data.csv, row 2: {number} fields, but the header names 3 columns"):
        load(tmp_path / "data.csv", f'chosen,rejected,prompt\n"1, 2",2,"p, q"\n{row}\n')


def test_a_column_of_csv_that_another_would_replace_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.csv: two columns are called 'chosen'"):
        load(tmp_path / "data.csv", "chosen,chosen,rejected\na,b,c\n")
    assert load(tmp_path / "data.csv", "chosen,rejected,,\na,b,,\n")[0].chosen == "a"


def test_csv_keeps_commas_lines_quotes_and_long_texts(tmp_path):
    texts = ['a, "b"', "two\r\nlines", "word " * 30_000]
    quoted = ",".join('"' + text.replace('"', '""') + '"' for text in texts)
    (pair,) = load(tmp_path / "data.csv", f"\ufeffprompt,chosen,rejected\r\n\r\n{quoted}\r\n")
    assert (pair.chosen, pair.rejected) == (texts[0] + texts[1], texts[0] + texts[2])
    assert csv.field_size_limit() == 131072  # that of the user's own reading


@pytest.mark.parametrize(("ours", "theirs"), [("margin", "margin"), ("margin", "rating"), ("pair_weight", "votes")])
def test_numbers_of_csv_are_numbers_under_whatever_name(tmp_path, ours, theirs):
    columns = {ours: theirs}
    (pair,) = load(tmp_path / "data.csv", f"chosen,rejected,{theirs}\na,b,1.5\n", columns=columns)
    assert getattr(pair, ours) == 1.5
    with pytest.raises(UserError, match=f"row 1: '{ours}' is not a finite number: 'wide'"):
        load(tmp_path / "data.csv", f"chosen,rejected,{theirs}\na,b,wide\n", columns=columns)


def test_a_column_that_nothing_reads_is_not_renamed(tmp_path):
    with pytest.raises(UserError, match=r"--column margins=\.\.\.: expected one of chosen, .*margin"):
        load(tmp_path / "data.csv", "chosen,rejected,rating\na,b,1.5\n", columns={"margins": "rating"})


# --- what cannot be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_cannot_be_opened_is_named(tmp_path, kind):
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / f"data{kind}"
    path.write_bytes(b"")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # root may open whatever there is, but not more than this
    try:
        with pytest.raises(UserError) as error:
            load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert str(error.value).startswith(f"{path}: cannot be read ([Errno 24]")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: data[:30] + b"\xff" * 20 + data[50:]], ids=["cut off", "changed"]
)
def test_a_damaged_archive_is_named(tmp_path, damage):
    path = tmp_path / "data.jsonl.gz"
    rows = "".join(json.dumps(GOOD | {"margin": i**9}) + "\n" for i in range(99))
    path.write_bytes(damage(gzip.compress(rows.encode())))
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: cannot be read (")


def test_a_damaged_copy_of_a_hub_data_set_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "train.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": "a", "rej')
    with pytest.raises(UserError, match="copy: JSON parse error"):
        load(tmp_path / "copy")
