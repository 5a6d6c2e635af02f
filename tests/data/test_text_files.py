import pandas as pd
import pytest
from synthetic_texts import write_table

from fedbbpt_jax.data.text_files import find_split_files, read_questions, read_table
from fedbbpt_jax.errors import TaskError

COLUMNS = {"text": ["plain", 'say "x", then', "naïve – ü", "tab\\t"], "label": ["a", "b", "a", "b"]}
KINDS = [".csv", ".tsv", ".jsonl", ".parquet"]


@pytest.mark.parametrize("suffix", KINDS)
def test_what_is_written_is_read(suffix, tmp_path):
    table = read_table(write_table(tmp_path / f"x{suffix}", COLUMNS))
    assert table.columns.to_pydict() == COLUMNS
    assert list(table.features) == ["text", "label"]


def test_csv_cells_may_hold_line_breaks_and_tsv_quotes_are_characters(tmp_path):
    path = write_table(tmp_path / "x.csv", {"text": ["two\nlines", "x"], "label": ["a", "b"]})
    assert read_table(path).columns["text"].to_pylist() == ["two\nlines", "x"]
    (tmp_path / "x.tsv").write_text('text\tlabel\n"unclosed\ta\nit "s"\tb\n')
    assert read_table(tmp_path / "x.tsv").columns["text"].to_pylist() == ['"unclosed', 'it "s"']


def test_without_a_first_line_of_names(tmp_path):
    (tmp_path / "x.tsv").write_text("s1\t1\t*\tA text.\n\ns2\t0\t\tAnother.\n")
    table = read_table(tmp_path / "x.tsv", ("source", "label", "mark", "text"))
    assert table.columns["text"].to_pylist() == ["A text.", "Another."]
    assert table.columns["mark"].to_pylist() == ["*", ""]


def test_a_mark_of_utf8_at_the_beginning_is_no_character(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbftext,label\na,b\n")
    assert read_table(tmp_path / "x.csv").columns.column_names == ["text", "label"]


def test_categories_of_pandas_are_values(tmp_path):
    frame = pd.DataFrame({"text": ["x", "y"], "label": pd.Categorical(["b", "a"])})
    frame.to_parquet(tmp_path / "x.parquet")
    table = read_table(tmp_path / "x.parquet")
    assert table.columns["label"].to_pylist() == ["b", "a"]
    assert table.features["label"].dtype == "string"


def test_objects_may_lack_a_key(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\n{"text": "b", "label": 1}\n')
    assert read_table(tmp_path / "x.jsonl").columns["label"].to_pylist() == [None, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"text,label\na,b\nc\n", r"x\.csv line 3 has 1 cells; expected 2 \(text, label\)"),
        ("x.tsv", b"text\tlabel\na\tb\tc\n", "line 2 has 3 cells; expected 2"),
        ("x.csv", b"text,text\n", "has two columns called 'text'"),
        ("x.csv", b'text,label\n"a,b\n', "cannot read .*: unexpected end of data"),
        ("x.csv", b"text,label\n\xff,b\n", r"it is not UTF-8 \(byte 11\); convert it first"),
        ("x.jsonl", b'{"text": 1}\n{"text"\n', "line 2 is no JSON"),
        ("x.jsonl", b"[1]\n", "line 1 is list; expected an object"),
        ("x.jsonl", b'{"text": 1}\n{"text": "a"}\n', "cannot read"),
        ("x.parquet", b"no parquet", "cannot read"),
        ("x.txt", b"text", r"cannot read .*x\.txt: expected a file of \.csv, \.tsv, \.jsonl, \.parquet"),
    ],
)
def test_files_that_are_not_what_they_say(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=message) as error:
        read_table(tmp_path / name)
    assert "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(TaskError, match=r"cannot read .*gone\.csv: No such file"):
        read_table(tmp_path / "gone.csv")
    with pytest.raises(TaskError, match=r"cannot read .*gone\.txt: No such file"):
        read_questions(tmp_path / "gone.txt")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.csv", "dev.csv", "test.csv"], {"train": 1, "validation": 1, "test": 1}),
        (["Train.csv", "valid.csv", "notes.csv"], {"train": 1, "validation": 1}),
        (["a.csv", "b.csv"], {"train": 2}),
        (["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"], None),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {"train": 2}),
        (["validation_matched-00000-of-00001.parquet", "train.parquet"], {"validation_matched": 1, "train": 1}),
        (["train/1.csv", "train/2.csv", "val/1.csv"], {"train": 2, "validation": 1}),
        (["train1.csv", "train_more.csv", "trainer.csv"], {"train": 2}),
        (["train.csv", "test/.more.csv", "readme.txt"], {"train": 1}),
        (["test/train/1.csv"], {"train": 1}),
        (["testing.jsonl", "training.jsonl"], {"train": 1, "test": 1}),
        (["train10k.tsv"], {"train": 1}),
    ],
)
def test_files_of_splits(names, expected, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {split: len(files) for split, files in find_split_files(tmp_path).items()}
    assert found == (expected or {"train": 1, "validation_matched": 1, "validation_mismatched": 1})


def test_no_files(tmp_path):
    (tmp_path / "readme.txt").touch()
    with pytest.raises(TaskError, match=r"has no files of texts; expected train\.csv, "):
        find_split_files(tmp_path)


def test_a_split_in_two_kinds_of_files(tmp_path):
    for name in ("train.csv", "train.jsonl", "test.csv"):
        (tmp_path / name).touch()
    with pytest.raises(TaskError, match=r"has train in \.csv and \.jsonl files; expected one kind"):
        find_split_files(tmp_path)


def test_questions(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"NUM:dist How far is it ?\nLOC:city Where is Z\xfcrich : there ?\n")
    assert read_questions(tmp_path / "x.txt").columns.to_pydict() == {
        "label": ["NUM", "LOC"],
        "text": ["How far is it ?", "Where is Zürich : there ?"],
    }
    (tmp_path / "x.txt").write_text("NUM:dist How far ?\nnothing\n")
    with pytest.raises(TaskError, match=r"x\.txt line 2 is not of the form COARSE:fine question"):
        read_questions(tmp_path / "x.txt")
