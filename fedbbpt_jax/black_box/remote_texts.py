"""Served language models as black boxes of texts: which label word would come next, and how surely.

The prompt and the input become one text on this side; the answer's log-probabilities of its first token say how likely
each label word is. Most servers tell the likeliest few only: a row in which a label word is not among them is not used.
How each kind of server is asked stands in `client/text_api.py`, and in `client/embedding_api.py` for those that take
embeddings in place of texts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedbbpt_jax.black_box.client.answers import (
    LOG_PROBABILITIES,
    RejectedAnswerError,
    pack_scores,
    unpack_scores,
    usable_rows,
)
from fedbbpt_jax.black_box.client.connection import CAREFUL, Connection, Terms, open_connection
from fedbbpt_jax.black_box.client.delivery import Kept, Message, Reply
from fedbbpt_jax.black_box.client.description import find_model
from fedbbpt_jax.black_box.client.queries import query_axes
from fedbbpt_jax.black_box.client.text_api import TextApi
from fedbbpt_jax.black_box.ledger.costs import Cost
from fedbbpt_jax.black_box.ledger.ledger import Ledger
from fedbbpt_jax.errors import JournalError, QueryFailedError
from fedbbpt_jax.types import PyTree, Query, Response

Render = Callable[[PyTree, PyTree], Any]
"""`(prompt of one candidate, one input) -> text`, or what else the interface takes; of arrays on the host."""

_TOKENS_AROUND = 32
_BYTES_OF_A_ROW = 1 << 16


class TextBox:
    """Answers queries by a model of texts. Made by `connect_texts` or `replayed_texts`; one call at a time.

    Attributes:
      num_tops: the fewest first tokens that an answer told the log-probabilities of; None before an answer, or where
        others are asked for.
    """

    num_tops: int | None

    def __init__(
        self, connection: Connection | None, ledger: Ledger, api: TextApi, render: Render, label_words: Sequence[str]
    ):
        words = tuple(label_words)
        if len(words) < 2 or len({word.strip() for word in words} - {""}) < len(words):
            raise ValueError(f"label_words must be at least two different words, got {words}")
        self._connection, self._ledger, self._api = connection, ledger, api
        self._render, self._words = render, words
        self._faults: Counter[str] = Counter()
        self._knows_words, self.num_tops = False, None
        form = {"model": api.model, "label_words": list(words)}
        if (bound := ledger.bind(api.path, "", form).form) != form:
            raise JournalError(f"the ledger is of {bound}, not of {form}")

    def __call__(self, query: Query, /) -> Response:
        """Returns log-probabilities of the label words; rows in which one is not known are not valid, and 0.

        Raises:
          BudgetExceededError: the budget does not pay for the query; nothing was sent.
          QueryFailedError: the server refuses, its first answer has no log-probabilities, no answer to the first query
            tells of all label words, or everything has failed for long.
          QuotaError: the server says that there is no money.
          ModelDriftError: the model has changed since the first answer.
          JournalError: this is a replay of a run that did not ask this.
        """
        texts = self._texts(query)
        groups = [
            [(c, *kb) for kb in group] for c in range(len(texts)) for group in _groups(texts.shape[1:], self._api)
        ]
        asked = [[texts[row] for row in group] for group in groups]
        keys = [self._ledger.key(_body(self._api, batch)) for batch in asked]
        unknown = {key: batch for key, batch in zip(keys, asked, strict=True) if self._ledger.find(key) is None}
        if self._connection is not None:
            self._connection.answer([self._message(key, batch) for key, batch in unknown.items()])
        elif unknown:
            raise JournalError(
                f"the run has no answer to {len(unknown)} of {len(keys)} messages: it is not the same run"
            )
        scores = np.full((*texts.shape, len(self._words)), np.nan, np.float32)
        answered = np.zeros(texts.shape, bool)
        for group, key in zip(groups, keys, strict=True):
            if payload := self._ledger.find(key):
                rows = tuple(np.transpose(group))
                scores[rows] = unpack_scores(payload, (1, len(group), len(self._words)))[0]
                answered[rows] = True
        valid = np.zeros_like(answered)
        valid[answered], faults = usable_rows(scores[answered], LOG_PROBABILITIES)
        self._faults.update(faults + Counter({"unanswered": int((~answered).sum())}))
        if answered.all() and not (valid.any() or self._knows_words):
            words = ", ".join(self._words)
            raise QueryFailedError(f"no answer to {valid.size} texts tells of all label words ({words}): choose others")
        self._knows_words = True
        return Response(jnp.asarray(np.where(valid[..., None], scores, 0)), jnp.asarray(valid))

    @property
    def counts(self) -> dict[str, int]:
        """How many attempts there were, how they failed, and rows that were not usable, by kind."""
        return dict(Counter(self._connection.counts if self._connection else {}) + self._faults)

    def close(self) -> None:
        """Closes the connections; nothing happens at a second call. The ledger stays open."""
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> TextBox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _texts(self, query: Query) -> np.ndarray:
        """Returns the texts of a query, objects `[C, K, B]`."""
        prompts, inputs = jax.device_get((query.prompt, query.inputs))
        texts = np.empty(query_axes(query), object)
        for c, k, b in np.ndindex(texts.shape):
            prompt = jax.tree.map(lambda x, c=c, k=k: x[c, k], prompts)
            texts[c, k, b] = self._render(prompt, jax.tree.map(lambda x, c=c, b=b: x[c, b], inputs))
        return texts

    def _message(self, key: bytes, texts: Sequence[Any]) -> Message:
        api, words, ledger = self._api, self._words, self._ledger

        def read(reply: Reply) -> Kept:
            try:
                told = api.read(_strict_json(reply.body), len(texts), words)
            except RejectedAnswerError as error:
                if error.kind == "logprobs" and not ledger.balance().answered.num_requests:
                    raise QueryFailedError(f"{error}, the first one: ask what the server writes instead") from error
                raise
            ledger.bind(api.path, told.fingerprint, {})
            if told.num_tops is not None:
                self.num_tops = min(told.num_tops, self.num_tops or told.num_tops)
            cost = None if told.num_tokens is None else Cost(len(texts), told.num_tokens)
            return Kept(pack_scores(np.array([told.scores], np.float32)), cost)

        num_tokens = sum(_most_tokens(text) + _TOKENS_AROUND for text in texts)
        headers, most_bytes = {"Content-Type": "application/json"}, _BYTES_OF_A_ROW * (len(texts) + 1)
        return Message(key, Cost(len(texts), num_tokens), api.path, headers, _body(api, texts), most_bytes, read)


def connect_texts(
    url: str, api: TextApi, ledger: Ledger, *, render: Render, label_words: Sequence[str], terms: Terms = CAREFUL
) -> TextBox:
    """Returns a served model of texts as a black box, after looking, for free, whether the server has it.

    Args:
      url: of the server, without the `/v1`.
      api: how the model is asked.
      ledger: which pays, and keeps the answers.
      render: prompt and input to text.
      label_words: N words, in the order of the classes; a word counts with and without a space before it.
      terms: how the server is spoken to, and what it charges for.

    Raises:
      QueryFailedError: there is no such server or model, or it wants a token.
      JournalError: the ledger has answers of another endpoint.
      ValueError: the address is none, or the label words are not different.
    """
    connection = open_connection(url, ledger, terms)
    try:
        connection.run(find_model(connection.visit, api.model))
        return TextBox(connection, ledger, api, render, label_words)
    except BaseException:
        connection.close()
        raise


def replayed_texts(ledger: Ledger, api: TextApi, *, render: Render, label_words: Sequence[str]) -> TextBox:
    """Returns the box that answers as a served model of texts did in a finished run.

    Args:
      ledger: of the run, such as `replay_ledger` opens.
      api: as in the run, and so are the others.
      render: prompt and input to text.
      label_words: N words.

    Raises:
      JournalError: the run asked another endpoint, or none.
    """
    return TextBox(None, ledger, api, render, label_words)


def _groups(shape: tuple[int, ...], api: TextApi) -> list[list[tuple[int, int]]]:
    """Returns which (candidate, example) stand in each message of a client: all candidates together, if they fit."""
    num_candidates, batch = shape
    if api.most_texts < num_candidates:
        return [[(k, b)] for k in range(num_candidates) for b in range(batch)]
    size = api.most_texts // num_candidates
    starts = range(0, batch, size)
    return [[(k, b) for k in range(num_candidates) for b in range(s, min(s + size, batch))] for s in starts]


def _most_tokens(text: Any) -> int:
    """Returns how many tokens a text is at most, none of which is shorter than a byte; of embeddings, how many."""
    return len(text.encode() if isinstance(text, str) else text)


def _body(api: TextApi, texts: Sequence[Any]) -> bytes:
    return json.dumps(api.request(texts), sort_keys=True, allow_nan=False).encode()


def _strict_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RejectedAnswerError("body", "the answer is no JSON") from error
