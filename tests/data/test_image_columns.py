import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_images import encode, picture, told

from fedbbpt_jax.data.image_columns import Columns, find_columns, read_parquet
from fedbbpt_jax.data.image_rows import Splits
from fedbbpt_jax.data.image_tasks import load_image_task
from fedbbpt_jax.data.images import decode_image
from fedbbpt_jax.errors import TaskError

BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASS = datasets.ClassLabel(names=["cat_a", "dog_b"])


def cells(split: str, labels) -> pa.Array:
    """Images whose colour tells label and row."""
    return pa.array([{"bytes": encode(picture(split, n, i)), "path": None} for i, n in enumerate(labels)], BYTES)


def write(path: Path, split: str, labels, values=None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pa.array(labels if values is None else values)
    pq.write_table(pa.table({"image": cells(split, labels), "label": values}), path, **options)


def contents(rows, chosen) -> list[tuple[int, int, int]]:
    return told(np.stack([np.asarray(decode_image(c, n)) for n, c in rows.read(np.asarray(chosen, int))]))


def test_integers_with_a_list_of_names(tmp_path):
    write(tmp_path / "train.parquet", "train", [1, 0, 1])
    (tmp_path / "classes.txt").write_text("a cat\na dog\n\n")
    images = read_parquet(tmp_path)
    assert images.class_names == ("a cat", "a dog")
    assert images.train.labels.tolist() == [1, 0, 1]
    assert not images.numbered


def test_integers_without_names_are_numbered(tmp_path):
    write(tmp_path / "train.parquet", "train", [0, 1, 0], values=[7, 30, 7])
    images = read_parquet(tmp_path)
    assert (images.class_names, images.numbered) == (("7", "30"), True)
    assert images.train.labels.tolist() == [0, 1, 0]


def test_strings_are_sorted(tmp_path):
    write(tmp_path / "train.parquet", "train", [0, 1], values=["hen", "cat"])
    write(tmp_path / "test.parquet", "test", [0], values=["dog"])
    images = read_parquet(tmp_path)
    assert images.class_names == ("cat", "dog", "hen")
    assert (images.train.labels.tolist(), images.test.labels.tolist()) == ([2, 0], [1])


def test_class_labels_carry_their_names(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": CLASS})
    table = pa.table({"image": cells("train", [1, 0]), "label": pa.array([1, 0])})
    metadata = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "train.parquet")
    assert read_parquet(tmp_path).class_names == ("cat_a", "dog_b")


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("train_full.parquet", "testing.parquet"),
    ],
)
def test_names_of_files(tmp_path, names):
    for name, split, size in zip(names, ("train", "test"), (3, 2), strict=True):
        write(tmp_path / name, split, [0] * size)
    write(tmp_path / "extra-00000.parquet", "", [0])
    images = read_parquet(tmp_path)
    assert (len(images.train.labels), len(images.test.labels)) == (3, 2)


def test_files_that_name_no_split_are_one(tmp_path):
    write(tmp_path / "a.parquet", "", [0, 0])
    write(tmp_path / "b.parquet", "", [1])
    images = read_parquet(tmp_path)
    assert images.train.labels.tolist() == [0, 0, 1]
    assert images.test is None


