"""A model that is served elsewhere as the black box of a run: how it is found, and what may be spent on it."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fedbbpt_jax.black_box.client.connection import Terms
from fedbbpt_jax.black_box.ledger.costs import FREE, Budget, Price
from fedbbpt_jax.black_box.ledger.journal import Position
from fedbbpt_jax.black_box.ledger.ledger import Ledger, open_ledger, replay_ledger
from fedbbpt_jax.black_box.remote import RemoteBox, connect, replayed
from fedbbpt_jax.black_box.remote_texts import TextBox, connect_texts, replayed_texts
from fedbbpt_jax.errors import QueryFailedError
from fedbbpt_jax.training.checkpoint import read_progress
from fedbbpt_jax.training.experiment import Experiment, ResolvedExperiment
from fedbbpt_jax.training.load import load_experiment_task
from fedbbpt_jax.training.load_texts import task_texts
from fedbbpt_jax.training.plain_texts import renderer, text_api
from fedbbpt_jax.training.resolve import resolve
from fedbbpt_jax.types import BlackBox, Task

JOURNAL, CHECKPOINTS = "journal", "checkpoints"


class Served(NamedTuple):
    """A served model, and what pays for its answers."""

    box: BlackBox
    ledger: Ledger


@contextmanager
def asking(experiment: Experiment, folder: Path | None) -> Iterator[Served | None]:
    """Gives the served model of an experiment for the time of its run; None where its model is in this process.

    Args:
      experiment: whose `url` says where the model is served.
      folder: of this run alone, where the journal of queries is kept and taken up; None keeps it in memory.

    Raises:
      QueryFailedError, QuotaError: there is no such model, or it cannot be asked.
      ModelDriftError: it is not the one that the journal has answers of.
      JournalError: the journal is damaged, of another run, or shorter than a checkpoint relies on.
    """
    if experiment.url is None:
        yield None
        return
    e = resolve(experiment)
    task = load_experiment_task(e)
    reached = None if folder is None else read_progress(folder / CHECKPOINTS)
    relied_on = None if reached is None else Position(*reached[0]["journal"])
    budget = Budget(e.budget + num_eval_requests(e, task), e.served.max_tokens, e.served.max_money)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    path = None if folder is None else folder / JOURNAL
    with (
        open_ledger(path, _name_of_run(e), budget, price_of(e), at_least=relied_on) as ledger,
        _connected(e, experiment.url, task, ledger) as box,
    ):
        yield Served(box, ledger)


@contextmanager
def replaying(experiment: Experiment, folder: Path) -> Iterator[Served]:
    """Gives what a served model answered in a finished run, from the journal in the run's folder; nobody is asked.

    Raises:
      JournalError: there is no journal, it is damaged, or of another run.
    """
    with replay_ledger(folder / JOURNAL, _name_of_run(resolve(experiment))) as ledger:
        e = resolve(experiment)
        if e.served.api == "v2":
            yield Served(replayed(ledger), ledger)
        else:
            yield Served(replayed_texts(ledger, text_api(e), **_asked(e)), ledger)


def price_of(e: ResolvedExperiment) -> Price:
    """Returns what an experiment's model costs, by the file of prices that it names; nothing without one.

    Raises:
      ValueError: the file cannot be read, or has no prices for the model.
    """
    if e.served.prices is None:
        return FREE
    try:
        table = tomllib.loads(Path(e.served.prices).expanduser().read_text())
        return Price(**{name: float(value) for name, value in table[e.model].items()})
    except KeyError as error:
        raise ValueError(f"{e.served.prices} has no table [{json.dumps(e.model)}]") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"no prices in {e.served.prices}: {error}") from error


def _connected(e: ResolvedExperiment, url: str, task: Task, ledger: Ledger) -> RemoteBox | TextBox:
    if e.served.api != "v2":
        return connect_texts(url, text_api(e), ledger, **_asked(e))
    # The project's server charges once for what comes under one key.
    num_classes, terms = len(task.class_names), Terms("charged once")
    box = connect(url, served_name(e.model), ledger, num_classes=num_classes, terms=terms)
    parts = (task.train.inputs, task.validation.inputs, task.test.inputs)
    longest = max((x.attended.shape[1] for x in parts if hasattr(x, "attended")), default=0)
    if box.max_length is not None and longest > box.max_length:
        box.close()
        raise QueryFailedError(
            f"{url}: texts are up to {longest} tokens long, and the server takes {box.max_length}: serve it with "
            f"--max-length {longest}"
        )
    return box


def _asked(e: ResolvedExperiment) -> dict[str, Any]:
    return {"render": renderer(e), "label_words": task_texts(e).label_words}


def num_eval_requests(e: ResolvedExperiment, task: Task) -> int:
    """Returns the requests of all evaluations of a run: one before and after each segment, two on the test part."""
    num_models = e.num_clients if e.federation != "fedavg" else 1
    num_evaluations = 1 + -(-e.num_rounds // e.eval_every)
    return num_models * (num_evaluations * len(task.validation.labels) + 2 * len(task.test.labels))


def served_name(model: str) -> str:
    """Returns the name under which a model is served.

    Example:
      >>> served_name("openai/clip-vit-base-patch16")
      'clip-vit-base-patch16'
    """
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in Path(model).name) or "model"


def _name_of_run(e: ResolvedExperiment) -> str:
    """Returns what tells a run's journal from that of another experiment."""
    return hashlib.sha256(repr(e).encode()).hexdigest()
