"""SST-2 by the wording of its two classes: all-MiniLM-L6-v2, every pair of words in every template, chosen on shots.

    python experiments/sst2_wordings.py

For each of the five seeds the wording that is best on its training and validation shots (16 each per class) is
looked at on the test part, once. Needs the data and the model, as experiments/agnews.py does.
"""

from __future__ import annotations

import itertools

import numpy as np

from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.load import load_experiment_task
from fedbbpt_jax.training.load_texts import embed_texts
from fedbbpt_jax.training.report import format_mean
from fedbbpt_jax.training.resolve import resolve
from fedbbpt_jax.types import Examples

SEEDS = (13, 21, 42, 87, 100)  # of LM-BFF
PAIRS = (
    ("terrible", "great"),
    ("bad", "good"),
    ("negative", "positive"),
    ("awful", "wonderful"),
    ("boring", "fascinating"),
    ("disappointing", "delightful"),
    ("dull and lifeless", "moving and funny"),
    ("i hated it", "i loved it"),
)
TEMPLATES = (
    "{}",
    "It was {}.",
    "a {} movie",
    "a {} film",
    "this movie is {}",
    "the critic found the film {}",
    "a {} movie review",
    "the sentiment of this review is {}",
)


def main() -> None:
    wordings = [tuple(template.format(word) for word in pair) for template, pair in itertools.product(TEMPLATES, PAIRS)]
    experiments = [resolve(Experiment("sst2", seed=seed)) for seed in SEEDS]
    texts = sorted({text for wording in wordings for text in wording})
    embeddings = embed_texts(experiments[0], tuple((text,) for text in texts))
    found = dict(zip(texts, embeddings, strict=True))
    classes = [np.stack([found[text] for text in wording]) for wording in wordings]
    first, chosen = [], []
    for e in experiments:
        task = load_experiment_task(e)
        first.append(accuracy(task.test, classes[0]))
        shots = [accuracy(task.train, c) + accuracy(task.validation, c) for c in classes]
        best = int(np.argmax(shots))
        chosen.append(accuracy(task.test, classes[best]))
        print(f"seed {e.seed}: {wordings[best]}, shots {50 * shots[best]:.1f} %, test {100 * chosen[-1]:.1f} %")
    every = [accuracy(task.test, c) for c in classes]
    print(f"{wordings[0]}: test {format_mean(first)} %")
    print(f"chosen of {len(wordings)} wordings: test {format_mean(chosen)} %")
    print(f"all wordings, for the record and for no choice: {100 * min(every):.1f} to {100 * max(every):.1f} %")


def accuracy(examples: Examples, class_embeddings: np.ndarray) -> float:
    """Returns the share of examples that are nearest to the text of their class."""
    return float((np.argmax(examples.inputs @ class_embeddings.T, axis=1) == examples.labels).mean())


if __name__ == "__main__":
    main()