@given(st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_rows_are_read_across_files_and_row_groups(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("rows")
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    for shard, size in enumerate(sizes):
        write(
            folder / f"train-{shard:05}.parquet", "train", [shard] * size, row_group_size=data.draw(st.integers(1, 4))
        )
    everything = [(10, shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    rows = sorted(data.draw(st.sets(st.integers(0, len(everything) - 1), min_size=1)))
    assert contents(read_parquet(folder).train, rows) == [everything[row] for row in rows]


def test_splits_of_a_table(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.parquet", split, [0, 1])
    images = read_parquet(tmp_path, Splits("train+validation", None, "test"))
    assert contents(images.train, [1, 2]) == [(10, 1, 1), (20, 0, 0)]
    assert images.validation is None


def test_a_split_that_is_not_used_may_have_no_labels(tmp_path):
    """As the test split of ImageNet, where they are -1."""
    write(tmp_path / "train.parquet", "train", [0, 1])
    write(tmp_path / "validation.parquet", "validation", [0, 1])
    write(tmp_path / "test.parquet", "test", [0, 0], values=[-1, -1])
    (tmp_path / "classes.txt").write_text("a\nb")
    images = read_parquet(tmp_path, Splits("train", None, "validation"))
    assert contents(images.test, [0]) == [(20, 0, 0)]
    with pytest.raises(TaskError, match="has the label -1; expected 0 to 1, for 2 names"):
        read_parquet(tmp_path)


def test_the_middle_frame_of_each_clip(tmp_path):
    """Two clips of class 0 (5 and 2 frames) and one of class 1 that has the number of the first."""
    labels, clips = [0] * 7 + [1] * 3, ["x"] * 5 + ["y"] * 2 + ["x"] * 3
    table = pa.table({"image": cells("train", labels), "label": pa.array(labels), "clip": pa.array(clips)})
    pq.write_table(table, tmp_path / "train.parquet")
    images = read_parquet(tmp_path, None, Columns(clip=("clip",)))
    assert contents(images.train, [0, 1, 2]) == [(10, 0, 2), (10, 0, 6), (10, 1, 8)]
    assert len(read_parquet(tmp_path, None, Columns(clip=("video",))).train.labels) == 10


def features(**columns) -> datasets.Features:
    return datasets.Features(columns)


IMAGE, INT, TEXT = datasets.Image(), datasets.Value("int64"), datasets.Value("string")
STRUCT = {"bytes": datasets.Value("binary"), "path": TEXT}


@pytest.mark.parametrize(
    ("columns", "preferred", "expected"),
    [
        ({"image": IMAGE, "label": CLASS}, Columns(), ("image", "label")),
        ({"webp": IMAGE, "cls": INT, "__key__": TEXT, "__url__": TEXT}, Columns(), ("webp", "cls")),
        ({"picture": STRUCT, "species": TEXT}, Columns(), ("picture", "species")),
        ({"raw": datasets.Value("large_binary"), "n": datasets.Value("uint8")}, Columns(), ("raw", "n")),
        ({"image": IMAGE, "label": INT, "labels": CLASS}, Columns(), ("image", "labels")),
        ({"image": IMAGE, "kind": CLASS, "frame": INT}, Columns(), ("image", "kind")),
        ({"image": IMAGE, "label": CLASS, "label_cat": CLASS}, Columns(), ("image", "label")),
        ({"image": IMAGE, "label_a": INT, "label_count": INT}, Columns(label="label_count"), ("image", "label_count")),
        ({"image": IMAGE, "label": INT}, Columns(label="label_count"), ("image", "label")),
        ({"a": IMAGE, "b": IMAGE, "label": INT}, Columns(image="b"), ("b", "label")),
        ({"image": IMAGE, "label": INT, "class": INT}, Columns(client="label"), ("image", "class")),
    ],
)
def test_columns_that_are_found(columns, preferred, expected):
    assert find_columns(features(**columns), preferred, "it")[:2] == expected


def test_whose_an_image_is(tmp_path):
    """Numbers or names, of a table in two files; the column is none of the class, and is read only if asked for."""
    for file, wards in (("train-0.parquet", ["a", "b"]), ("train-1.parquet", ["b", "c"])):
        table = {"image": cells("train", [0, 1]), "label": ["cat", "dog"], "ward": wards}
        pq.write_table(pa.table(table), tmp_path / file)
    images = read_parquet(tmp_path, columns=Columns(client="ward"))
    assert images.train.clients.tolist() == ["a", "b", "b", "c"]
    assert images.train.take(np.array([1, 3])).clients.tolist() == ["b", "c"]
    assert read_parquet(tmp_path).train.clients is None
    with pytest.raises(TaskError, match=r"has the columns image .*; expected 'town', the client of an image"):
        read_parquet(tmp_path, columns=Columns(client="town"))


@pytest.mark.parametrize(
    ("columns", "listed", "expected"),
    [
        ({"text": TEXT, "label": INT}, "text (string), label (integer)", "one of images"),
        ({"a": IMAGE, "b": IMAGE, "label": INT}, "a (image), b (image), label (integer)", "one of images"),
        ({"image": IMAGE}, "image (image)", "one of class labels, integers or strings called label"),
        ({"image": IMAGE, "w": INT, "h": INT}, "image (image), w (integer), h (integer)", "one of class labels"),
        ({"image": IMAGE, "x": CLASS, "y": CLASS}, "x (class label), y (class label)", "one of class labels"),
        ({"image": IMAGE, "score": datasets.Value("float32")}, "score (float32)", "one of class labels"),
    ],
)
def test_columns_that_are_not_found(columns, listed, expected):
    with pytest.raises(TaskError) as caught:
        find_columns(features(**columns), Columns(), "it")
    message = str(caught.value)
    assert message.startswith("it has the columns ")
    assert f"{listed}; expected {expected}" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, None], "has 1 missing labels in 2 rows"),
        ([0.5, 1.0], r"label \(float64\); expected one of class labels"),
        ([0, 2], "has the label 2; expected 0 to 1, for 2 names"),
        ([-1, 0], "has the label -1; expected 0 to 1, for 2 names"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, values, message):
    write(tmp_path / "train.parquet", "train", [0, 0], values=values)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(TaskError, match=message):
        read_parquet(tmp_path)


def test_an_empty_table(tmp_path):
    write(tmp_path / "train.parquet", "train", [], values=pa.array([], pa.int64()))
    with pytest.raises(TaskError, match="0 missing labels in 0 rows; expected some and none"):
        read_parquet(tmp_path)


def test_a_shard_without_the_column(tmp_path):
    write(tmp_path / "train-0.parquet", "train", [0])
    pq.write_table(pa.table({"image": cells("train", [0])}), tmp_path / "train-1.parquet")
    with pytest.raises(TaskError, match=r"train-1\.parquet has no column 'label'; it has image"):
        read_parquet(tmp_path)


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no table")
    with pytest.raises(TaskError, match=f"cannot read the parquet files in {tmp_path}: "):
        read_parquet(tmp_path)


def test_a_cell_without_an_image_is_named(tmp_path):
    empty = pa.array([{"bytes": None, "path": "gone.png"}], BYTES)
    pq.write_table(pa.table({"image": empty, "label": pa.array([0])}), tmp_path / "train.parquet")
    with pytest.raises(TaskError, match=r"train\.parquet row 0 holds no image"):
        list(read_parquet(tmp_path).train.read(np.array([0])))


def test_a_damaged_cell_is_named(tmp_path):
    cells = [{"bytes": b"no image", "path": "dog 5.png"}] * 12
    table = pa.table({"image": pa.array(cells, BYTES), "label": pa.array(["cat", "dog"] * 6)})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(TaskError, match=r"cannot read the image .*train\.parquet row \d+ \(dog 5\.png\): "):
        load_image_task("", data=str(tmp_path), shots=1)
