import numpy as np
import pytest
from synthetic_images import encode, picture, write_folder

from fedbbpt_jax.data.image_folders import read_image_folder
from fedbbpt_jax.data.image_rows import Splits
from fedbbpt_jax.errors import TaskError


def names(rows) -> list[str]:
    return [name.rsplit("/", 1)[1] for name, _ in rows.read(np.arange(len(rows.labels)))]


def test_class_folders(tmp_path):
    images = read_image_folder(write_folder(tmp_path, {"": {"b": 2, "a": 1}}))
    assert images.class_names == ("a", "b")
    assert images.train.labels.tolist() == [0, 1, 1]
    assert images.train.labels.dtype == np.int32
    assert (images.validation, images.test) == (None, None)


def test_rows_are_read_in_order_and_no_others(tmp_path):
    images = read_image_folder(write_folder(tmp_path, {"": {"a": 3, "b": 2}}))
    (tmp_path / "a" / "001.png").write_bytes(b"replaced")
    assert [content[:8] for _, content in images.train.read(np.array([1]))] == [b"replaced"]
    assert [name[-9:] for name, _ in images.train.read(np.array([0, 2, 3]))] == ["a/000.png", "a/002.png", "b/000.png"]


@pytest.mark.parametrize("name", ["val", "valid", "VALIDATION", "dev"])
def test_spellings_of_splits(tmp_path, name):
    folder = write_folder(tmp_path, {"train": {"a": 1}, "validation": {"a": 2}, "test": {"a": 3}})
    (folder / "validation").rename(folder / name)
    images = read_image_folder(folder)
    assert [len(part.labels) for part in (images.train, images.validation, images.test)] == [1, 2, 3]


def test_classes_are_those_of_all_splits(tmp_path):
    images = read_image_folder(write_folder(tmp_path, {"train": {"a": 1, "c": 1}, "test": {"b": 1, "c": 1}}))
    assert images.class_names == ("a", "b", "c")
    assert (images.train.labels.tolist(), images.test.labels.tolist()) == ([0, 2], [1, 2])


def test_a_class_called_train_is_a_class(tmp_path):
    images = read_image_folder(write_folder(tmp_path, {"": {"bus": 1, "test": 1, "train": 1}}))
    assert images.class_names == ("bus", "test", "train")


def test_numbers_are_sorted_as_numbers(tmp_path):
    images = read_image_folder(write_folder(tmp_path, {"": {"10": 1, "9": 1, "2": 1}}))
    assert images.class_names == ("2", "9", "10")


def test_other_files_do_not_count_and_images_may_lie_deeper(tmp_path):
    folder = write_folder(tmp_path, {"": {"a": 1, "b": 1}})
    (folder / "README.md").write_text("about")
    (folder / ".cache" / "c").mkdir(parents=True)
    (folder / "a" / "notes.txt").write_text("about")
    (folder / "a" / "._000.png").write_bytes(b"left by a file manager")
    (folder / "b" / "more").mkdir()
    (folder / "b" / "more" / "x.JPG").write_bytes(encode(picture("", 1, 1), "JPEG"))
    images = read_image_folder(folder)
    assert images.class_names == ("a", "b")
    assert names(images.train) == ["000.png", "000.png", "x.JPG"]


def test_splits_of_a_table_are_used_where_they_are(tmp_path):
    counts = {"train": {"a": 1}, "validation": {"a": 2}, "test": {"a": 3}}
    images = read_image_folder(write_folder(tmp_path, counts), Splits("train", None, "validation"))
    assert images.validation is None
    assert len(images.test.labels) == 2
    (tmp_path / "validation").rename(tmp_path / "extra")
    images = read_image_folder(tmp_path, Splits("train", None, "validation"))
    assert len(images.test.labels) == 3


def test_an_unreadable_image_is_named(tmp_path):
    images = read_image_folder(write_folder(tmp_path, {"": {"a": 2}}))
    (tmp_path / "a" / "001.png").unlink()
    with pytest.raises(TaskError, match=r"cannot read the image .*a/001\.png: No such file"):
        list(images.train.read(np.arange(2)))


@pytest.mark.parametrize("counts", [{}, {"": {"a": 0, "b": 0}}, {"train": {"a": 0}, "test": {"a": 0}}])
def test_no_images(tmp_path, counts):
    with pytest.raises(TaskError, match="has no images in class folders; expected CLASS/"):
        read_image_folder(write_folder(tmp_path, counts))


def test_images_without_classes(tmp_path):
    (tmp_path / "x.png").write_bytes(encode(picture("", 0, 0)))
    with pytest.raises(TaskError, match=r"no images in class folders \(images lie in it without one\)"):
        read_image_folder(tmp_path)
