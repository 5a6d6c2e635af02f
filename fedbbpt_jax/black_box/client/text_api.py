"""How servers of language models are asked to go on with texts, and how their answers become scores of label words.

| interface | what it tells | made by |
|---|---|---|
| OpenAI's chat, with log-probabilities | the likeliest 20 first tokens | `chat` |
| OpenAI's completions | the likeliest 5 first tokens, of many texts at once | `completions` |
| the same of vLLM | any tokens: `completions(model, options={"logprob_token_ids": [...]})` | `completions` |
| SGLang's own | the tokens of all label words, of many texts at once | `sglang` |
| chat without log-probabilities | what it writes | `written` |

Source: OpenAI, "API reference", chat and completions; SGLang, "Sampling parameters", `/generate`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedbbpt_jax.black_box.client.answers import MISSING, RejectedAnswerError

Tops = list[tuple[str, float]]
"""First tokens that were likely, and their log-probabilities, nats."""

NOT_WRITTEN = math.log(0.01)
"""The score of a label word that a model did not write, where it wrote another one, whose score is 0."""
_LARGEST = 1e30


class Told(NamedTuple):
    """What an answer tells.

    Attributes:
      scores: log-probabilities of the N label words of each text, `MISSING` where one is not told.
      fingerprint: of the model, "" if there is none.
      num_tokens: that are billed; None if it is not told.
      num_tops: the fewest first tokens that a text was told of; None where they are not what is asked for.
    """

    scores: list[list[float]]
    fingerprint: str
    num_tokens: int | None
    num_tops: int | None = None


class TextApi(NamedTuple):
    """How a model is asked to go on with texts.

    Attributes:
      model: its name at the server.
      path: that is asked.
      most_texts: in one message.
      request: `texts -> body`; of embeddings `[T, E]` for an interface that takes these (`embedding_api.py`).
      read: `(body of an answer, number of texts, label words) -> Told`; raises `RejectedAnswerError`.
    """

    model: str
    path: str
    most_texts: int
    request: Callable[[Sequence[Any]], dict[str, Any]]
    read: Callable[[Any, int, Sequence[str]], Told]


def chat(model: str, num_top: int = 20, options: Mapping[str, Any] | None = None) -> TextApi:
    """Returns the interface `/v1/chat/completions`: one text in a message, as the user's.

    Args:
      model: its name at the server.
      num_top: tokens whose log-probabilities are asked for; servers allow up to 20.
      options: more entries of the request, such as `{"seed": 0}`.

    Example:
      >>> sorted(chat("m").request(["It was"]))
      ['logprobs', 'max_tokens', 'messages', 'model', 'temperature', 'top_logprobs']
    """
    fixed = {"model": model, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": num_top}

    def tops(choice: Any) -> Tops:
        if choice.get("finish_reason") == "content_filter":
            return []
        return [(str(t["token"]), _number(t["logprob"])) for t in choice["logprobs"]["content"][0]["top_logprobs"]]

    return TextApi(model, "/v1/chat/completions", 1, _as_user(fixed, options), _reader(tops))


def completions(
    model: str, num_top: int = 5, most_texts: int = 128, options: Mapping[str, Any] | None = None
) -> TextApi:
    """Returns the interface `/v1/completions`: many texts in a message, all candidates of an example together.

    Args:
      model: its name at the server.
      num_top: tokens whose log-probabilities are asked for; OpenAI allows 5, others more.
      most_texts: in one message.
      options: more entries of the request.

    Example:
      >>> completions("m").request(["It was", "All was"])["prompt"]
      ['It was', 'All was']
    """
    fixed = {"model": model, "max_tokens": 1, "temperature": 0, "logprobs": num_top}

    def request(texts: Sequence[str]) -> dict[str, Any]:
        return {**fixed, **(options or {}), "prompt": list(texts)}

    def tops(choice: Any) -> Tops:
        return [(str(token), _number(value)) for token, value in choice["logprobs"]["top_logprobs"][0].items()]

    return TextApi(model, "/v1/completions", most_texts, request, _reader(tops))


def written(model: str, max_tokens: int = 8, options: Mapping[str, Any] | None = None) -> TextApi:
    """Returns the interface `/v1/chat/completions` of a server that tells no log-probabilities: what it writes counts.

    The label word that comes first in the answer has the score 0, all others `NOT_WRITTEN`: differences of losses are
    coarse, and only methods that compare many candidates get on. An answer without a label word is not used.

    Args:
      model: its name at the server.
      max_tokens: of an answer.
      options: more entries of the request, such as a system message's.
    """
    fixed = {"model": model, "max_tokens": max_tokens, "temperature": 0}

    def read(body: Any, num_texts: int, words: Sequence[str]) -> Told:
        found = []
        for choice in _choices(body, num_texts):
            message = choice.get("message")
            text = message.get("content") if isinstance(message, dict) else None
            if not isinstance(text, str | None):
                raise RejectedAnswerError("choices", "the answer is no text")
            found.append(written_scores(text or "", words))
        return Told(found, _fingerprint(body), _total_tokens(body))

    return TextApi(model, "/v1/chat/completions", 1, _as_user(fixed, options), read)


def sglang(model: str, token_ids: Sequence[int], most_texts: int = 128) -> TextApi:
    """Returns SGLang's own interface `/generate`, which tells the log-probability of any token.

    Args:
      model: its name at the server.
      token_ids: N, of the label words, in their order; of the model's own tokenizer.
      most_texts: in one message.

    Example:
      >>> sglang("m", [7, 9]).request(["It was"])["token_ids_logprob"]
      [7, 9]
    """
    fixed = {
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "token_ids_logprob": list(token_ids),
    }

    def of_one(told: Any) -> list[float]:
        known = {int(entry[1]): _number(entry[0]) for entry in told["output_token_ids_logprobs"][0]}
        return [known.get(number, MISSING) for number in token_ids]

    def read(body: Any, num_texts: int, words: Sequence[str]) -> Told:
        if not isinstance(body, list) or len(body) != num_texts:
            raise RejectedAnswerError("choices", f"expected a list of {num_texts} answers")
        try:
            told = [answer["meta_info"] for answer in body]
            num_tokens = sum(int(meta["prompt_tokens"]) + int(meta["completion_tokens"]) for meta in told)
            return Told([of_one(meta) for meta in told], "", num_tokens)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RejectedAnswerError("logprobs", "the answer has no log-probabilities of tokens") from error

    return TextApi(model, "/generate", most_texts, lambda texts: {**fixed, "text": list(texts)}, read)


def word_score(word: str, tops: Tops) -> float:
    """Returns log Σ p over the tokens that are a word, with and without a space before it; `MISSING` if none is.

    Args:
      word: such as " great".
      tops: of one text.

    Example:
      >>> tops = [(" yes", math.log(0.5)), ("yes", math.log(0.25)), ("no", -2.0)]
      >>> round(math.exp(word_score("yes", tops)), 6)
      0.75
    """
    found = [value for token, value in tops if token.strip() == word.strip() and value != MISSING]
    wrong = [value for value in found if not math.isfinite(value)]
    if wrong or not found:
        return wrong[0] if wrong else MISSING
    return max(found) + math.log(sum(math.exp(value - max(found)) for value in found))


def written_scores(text: str, words: Sequence[str]) -> list[float]:
    """Returns 0 for the label word that comes first in a text, `NOT_WRITTEN` for others; all `MISSING` if none does.

    Example:
      >>> [round(score, 2) for score in written_scores("It's Great!", ["terrible", "great"])]
      [-4.61, 0.0]
    """
    places = [re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text, re.IGNORECASE) for word in words]
    first = min((place.start() for place in places if place), default=None)
    if first is None:
        return [MISSING] * len(words)
    return [0.0 if place is not None and place.start() == first else NOT_WRITTEN for place in places]


def _as_user(fixed: Mapping[str, Any], options: Mapping[str, Any] | None) -> Callable[[Sequence[str]], dict[str, Any]]:
    return lambda texts: {**fixed, **(options or {}), "messages": [{"role": "user", "content": texts[0]}]}


def _reader(tops: Callable[[Any], Tops]) -> Callable[[Any, int, Sequence[str]], Told]:
    """Returns the `read` of an interface whose choices tell likely first tokens."""

    def read(body: Any, num_texts: int, words: Sequence[str]) -> Told:
        choices = _choices(body, num_texts)
        try:
            found = [tops(choice) for choice in choices]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise RejectedAnswerError("logprobs", "the answer has no log-probabilities") from error
        scores = [[word_score(word, of_text) for word in words] for of_text in found]
        return Told(scores, _fingerprint(body), _total_tokens(body), min(map(len, found)))

    return read


def _fingerprint(body: Any) -> str:
    return f"{body.get('model')} {body.get('system_fingerprint') or ''}".strip()


def _total_tokens(body: Any) -> int | None:
    usage = body.get("usage")
    billed = usage.get("total_tokens") if isinstance(usage, dict) else None
    return billed if type(billed) is int and billed >= 0 else None


def _choices(body: Any, num_texts: int) -> list[dict[str, Any]]:
    """Returns one choice for each text, in the order of the texts."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise RejectedAnswerError("choices", "the answer has no choices")
    by_index = {choice["index"]: choice for choice in choices if type(choice.get("index")) is int}
    if len(choices) != num_texts or set(by_index) != set(range(num_texts)):
        raise RejectedAnswerError("choices", f"expected a choice for each of {num_texts} texts, got {len(choices)}")
    return [by_index[index] for index in range(num_texts)]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RejectedAnswerError("logprobs", "a log-probability is no number")
    return math.copysign(math.inf, value) if abs(value) > _LARGEST else float(value)
