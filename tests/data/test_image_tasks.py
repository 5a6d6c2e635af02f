import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.config import HF_CACHE_HOME
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic_images import encode, picture, told, write_folder

from fedbbpt_jax.data import image_tasks
from fedbbpt_jax.data.image_tasks import load_image_task
from fedbbpt_jax.data.images import center_crop, grid_means
from fedbbpt_jax.errors import TaskError

PARTS = ("train", "validation", "test")
CLASSES = {"cat": 12, "dog": 9, "hen": 10}


def small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((8, 8)))


def load(folder: Path, name: str = "", **options):
    return load_image_task(name, **{"data": str(folder), "transform": center_crop(16), "shots": 3, **options})


def drawn(task) -> dict[str, list[tuple[int, int, int]]]:
    return {part: told(getattr(task, part).inputs) for part in PARTS}


@pytest.fixture(scope="module")
def real_images() -> Path:
    if "FEDBBPT_DATA" not in os.environ:
        pytest.skip("FEDBBPT_DATA does not name the folder of real data")
    return Path(os.environ["FEDBBPT_DATA"]) / "image"


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    return write_folder(folder, {"train": CLASSES, "validation": CLASSES, "test": CLASSES})


@pytest.fixture(scope="module")
def one_split(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("one"), {"": {"cat": 20, "dog": 10, "hen": 30}})


@pytest.mark.slow
def test_clothing_folder(real_images):
    """Every training image, shrunk, is one of its class in the training folder, and of no other part's folder."""
    folder = real_images / "clothing10"
    task = load_image_task("", data=str(folder), transform=small, shots=4)
    assert task.class_names == tuple(sorted(os.listdir(folder / "train")))
    assert task.test.inputs.shape == (372, 8, 8, 3)
    assert Counter(task.train.labels.tolist()) == dict.fromkeys(range(10), 4)
    assert Counter(task.validation.labels.tolist()) == dict.fromkeys(range(10), 4)
    for part in PARTS:
        examples = getattr(task, part)
        for label, name in enumerate(task.class_names):
            source = {small(Image.open(p).convert("RGB")).tobytes() for p in (folder / part / name).iterdir()}
            assert {image.tobytes() for image in examples.inputs[examples.labels == label]} <= source


def test_cifar_parquet(real_images):
    """The test part is the whole file in its order; training images are of their class in the training file."""
    task = load_image_task("", data=str(real_images / "cifar10"), transform=np.asarray, shots=16, seed=2)
    assert (task.name, task.image_size) == ("cifar10", 32)
    assert task.class_names == tuple((real_images / "cifar10" / "classes.txt").read_text().split())
    assert Counter(task.train.labels.tolist()) == dict.fromkeys(range(10), 16)
    assert Counter(task.validation.labels.tolist()) == dict.fromkeys(range(10), 4)
    test = pq.read_table(real_images / "cifar10" / "test.parquet")
    assert task.test.labels.tolist() == test["label"].to_pylist()
    for row in range(0, 2000, 97):
        image = np.asarray(Image.open(as_file(test["image"][row])))
        assert (task.test.inputs[row] == image).all()
    train = pq.read_table(real_images / "cifar10" / "train.parquet")
    labels = np.asarray(train["label"])
    for label in (0, 9):
        rows = np.flatnonzero(labels == label)
        known = {np.asarray(Image.open(as_file(train["image"][int(row)]))).tobytes() for row in rows}
        assert {image.tobytes() for image in task.train.inputs[task.train.labels == label]} <= known


def as_file(cell):
    return io.BytesIO(cell["bytes"].as_py())


def test_types_shapes_and_features(three_splits):
    task = load(three_splits, test_limit=7)
    for part, size in zip(PARTS, (9, 9, 7), strict=True):
        inputs, features, labels = getattr(task, part)
        assert inputs.shape == (size, 16, 16, 3)
        assert (inputs.dtype, features.dtype, labels.dtype) == (np.uint8, np.float32, np.int32)
        np.testing.assert_array_equal(features, grid_means(inputs))
    assert task.image_size == 16
    assert task.feature_size == 48


def test_default_transform_is_clips(three_splits):
    task = load(three_splits, transform=None, shots=1, test_limit=3)
    assert task.test.inputs.shape == (3, 224, 224, 3)


def test_labels_are_those_of_the_folders(three_splits):
    task = load(three_splits)
    for part in PARTS:
        assert [label for _, label, _ in told(getattr(task, part).inputs)] == getattr(task, part).labels.tolist()


def test_each_part_comes_from_its_own_split(three_splits):
    parts = drawn(load(three_splits, shots=9))
    assert {split for split, *_ in parts["train"]} == {10}
    assert {split for split, *_ in parts["validation"]} == {20}
    assert sorted(parts["test"]) == [(30, label, i) for label, n in enumerate(CLASSES.values()) for i in range(n)]
    assert Counter(label for _, label, _ in parts["train"]) == dict.fromkeys(range(3), 9)
    assert Counter(label for _, label, _ in parts["validation"]) == dict.fromkeys(range(3), 4)


