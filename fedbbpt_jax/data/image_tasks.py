"""Few-shot tasks of labelled images: the table's, or those of any folder or hub data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedbbpt_jax.data.few_shot import class_ranks, stratified_part, stratified_sample
from fedbbpt_jax.data.image_columns import read_parquet
from fedbbpt_jax.data.image_datasets import IMAGE_TASKS, ImageTask
from fedbbpt_jax.data.image_folders import read_image_folder
from fedbbpt_jax.data.image_hub import read_hub
from fedbbpt_jax.data.image_rows import ImageRows, LabelledImages
from fedbbpt_jax.data.images import Transform, center_crop, decode_image, grid_means
from fedbbpt_jax.errors import TaskError
from fedbbpt_jax.types import Examples, Task

TEST_SHARE = 0.3  # of a source with one split, as CoOp splits such data sets (50 % train, 20 % validation, 30 % test)
VALIDATION_SHOTS = 4
TEST_SEED = 0
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_image_task(
    name: str,
    *,
    data: str | None = None,
    revision: str | None = None,
    transform: Transform | None = None,
    templates: Sequence[str] = (),
    shots: int = 16,
    seed: int = 0,
    test_limit: int | None = None,
    client_column: str | None = None,
) -> Task:
    """Returns a few-shot task of images: inputs uint8 `[n, S, S, 3]`, features `grid_means`, labels int32.

    `shots` images per class are drawn for training and min(shots, 4) for validation: from the validation split, or
    from the rest of `train` where there is none or it serves as the test. The test is the whole test split, or a
    stratified part of it; of a source with a single split, 30 % of each class are the test. Only images that are used
    are decoded; they take 3·S² bytes each.

    Differs from BlackVIP: training images are cropped as test images are, where it crops and flips at random, because
    the features of a frozen encoder are computed once per image; splits are the source's own, not those of CoOp.

    Args:
      name: a row of `IMAGE_TASKS`, or any other name (empty: that of the data) with `data`.
      data: a folder (class folders, split folders of class folders, or parquet files) or a hub id.
      revision: a branch, tag or commit of the hub's.
      transform: to uint8 `[S, S, 3]`; CLIP's crop of 224 pixels if left out.
      templates: texts with one `{}` each, instead of the table's or "a photo of a {}.".
      shots: training images per class.
      seed: draws training and validation images.
      test_limit: at most so many test images, the same for every seed.
      client_column: of the table, whose an image is.

    Raises:
      TaskError: the data cannot be loaded, an image cannot be read, or a class has too few images.
      ValueError: the transform gives something else than uint8 `[S, S, 3]`.
    """
    if data is None and name not in IMAGE_TASKS:
        raise TaskError(f"unknown image task {name!r}; expected one of {', '.join(IMAGE_TASKS)}, or data")
    if shots < 1 or (test_limit is not None and test_limit < 1):
        raise TaskError(f"shots and test_limit must be at least 1, got {shots} and {test_limit}")
    row = IMAGE_TASKS.get(name) or ImageTask("", str(data))
    source = row.hub_id if data is None else str(data)
    texts = check_templates(templates) if templates else row.templates
    if client_column is not None:
        row = row._replace(columns=row.columns._replace(client=client_column))
    images = name_classes(read_images(source, row, revision), row, source)
    parts = draw(images, shots, seed, test_limit, source)
    train, validation, test = (_examples(part, transform or center_crop()) for part in parts)
    called = name or name_of(source)
    return Task(called, images.class_names, texts, train, validation, test, train_clients=parts[0].clients)


def name_of(data: str) -> str:
    """Returns what a task of these data is called: the name of the folder or of the hub's data set."""
    return Path(data).expanduser().resolve().name


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Returns the templates.

    Raises:
      TaskError: one of them has no place for the class name, or more than one.
    """
    for template in templates:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise TaskError(
                f"a template needs one {{}} where the class name goes, and no other braces; got {template!r}"
            )
    return tuple(templates)


def read_images(source: str, row: ImageTask, revision: str | None = None) -> LabelledImages:
    """Returns the labelled images of a folder, or of the hub where there is no such folder.

    Args:
      source: a folder or a hub id.
      row: which splits and columns to read.
      revision: of the hub's data set.

    Raises:
      TaskError: they cannot be read.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise TaskError(
                f"{folder} is a folder, and a revision is of the hub's data sets; got revision {revision!r}"
            )
        try:
            if any(folder.rglob("*.parquet")):
                return read_parquet(folder, row.splits, row.columns)
            if row.columns.client:
                raise TaskError(f"{folder} holds image files; only a table has a column {row.columns.client!r}")
            return read_image_folder(folder, row.splits)
        except OSError as error:
            raise TaskError(f"cannot read {folder}: {error}") from error
    if folder.exists() or not HUB_ID.fullmatch(source):
        what = "a file" if folder.exists() else "not here"
        raise TaskError(f"cannot load {source!r}: it is {what}; expected a folder, or the id of a hub data set")
    return read_hub(source, row.config, revision, row.splits, row.columns)


