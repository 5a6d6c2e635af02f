"""A served model as a black box: queries go over HTTP, are paid once and counted, and fail as the network does.

One message carries what one client asks: its K prompts and the B inputs that all of them are tried on, in the Open
Inference Protocol V2. Answers come in any order and are put in the order of clients, so that a run does not depend on
the network's mood; what random waiting there is reaches no result.

The secret that a server may ask for is read from the environment here, and stands in no message, record or journal.
"""

from __future__ import annotations

from collections import Counter

from fedbbpt_jax.black_box.client.answers import (
    SCORES,
    RejectedAnswerError,
    Scale,
    fingerprint_of,
    pack_scores,
    read_answer,
)
from fedbbpt_jax.black_box.client.connection import CAREFUL, Connection, Terms, open_connection
from fedbbpt_jax.black_box.client.delivery import Kept, Message, Reply
from fedbbpt_jax.black_box.client.description import describe, model_path
from fedbbpt_jax.black_box.client.queries import (
    Form,
    Part,
    canonical,
    form_from_json,
    join_answers,
    query_axes,
    read_form,
    read_parameter,
    split_query,
)
from fedbbpt_jax.black_box.ledger.costs import Cost
from fedbbpt_jax.black_box.ledger.ledger import Ledger
from fedbbpt_jax.black_box.protocol import HEAD_LENGTH, encode
from fedbbpt_jax.errors import JournalError, QueryFailedError
from fedbbpt_jax.types import Query, Response


class RemoteBox:
    """Answers queries by a served model. Made by `connect`; one call at a time.

    Attributes:
      max_length: tokens of the longest text that the server takes; None where it does not say.
    """

    max_length: int | None

    def __init__(self, connection: Connection, ledger: Ledger, max_length: int | None):
        self._connection, self._ledger, self.max_length = connection, ledger, max_length
        self._faults: Counter[str] = Counter()

    def __call__(self, query: Query, /) -> Response:
        """Returns the response to a query; rows that got no usable answer are not valid, and their scores 0.

        Raises:
          BudgetExceededError: the budget does not pay for the query; nothing was sent.
          QueryFailedError: the server refuses, or everything has failed for long.
          QuotaError: the server says that there is no money.
          ModelDriftError: the model has changed since the first answer; nothing of the new one's is used.
          ValueError: the model does not take such a query.
        """
        form = _bound_form(self._ledger)
        parts = split_query(query, form)
        keys = [self._ledger.key(canonical(part)) for part in parts]
        unknown = {key: part for key, part in zip(keys, parts, strict=True) if self._ledger.find(key) is None}
        self._connection.answer([_message(self._ledger, key, part) for key, part in unknown.items()])
        return _respond(self._ledger, query, parts, keys, form, self._faults)

    @property
    def counts(self) -> dict[str, int]:
        """How many attempts there were, how they failed, and rows that were not usable, by kind."""
        return dict(Counter(self._connection.counts) + self._faults)

    @property
    def concurrency(self) -> int:
        """How many messages may be in flight now."""
        return self._connection.concurrency

    def close(self) -> None:
        """Closes the connections; nothing happens at a second call. The ledger stays open."""
        self._connection.close()

    def __enter__(self) -> RemoteBox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteBox({self._connection.url!r})"


class ReplayedBox:
    """Answers queries from a finished run's ledger and asks nobody. Made by `replayed`."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._faults: Counter[str] = Counter()

    def __call__(self, query: Query, /) -> Response:
        """Returns the response that the query got in the run.

        Raises:
          JournalError: the run did not ask this.
        """
        form = _bound_form(self._ledger)
        parts = split_query(query, form)
        keys = [self._ledger.key(canonical(part)) for part in parts]
        if unknown := sum(self._ledger.find(key) is None for key in keys):
            raise JournalError(f"the run has no answer to {unknown} of {len(keys)} messages: it is not the same run")
        return _respond(self._ledger, query, parts, keys, form, self._faults)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows were not usable, by kind."""
        return dict(self._faults)


