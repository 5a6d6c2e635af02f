"""All tasks by name: digits that ship with the package, images and texts that are downloaded or lie in a folder."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fedbbpt_jax.data.digit_tasks import DIGIT_TASKS, load_digit_task
from fedbbpt_jax.data.image_tasks import IMAGE_TASKS, check_templates, load_image_task, name_of
from fedbbpt_jax.data.images import Transform
from fedbbpt_jax.data.text_datasets import TEXT_TASKS
from fedbbpt_jax.errors import TaskError
from fedbbpt_jax.types import Task


def descriptions() -> dict[str, str]:
    """Returns a line for each task: digits first, then images, then texts."""
    tasks = (*DIGIT_TASKS.items(), *IMAGE_TASKS.items(), *TEXT_TASKS.items())
    return {name: task.description for name, task in tasks}


def load_task(
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
    """Returns the task `name` with `shots` training examples per class drawn by `seed`.

    Args:
      name: one of `descriptions()`; empty for a task that is named after its `data`.
      data: for images: a folder, or the id of a data set of the Hugging Face hub, instead of the table's.
      revision: for images of the hub: a branch, tag or commit.
      transform: for images: to uint8 `[S, S, 3]`; CLIP's crop of 224 pixels if left out. Digits are painted at their
        own size, whatever it is.
      templates: texts with one `{}` each, instead of the task's own.
      shots: training examples per class.
      seed: draws training and validation examples; the test part is the same for all.
      test_limit: for images: at most so many test examples.
      client_column: for tables of images: whose an image is.

    Raises:
      TaskError: the name is unknown, the data cannot be read, or they do not give what was asked for.
    """
    if name in DIGIT_TASKS:
        images_only = {"data": data, "revision": revision, "test_limit": test_limit, "column of clients": client_column}
        for option, value in images_only.items():
            if value is not None:
                raise TaskError(f"task {name!r} is made of digits that ship with the package: it takes no {option}")
        task = load_digit_task(name, shots=shots, seed=seed)
        return task._replace(templates=check_templates(templates)) if templates else task
    if name in TEXT_TASKS:
        raise TaskError(
            f"task {name!r} is of texts, which become examples with the tokenizer of a model: load_text_task"
        )
    if name not in IMAGE_TASKS and (data is None or name not in ("", name_of(data))):
        known = descriptions()
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise TaskError(f"unknown task {name!r}; did you mean {nearest!r}? (`fedbbpt list tasks` shows all)")
    return load_image_task(
        name,
        data=data,
        revision=revision,
        transform=transform,
        templates=templates,
        shots=shots,
        seed=seed,
        test_limit=test_limit,
        client_column=client_column,
    )
