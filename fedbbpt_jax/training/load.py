"""The data and the frozen models that an experiment names, loaded once and shared by its seeds and baselines."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fedbbpt_jax.black_box.frozen import Precision, clip_classifier
from fedbbpt_jax.data.client_shifts import shift_clients
from fedbbpt_jax.data.images import grid_means
from fedbbpt_jax.data.partition import by_column, client_column, find_partition
from fedbbpt_jax.data.tasks import load_task
from fedbbpt_jax.models.classifiers import as_float
from fedbbpt_jax.models.features import vit_features
from fedbbpt_jax.models.loading import PretrainedCLIP, PretrainedViT, load_clip, load_vit
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.prompts.soft import check_fingerprint, fingerprint, projected
from fedbbpt_jax.training.build import PromptSizes
from fedbbpt_jax.training.experiment import ResolvedExperiment
from fedbbpt_jax.training.load_texts import (
    load_encoded_task,
    load_projection,
    load_text_classifier,
    load_vocabulary,
    num_layers,
    prompt_tokens,
    token_sizes,
)
from fedbbpt_jax.training.plain_texts import phrases, plain_task, words_of
from fedbbpt_jax.training.resolve import SOFT_GENERATORS, TEXT_GENERATORS
from fedbbpt_jax.types import BlackBox, Examples, Task


def load_experiment_task(e: ResolvedExperiment) -> Task:
    """Returns the data of an experiment: images of the model's size, and their features by the encoder, if it has one.

    Raises:
      TaskError, CheckpointError: the data, the model or the encoder cannot be loaded.
    """
    if e.served.api != "v2":
        return plain_task(e)
    if e.generator in TEXT_GENERATORS:
        return load_encoded_task(e)
    column = client_column(e.partition)
    return _task(e.task, e.data, e.templates, e.shots, e.seed, e.test_limit, column, e.model, e.revision, e.encoder)


def split_among_clients(e: ResolvedExperiment, task: Task) -> tuple[Examples, list[np.ndarray]]:
    """Returns the training examples, as their clients see them, and the rows that each client holds.

    Raises:
      ValueError: a column names another number of clients than the experiment has, or none for an example.
    """
    train = task.train
    if task.train_clients is not None:
        parts = by_column(task.train_clients)
        if len(parts) != e.num_clients:
            raise ValueError(
                f"--partition {e.partition} names {len(parts)} clients among the {len(train.labels)} training "
                f"examples: pass --num-clients {len(parts)}, got {e.num_clients}"
            )
        return train, parts
    parts = find_partition(e.partition)(np.asarray(train.labels), e.num_clients, e.seed)
    if e.partition != "feature-shift":
        return train, parts
    pictures = shift_clients(np.asarray(train.inputs), parts, e.seed)
    features = grid_means(pictures) if e.encoder is None else vit_features(_vit(e.encoder), pictures)
    return train._replace(inputs=pictures, features=features), parts


def load_classifier(e: ResolvedExperiment, task: Task) -> BlackBox:
    """Returns the frozen model of an experiment as a differentiable classifier of the task's classes.

    Raises:
      CheckpointError: the model cannot be loaded.
      ValueError: a template has not exactly one `{}`, a class name is too long for the model, or classes have no words.
    """
    if e.generator in TEXT_GENERATORS:
        return load_text_classifier(e)
    return _classifier(e.model, e.revision, task.class_names, task.templates, e.precision)


def client_end(e: ResolvedExperiment, box: BlackBox) -> BlackBox:
    """Returns what a client's prompts are sent to: the box, behind the projection where prompts are soft ones.

    Raises:
      ValueError: another process of the run has drawn another projection.
    """
    if e.generator not in SOFT_GENERATORS:
        return box
    projection = load_projection(e)
    if jax.process_count() > 1:
        check_fingerprint(projection, multihost_utils.broadcast_one_to_all(fingerprint(projection)))
    return projected(box, projection)


def prompt_sizes(e: ResolvedExperiment, task: Task) -> PromptSizes:
    """Returns what a prompt of an experiment has to fit.

    Raises:
      TaskError: a discrete prompt has no words.
    """
    if e.generator not in TEXT_GENERATORS:
        return PromptSizes(task.image_size, task.feature_size)
    if e.served.api != "v2":
        return PromptSizes(0, 0, tuple(range(len(phrases(e)))))
    vocabulary = load_vocabulary(e) if e.generator == "tokens" else ()
    return PromptSizes(0, task.feature_size, vocabulary, *token_sizes(e), num_layers(e))


def prompt_words(e: ResolvedExperiment, prompt: np.ndarray) -> str | None:
    """Returns the text of a discrete prompt, token ids or places of phrases `[P]`; None for prompts of another form."""
    if e.generator != "tokens":
        return None
    return prompt_tokens(e, prompt) if e.served.api == "v2" else words_of(e, prompt)


@functools.lru_cache(maxsize=2)
def _task(
    name: str,
    data: str | None,
    templates: tuple[str, ...],
    shots: int,
    seed: int,
    test_limit: int | None,
    client_column: str | None,
    model: str,
    revision: str | None,
    encoder: str | None,
) -> Task:
    clip = _clip(model, revision)
    wanted = {"templates": templates, "shots": shots, "seed": seed, "test_limit": test_limit}
    wanted["client_column"] = client_column
    task = _resized(load_task(name, data=data, transform=clip.transform, **wanted), clip.pixels.size)
    if encoder is None:
        return task
    vit = _vit(encoder)
    parts = (task.train, task.validation, task.test)
    encoded = [part._replace(features=vit_features(vit, part.inputs)) for part in parts]
    return task._replace(train=encoded[0], validation=encoded[1], test=encoded[2])


@functools.lru_cache(maxsize=4)
def _classifier(
    model: str, revision: str | None, names: tuple[str, ...], templates: tuple[str, ...], precision: Precision
) -> BlackBox:
    return clip_classifier(_clip(model, revision), names, templates, precision)


@functools.lru_cache(maxsize=1)
def _clip(model: str, revision: str | None) -> PretrainedCLIP:
    return load_clip(MINI_CLIP if model == "mini-clip" else model, revision)


@functools.lru_cache(maxsize=1)
def _vit(encoder: str) -> PretrainedViT:
    return load_vit(encoder)


def _resized(task: Task, size: int) -> Task:
    """Returns the task at the model's image size; only drawn images, such as the digits, come at another."""
    if task.image_size == size:
        return task

    def resize(images: np.ndarray) -> np.ndarray:
        shape = (len(images), size, size, images.shape[-1])
        return np.asarray(jnp.clip(jax.image.resize(as_float(jnp.asarray(images)), shape, "cubic"), 0, 1))

    def part(examples: Examples) -> Examples:
        return examples._replace(inputs=resize(examples.inputs))

    clean = None if task.clean_test_inputs is None else resize(task.clean_test_inputs)
    parts = part(task.train), part(task.validation), part(task.test)
    train, validation, test = parts
    return task._replace(train=train, validation=validation, test=test, clean_test_inputs=clean)