def replayed(ledger: Ledger) -> ReplayedBox:
    """Returns the box that answers as a served model did in a finished run.

    Args:
      ledger: of the run, such as `replay_ledger` opens.

    Raises:
      JournalError: the run did not ask any model.
    """
    _bound_form(ledger)
    return ReplayedBox(ledger)


def connect(
    url: str,
    model: str,
    ledger: Ledger,
    *,
    num_classes: int,
    scale: Scale = SCORES,
    max_rows: int | None = None,
    terms: Terms = CAREFUL,
) -> RemoteBox:
    """Returns a served model as a black box, after asking it, for free, whether it is the one that is needed.

    A message that fails as often and as long as the patience allows leaves its rows without an answer; what the server
    refuses raises at once. `close` the box, or use it in a `with`.

    Args:
      url: of the server, such as "http://127.0.0.1:8000".
      model: its name there.
      ledger: which pays, and keeps the answers.
      num_classes: N.
      scale: what scores can be, such as `LOG_PROBABILITIES`; a row with any other is not used.
      max_rows: prompts × examples that a message may hold, where the server does not say; a ledger that has answers
        already keeps the split that they have.
      terms: how the server is spoken to, and what it charges for.

    Raises:
      QueryFailedError: there is no such server or model, it wants a token, or it takes and answers something else.
      ModelDriftError: the ledger has answers of another model under this name.
      JournalError: the ledger has answers of another endpoint.
      ValueError: the address is none, or holds a password.
    """
    connection = open_connection(url, ledger, terms)
    try:
        metadata = connection.run(describe(connection.visit, model))
        form = read_form(metadata, num_classes, scale, max_rows)
        ledger.bind(f"{model_path(model)}/infer", fingerprint_of(metadata), form.as_json())
        kept = _bound_form(ledger)
        if (kept.num_classes, kept.scale) != (num_classes, scale):
            raise JournalError(f"the ledger is of {kept.num_classes} classes on {kept.scale}, not of this experiment")
    except RejectedAnswerError as error:
        connection.close()
        raise QueryFailedError(f"{url}: {error}") from error
    except BaseException:
        connection.close()
        raise
    return RemoteBox(connection, ledger, read_parameter(metadata, "max_length"))


def _respond(
    ledger: Ledger, query: Query, parts: list[Part], keys: list[bytes], form: Form, faults: Counter[str]
) -> Response:
    """Returns the response from a ledger that has all answers, and counts what is not usable."""
    response, found = join_answers(query_axes(query), parts, [ledger.find(key) or b"" for key in keys], form)
    faults.update(found)
    return response


def _bound_form(ledger: Ledger) -> Form:
    if ledger.model is None:
        raise JournalError("the ledger is not bound to a model")
    return form_from_json(ledger.model.form)


def _message(ledger: Ledger, key: bytes, part: Part) -> Message:
    """Returns a part as a message; its id is its key."""
    head = {"id": key.hex(), "parameters": {"binary_data_output": True}}
    content, length = encode("inputs", part.tensors, head)
    model = ledger.model
    if model is None:
        raise JournalError("the ledger is not bound to a model")

    def read(reply: Reply) -> Kept:
        told = reply.headers.get(HEAD_LENGTH)
        if told is not None and not (told.isascii() and told.isdigit() and len(told) < 12):
            raise RejectedAnswerError("body", f"the length of the head is no number: {told:.20}")
        answer = read_answer(reply.body, None if told is None else int(told), key.hex(), part.shape)
        known = ledger.model
        if known and known.fingerprint and not answer.fingerprint:
            raise RejectedAnswerError("fingerprint", "the answer does not say which model it is from")
        ledger.bind(model.endpoint, answer.fingerprint, model.form)
        return Kept(pack_scores(answer.scores))

    headers = {"Content-Type": "application/octet-stream", HEAD_LENGTH: str(length)}
    most_bytes = 65536 + 32 * part.num_requests * part.shape[2]
    return Message(key, Cost(part.num_requests), model.endpoint, headers, content, most_bytes, read)