def name_classes(images: LabelledImages, row: ImageTask, source: str) -> LabelledImages:
    """Returns the images with the names that the table gives to classes, without those that it leaves out.

    Raises:
      TaskError: classes have no names, or not as many as the table has, or two have the same, or there is only one.
    """
    own = images.class_names
    if row.class_names and (images.numbered or all(name.isdecimal() for name in own)):
        if len(own) != len(row.class_names):
            raise TaskError(f"{source} has {len(own)} classes; expected {len(row.class_names)}")
        own = row.class_names
    elif images.numbered:
        raise TaskError(
            f"{source} has the labels {own[0]} to {own[-1]} and no names for them; expected class labels, strings, or "
            "a file classes.txt beside the parquet files, a name per line"
        )
    names = [row.rename(name) for name in own]
    named = tuple(name for name in names if name is not None)
    if len(named) < 2:
        raise TaskError(f"{source} has {len(named)} classes ({', '.join(named)}); expected at least 2")
    if len(set(named)) < len(named):
        raise TaskError(f"{source} has two classes called {max(named, key=named.count)!r}")
    kept = np.array([name is not None for name in names])
    place = np.cumsum(kept, dtype=np.int32) - 1

    def relabel(part: ImageRows) -> ImageRows:
        part = part.take(np.flatnonzero(kept[part.labels]))
        return part._replace(labels=place[part.labels])

    validation, test = (None if part is None else relabel(part) for part in (images.validation, images.test))
    return LabelledImages(named, relabel(images.train), validation, test)


def draw(
    images: LabelledImages, shots: int, seed: int, test_limit: int | None, source: str
) -> tuple[ImageRows, ImageRows, ImageRows]:
    """Returns the images of a task, for training, validation and test; none is in two of them.

    Args:
      images: the data set.
      shots: training images per class.
      seed: draws training and validation images.
      test_limit: at most so many test images, which no seed changes.
      source: where the images lie, for errors.

    Raises:
      TaskError: a class has no validation or test images, or not enough to train on.
    """
    names, train, validation, test = images.class_names, images.train, images.validation, images.test
    if test is None:
        held_out = stratified_part(train.labels, TEST_SHARE, TEST_SEED)
        train, test = (train.take(np.flatnonzero(mask)) for mask in (~held_out, held_out))
    num_validation = min(shots, VALIDATION_SHOTS)
    ranks = class_ranks(train.labels, (seed, 0))
    if validation is None:
        _check_counts(train.labels, shots + 1, f"training images ({shots} shots and 1 to validate)", names, source)
        validation = train.take(np.flatnonzero((ranks >= shots) & (ranks < shots + num_validation)))
    else:
        _check_counts(train.labels, shots, f"training images ({shots} shots)", names, source)
        _check_counts(validation.labels, 1, "validation image", names, source)
        validation = validation.take(np.flatnonzero(class_ranks(validation.labels, (seed, 1)) < num_validation))
    _check_counts(test.labels, 1, "test image", names, source)
    if test_limit is not None:
        test = test.take(stratified_sample(test.labels, test_limit, TEST_SEED))
    return train.take(np.flatnonzero(ranks < shots)), validation, test


def _check_counts(labels: np.ndarray, least: int, what: str, class_names: Sequence[str], source: str) -> None:
    counts = np.bincount(labels, minlength=len(class_names))
    if counts.min() < least:
        name, count = class_names[int(counts.argmin())], counts.min()
        raise TaskError(f"{source}: class {name!r} needs {least} {what} and has {count}")


def _examples(part: ImageRows, transform: Transform) -> Examples:
    """Returns the decoded and transformed images of a part, in its order."""
    inputs: np.ndarray = np.empty(0, np.uint8)
    for row, (name, encoded) in enumerate(part.read(np.arange(len(part.labels)))):
        image = transform(decode_image(encoded, name))
        if row == 0:
            inputs = np.empty((len(part.labels), len(image), len(image), 3), np.uint8)
        if image.dtype != np.uint8 or image.shape != inputs.shape[1:]:
            raise ValueError(
                f"the transform gave {image.dtype} {list(image.shape)} for {name}; expected uint8 [S, S, 3], the same S"
            )
        inputs[row] = image
    return Examples(inputs, grid_means(inputs), part.labels)