@pytest.mark.parametrize("shots", [1, 3, 4, 8])
def test_without_a_validation_split_the_rest_of_train_gives_it(tmp_path, shots):
    parts = drawn(load(write_folder(tmp_path, {"train": CLASSES, "test": CLASSES}), shots=shots))
    assert {split for split, *_ in parts["train"] + parts["validation"]} == {10}
    assert not set(parts["train"]) & set(parts["validation"])
    left = {label: min(shots, 4, n - shots) for label, n in enumerate(CLASSES.values())}
    assert Counter(label for _, label, _ in parts["validation"]) == left


def test_without_a_test_split_validation_is_the_test(tmp_path):
    parts = drawn(load(write_folder(tmp_path, {"train": CLASSES, "validation": CLASSES})))
    assert {split for split, *_ in parts["train"] + parts["validation"]} == {10}
    assert len(parts["test"]) == sum(CLASSES.values())
    assert {split for split, *_ in parts["test"]} == {20}


def test_a_table_row_can_pool_splits(tmp_path):
    """Oxford flowers have 10 training and 10 validation images per class, and 16 shots are drawn from both."""
    folder = write_folder(tmp_path, {split: {"rose": 10, "daisy": 10} for split in ("train", "validation", "test")})
    parts = drawn(load(folder, "oxford_flowers", shots=16))
    chosen = parts["train"] + parts["validation"]
    assert {split for split, *_ in chosen} == {10, 20}
    assert len(set(chosen)) == 40
    assert {split for split, *_ in parts["test"]} == {30}


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_one_split_is_divided_by_class(one_split, seed, shots):
    """30 % of each class are the test, whatever the seed; no image is in two parts."""
    parts = drawn(load(one_split, seed=seed, shots=shots))
    assert Counter(label for _, label, _ in parts["test"]) == {0: 6, 1: 3, 2: 9}
    assert parts["test"] == drawn(load(one_split, shots=1))["test"]
    everything = [image for part in parts.values() for image in part]
    assert len(set(everything)) == len(everything)


def test_seeds(three_splits):
    first, again, other = (drawn(load(three_splits, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first["test"] == other["test"]
    assert first["train"] != other["train"]
    assert first["validation"] != other["validation"]


def test_test_limit_is_stratified_and_the_same_for_all_seeds(three_splits):
    first, other = (drawn(load(three_splits, seed=seed, test_limit=15))["test"] for seed in (0, 1))
    assert first == other
    counts = Counter(label for _, label, _ in first)
    assert max(abs(counts[label] - 15 * n / 31) for label, n in enumerate(CLASSES.values())) < 1
    assert len(first) == 15
    assert len(drawn(load(three_splits, test_limit=1000))["test"]) == 31


def test_images_that_are_not_used_are_not_decoded(tmp_path):
    folder = write_folder(tmp_path, {"train": CLASSES, "test": CLASSES})
    before = drawn(load(folder, test_limit=6))
    used = {image for part in before.values() for image in part}
    for split, blue in (("train", 10), ("test", 30)):
        for label, (name, count) in enumerate(CLASSES.items()):
            for index in range(count):
                if (blue, label, index) not in used:
                    (folder / split / name / f"{index:03}.png").write_bytes(b"no image")
    assert drawn(load(folder, test_limit=6)) == before


def test_nothing_is_written(three_splits, real_images):
    def listing() -> list[tuple[str, int]]:
        roots = (three_splits, real_images / "cifar10", Path(HF_CACHE_HOME))
        return sorted((str(p), p.stat().st_mtime_ns) for root in roots for p in (root, *root.rglob("*")) if p.exists())

    before = listing()
    load(three_splits)
    load(real_images / "cifar10", test_limit=10)
    assert listing() == before


def test_classes_that_the_table_leaves_out(tmp_path):
    classes = {"BACKGROUND_Google": 6, "Faces": 6, "Faces_easy": 6, "airplanes": 6}
    task = load(write_folder(tmp_path, {"train": classes, "test": classes}), "caltech101")
    assert task.class_names == ("face", "airplane")
    for part in PARTS:
        folder_labels = np.array([label for _, label, _ in told(getattr(task, part).inputs)])
        assert (folder_labels == np.array([1, 3])[getattr(task, part).labels]).all()


def test_numbered_folders_take_the_names_of_the_table_in_their_order(tmp_path):
    classes = {str(count): 5 for count in range(3, 11)}  # "10" comes last, not first
    task = load(write_folder(tmp_path, {"train": classes, "test": classes}), "clevr")
    assert task.class_names == ("3", "4", "5", "6", "7", "8", "9", "10")
    assert [label for _, label, _ in told(task.test.inputs)] == task.test.labels.tolist()


def test_a_copy_with_another_number_of_numbered_classes(tmp_path):
    folder = write_folder(tmp_path, {"train": {"0": 5, "1": 5}})
    with pytest.raises(TaskError, match="has 2 classes; expected 10"):
        load(folder, "svhn")


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ({"train": {"cat": 9, "dog": 2}, "test": CLASSES}, {}, "'hen' needs 4 training images .* and has 0"),
        ({"train": {"cat": 9, "dog": 2}, "test": {"cat": 1, "dog": 1}}, {}, "'dog' needs 4 training images .*has 2"),
        ({"train": {"cat": 9, "dog": 0}, "test": {"cat": 1, "dog": 1}}, {}, "'dog' needs 4 training images .*has 0"),
        ({"train": CLASSES, "test": {"cat": 1, "dog": 1}}, {}, "'hen' needs 1 test image and has 0"),
        ({"train": CLASSES, "test": {"cat": 1, "dog": 1, "hen": 0}}, {}, "'hen' needs 1 test image and has 0"),
        ({"train": CLASSES, "validation": {"cat": 2}, "test": CLASSES}, {}, "'dog' needs 1 validation image and has 0"),
        ({"train": CLASSES, "test": CLASSES}, {"shots": 9}, r"'dog' needs 10 training images \(9 shots and 1 to val"),
        ({"train": CLASSES, "validation": CLASSES}, {"shots": 12}, "'dog' needs 13 training images"),
        ({"": {"cat": 9, "dog": 1}}, {"shots": 1}, "'dog' needs 2 training images .* and has 1"),
        ({"": {"cat": 9, "dog": 3}}, {}, "'dog' needs 4 training images .* and has 2"),
        ({"train": {"cat": 9}, "test": {"cat": 9}}, {}, r"has 1 classes \(cat\); expected at least 2"),
        ({"train": {"a_b": 9, "a b": 9}}, {}, "has two classes called 'a b'"),
        ({"validation": CLASSES, "test": CLASSES}, {}, "has the splits test, validation; expected one called train"),
    ],
)
def test_classes_that_lack_images(tmp_path, counts, options, message):
    with pytest.raises(TaskError, match=message):
        load(write_folder(tmp_path, counts), **options)


def test_a_damaged_image_is_named(tmp_path):
    folder = write_folder(tmp_path, {"train": CLASSES, "test": CLASSES})
    damaged = folder / "test" / "dog" / "004.png"
    damaged.write_bytes(encode(picture("test", 1, 4))[:40])
    with pytest.raises(TaskError, match=f"cannot read the image {damaged}: "):
        load(folder)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "a/b/c", "what is this", __file__])
