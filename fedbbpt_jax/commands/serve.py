"""`fedbbpt serve`: the frozen model of an experiment as a query-only HTTP server."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from fedbbpt_jax.black_box.frozen import Precision, query_only
from fedbbpt_jax.black_box.sentences import sentence_classifier, sentence_embedder
from fedbbpt_jax.black_box.server.http_faults import Faults, read_faults, with_faults
from fedbbpt_jax.black_box.server.limits import Limits
from fedbbpt_jax.black_box.server.served_model import (
    NUM_ROWS,
    ServedModel,
    ServedRows,
    ServedText,
    served_model,
    served_rows,
)
from fedbbpt_jax.data.text_encoding import encode_masked, encode_sentences
from fedbbpt_jax.errors import ServeError
from fedbbpt_jax.models.sentence_classifiers import EncodedText
from fedbbpt_jax.prompts.soft import word_embeddings
from fedbbpt_jax.training.experiment import Experiment, ResolvedExperiment, TextOptions
from fedbbpt_jax.training.load import load_classifier, load_experiment_task
from fedbbpt_jax.training.load_texts import SENTENCE_TOKENS, task_texts, text_model
from fedbbpt_jax.training.resolve import resolve
from fedbbpt_jax.training.served import served_name
from fedbbpt_jax.types import PyTree, Query, Task

TOKEN = "FEDBBPT_TOKEN"
BLOCK = 32
"""Sentences of one row where the prompt stands in the class texts: these cost as much for one as for many."""
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class Serve:
    """Serves a frozen model over HTTP: it answers queries, and gives nothing else away.

    Who asks must bear the token in the environment variable FEDBBPT_TOKEN, if there is one.

    Attributes:
      model: one of `fedbbpt list models`, a folder, or a hub id.
      task: whose classes it tells apart (`fedbbpt list tasks`).
      data: as for run.
      templates: as for run.
      revision: branch, tag or commit of the model on the hub.
      generator: of prompts for texts: soft takes word embeddings, tokens takes token ids.
      precision: of the model's matrix products.
      text: for texts only.
      host: address to listen on; others than this machine are served with a token only.
      port: to listen on; 0 takes a free one.
      num_rows: computed in one batch.
      max_length: tokens of the longest text, which every row is computed for; those of the task's own if left out.
      limit: what is taken at most; more is refused.
      faults: a JSON or TOML file of faults to inject.
      fault: faults to inject, in place of a file.
    """

    model: tyro.conf.Positional[str] = "mini-clip"
    task: str | None = None
    data: str | None = None
    templates: tuple[str, ...] = ()
    revision: str | None = None
    generator: Literal["soft", "tokens"] | None = None
    precision: Precision = "highest"
    text: tyro.conf.OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    host: str = "127.0.0.1"
    port: int = 8000
    num_rows: int = NUM_ROWS
    max_length: int | None = None
    limit: Limits = field(default_factory=Limits)
    faults: Path | None = None
    fault: Faults = field(default_factory=Faults)


def serve_command(command: Serve) -> int:
    """Serves until SIGINT or SIGTERM, and then answers what it was asked before; returns the exit code.

    Raises:
      ServeError: the server's packages are not installed, or the address is taken.
      ValueError: others could ask without a token, or arguments do not go together.
    """
    if any(find_spec(name) is None for name in _NEEDED):
        raise ServeError("a server needs more packages: pip install 'fedbbpt_jax[serve]'")
    import uvicorn

    from fedbbpt_jax.black_box.server.app import check_address, create_app

    token, faults = os.environ.get(TOKEN) or None, command.fault
    check_address(command.host, token)
    if command.faults is not None:
        if faults != Faults():
            raise ValueError("faults come from --faults or from flags, got both")
        faults = read_faults(command.faults)
    with _listening(command.host, command.port) as listener:
        model = load_served_model(command)
        app: Any = create_app(model, token=token, limits=command.limit)
        app = app if faults == Faults() else with_faults(app, faults, app.state.count_fault)
        options = {
            "log_config": None,
            "log_level": "warning",
            "access_log": False,
            "proxy_headers": False,
            "server_header": False,
        }
        server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=10, **options))
        host = f"[{command.host}]" if ":" in command.host else command.host
        address = f"http://{host}:{listener.getsockname()[1]}/v2/models/{model.name}"
        print(f"serving {address}, fingerprint {model.fingerprint[:12]}", file=sys.stderr, flush=True)
        with _signals_end_quietly():
            server.run(sockets=[listener])
    return 0


def load_served_model(command: Serve) -> ServedModel:
    """Returns the model that a command names, compiled.

    Raises:
      TaskError, CheckpointError: the data or the model cannot be loaded.
      ValueError: a value is out of range, or two do not go together.
    """
    e = served_experiment(command)
    task = load_experiment_task(e)
    box, like = query_only(load_classifier(e, task)), row_like(e, task, command.max_length)
    served = served_model(served_name(e.model), box, like, task.class_names, e.precision, command.num_rows)
    if not task.image_size:
        bare = served_rows(box, Query(np.zeros((1, 1, 0), np.int32), like.inputs), command.num_rows)
        served = served._replace(bare=bare, text=_in_plain_text(e, bare))
    zeros = [jax.tree.map(lambda x: np.zeros((command.num_rows, *x.shape[1:]), x.dtype), part) for part in like]
    served.rows.compute(jax.tree.map(lambda x: x[:, 0], zeros[0]), zeros[1], 1)
    return served


def served_experiment(command: Serve) -> ResolvedExperiment:
    """Returns the experiment whose black box is served."""
    estimator = "policy-gradient" if command.generator == "tokens" else "spsa"
    names = ("model", "task", "data", "templates", "revision", "generator", "precision", "text")
    return resolve(Experiment(**{name: getattr(command, name) for name in names}, estimator=estimator))


def row_like(e: ResolvedExperiment, task: Task, max_length: int | None = None) -> Query:
    """Returns a query of one row: what a prompt and an input of an experiment look like, as zeros.

    A run that is compared with a served model asks its box in rows of this.

    Args:
      e: the experiment.
      task: its data.
      max_length: tokens of the longest text; those of the task's if left out.

    Raises:
      ValueError: inputs are no texts, or the model has fewer positions.
    """
    is_of_labels = not task.image_size and not text_model(e.model, e.revision).fills_masks
    block = BLOCK if is_of_labels and e.text.prompt_side == "label" else 1
    parts = task.train.inputs, task.validation.inputs, task.test.inputs

    if max_length is not None:
        if not hasattr(task.train.inputs, "attended"):
            raise ValueError(f"--max-length is for texts that are sent as token ids, got {max_length}")
        room = text_model(e.model, e.revision).num_positions - e.text.prompt_length
        if not 3 <= max_length <= room:
            raise ValueError(f"--max-length must be 3 to {room} beside a prompt, got {max_length}")

    def longest(*leaves: np.ndarray) -> np.ndarray:
        shape = [max_length or max(sizes) for sizes in zip(*(x.shape[1:] for x in leaves), strict=True)]
        return np.zeros((1, block, *shape), leaves[0].dtype)

    inputs = jax.tree.map(longest, *parts)
    if task.image_size:
        return Query(np.zeros((1, 1, task.image_size, task.image_size, 3), np.float32), inputs)
    if e.generator == "tokens":
        return Query(np.zeros((1, 1, e.text.prompt_length), np.int32), inputs)
    width = word_embeddings(text_model(e.model, e.revision)).shape[1]
    return Query(np.zeros((1, 1, e.text.prompt_length, width), np.float32), inputs)


def _in_plain_text(e: ResolvedExperiment, bare: ServedRows) -> ServedText:
    """Returns how the model of an experiment is asked in plain text, as long as those of its task at most.

    Args:
      e: the experiment.
      bare: rows of its inputs, without a prompt.
    """
    model, texts = text_model(e.model, e.revision), task_texts(e)
    if model.fills_masks:
        length = bare.like.inputs.ids.shape[2]

        def encode(plain: Sequence[str]) -> tuple[PyTree, np.ndarray]:
            found = encode_masked([(text,) for text in plain], texts.template, model.tokenizer, length)
            return found, found.attended.sum(1)

        return ServedText(bare, encode)

    length = min(model.num_positions, SENTENCE_TOKENS)

    def encode_sentence(plain: Sequence[str]) -> tuple[PyTree, np.ndarray]:
        found = encode_sentences([(text,) for text in plain], model.tokenizer, length)
        return found, found.attended.sum(1)

    one = EncodedText(np.zeros((1, 1, length), np.int32), np.zeros((1, 1, length), bool))
    like = Query(np.zeros((1, 1, 0), np.int32), one)
    classifier, embedder = sentence_classifier(model, texts.class_texts, e.precision), sentence_embedder(model)
    rows = [served_rows(query_only(b), like, bare.num_rows) for b in (classifier, embedder)]
    return ServedText(rows[0], encode_sentence, rows[1])


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Gives a socket that listens, so that a taken address is known before a model is loaded."""
    try:
        if not 0 <= port < 2**16:
            raise OverflowError("a port is a number between 0 and 65535")
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ServeError(f"cannot listen on {host}:{port}: {error}") from error
    with listener:
        yield listener


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Leaves SIGINT and SIGTERM without effect once the server has ended: it sends itself again what it got."""
    signals = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, lambda *_: None) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