def test_what_is_neither_a_folder_nor_a_hub_id(source, monkeypatch):
    monkeypatch.setattr(image_tasks, "read_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(TaskError, match=r"cannot load .*expected a folder, or the id of a hub data set"):
        load_image_task("", data=source)


def test_a_revision_is_of_the_hub(three_splits):
    with pytest.raises(TaskError, match="is a folder, and a revision is of the hub's data sets; got revision 'v2'"):
        load(three_splits, revision="v2")


@pytest.mark.parametrize("options", [{"shots": 0}, {"shots": -1}, {"test_limit": 0}])
def test_nothing_asked_for(three_splits, options):
    with pytest.raises(TaskError, match="shots and test_limit must be at least 1"):
        load(three_splits, **options)


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{name}", "{} {x}", "{}}"])
def test_bad_templates(three_splits, template):
    with pytest.raises(TaskError, match=r"a template needs one \{\} where the class name goes"):
        load(three_splits, templates=["fine {}", template])


@pytest.mark.parametrize(
    "transform",
    [np.asarray, lambda image: np.zeros((4, 4, 3), np.float32), lambda image: np.zeros((4, 4), np.uint8)],
    ids=["not square", "floats", "grey"],
)
def test_bad_transform(three_splits, transform):
    with pytest.raises(ValueError, match=r"the transform gave .* expected uint8 \[S, S, 3\]"):
        load(three_splits, transform=transform)


def test_a_transform_of_several_sizes(three_splits):
    sizes = iter(range(4, 99))
    with pytest.raises(ValueError, match=r"gave uint8 \[5, 5, 3\]"):
        load(three_splits, transform=lambda image: np.zeros((next(sizes),) * 2 + (3,), np.uint8))


def test_whose_an_image_is_goes_with_the_shots(tmp_path):
    rows = [(label, index) for label in range(2) for index in range(8)]
    images = [{"bytes": encode(picture("train", *row)), "path": None} for row in rows]
    table = {"image": images, "label": [("cat", "dog")[n] for n, _ in rows]}
    pq.write_table(pa.table({**table, "ward": [f"ward {index % 3}" for _, index in rows]}), tmp_path / "all.parquet")
    task = load(tmp_path, client_column="ward")
    indices = [index for _, _, index in told(task.train.inputs)]
    assert task.train_clients.tolist() == [f"ward {index % 3}" for index in indices]
    assert load(tmp_path).train_clients is None


def test_folders_of_images_have_no_columns(three_splits):
    with pytest.raises(TaskError, match="only a table has a column 'ward'"):
        load(three_splits, client_column="ward")


def test_unknown_name_without_data():
    with pytest.raises(TaskError, match="unknown image task 'sensor'; expected one of caltech101"):
        load_image_task("sensor")
