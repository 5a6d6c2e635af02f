"""OpenAI's routes: a classifier as a model that answers with the name of a class.

A class name is one token, and `logprobs` are the classifier's own class log-probabilities. A model of pictures is asked
in a chat with one picture, which already has its prompt and went through 8 bits per colour; text beside it is not
looked at. A model of texts is asked in a chat or with a list of prompts, an encoder of sentences also for embeddings.
"""

from __future__ import annotations

import base64
import json
import math
import time
from typing import Any

import jax
import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from fedbbpt_jax.black_box.rows import cut_query
from fedbbpt_jax.black_box.server.http_errors import HTTPError
from fedbbpt_jax.black_box.server.openai_questions import (
    Parameters,
    number_of,
    parts_of_messages,
    picture_of,
    read_parameters,
    texts_of,
)
from fedbbpt_jax.black_box.server.served_model import ServedRows
from fedbbpt_jax.black_box.server.service import (
    Service,
    answer,
    as_answered,
    check_rows,
    fingerprint,
    received,
)
from fedbbpt_jax.errors import TaskError
from fedbbpt_jax.types import PyTree, Query

TOP_LOGPROBS, TOP_LOGPROBS_OF_PROMPTS = 20, 5
"""As many as OpenAI gives, in a chat and for prompts."""


def openai_routes(service: Service) -> APIRouter:
    """Returns the routes below /v1."""
    router, model, started = APIRouter(), service.model, int(time.time())
    about = {"id": model.name, "object": "model", "created": started, "owned_by": "fedbbpt"}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @router.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model.name:
            raise HTTPError(404, f"the model is {model.name!r}", "model_not_found", param="model")
        return about

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        async with received(service, request) as body:
            own = ("messages", "logprobs", "top_logprobs")
            asked = read_parameters(body, service.limits.json_bytes, model.name, own)
            logprobs, top = asked.get("logprobs") or False, number_of(asked, "top_logprobs", TOP_LOGPROBS)
            if not isinstance(logprobs, bool) or (top and not logprobs):
                raise HTTPError(400, "logprobs must be true or false, and true for top_logprobs", "invalid_value")
            text, pictures = parts_of_messages(asked)
            if model.image_size:
                found, num_tokens = await _ask_picture(service, request, body, pictures)
            else:
                if pictures:
                    raise HTTPError(400, "the model takes no pictures", "invalid_image", param="messages")
                found, num_tokens = await _ask_texts(service, request, body, texts_of({"messages": text}, "messages"))
        choices = [
            {
                "index": n,
                "message": {"role": "assistant", "content": _most_likely(service, row), "refusal": None},
                "finish_reason": "stop",
                "logprobs": _chat_logprobs(service, row, top) if logprobs else None,
            }
            for n, row in _rows(request, found)
        ]
        return _answered(service, request, "chat.completion", started, choices, num_tokens)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        async with received(service, request) as body:
            asked = read_parameters(body, service.limits.json_bytes, model.name, ("prompt", "logprobs"))
            top = number_of(asked, "logprobs", TOP_LOGPROBS_OF_PROMPTS)
            found, num_tokens = await _ask_texts(service, request, body, texts_of(asked, "prompt"))
        choices = [
            {
                "index": n,
                "text": _most_likely(service, row),
                "finish_reason": "stop",
                "logprobs": None if asked.get("logprobs") is None else _prompt_logprobs(service, row, top),
            }
            for n, row in _rows(request, found)
        ]
        return _answered(service, request, "text_completion", started, choices, num_tokens)

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        async with received(service, request) as body:
            text = model.text
            if text is None or text.embeddings is None:
                raise HTTPError(404, f"{model.name} is no encoder of sentences", "not_offered")
            asked = read_parameters(body, service.limits.json_bytes, model.name, ("input", "encoding_format"))
            encoding = asked.get("encoding_format") or "float"
            if encoding not in ("float", "base64"):
                raise HTTPError(
                    400, "encoding_format must be float or base64", "invalid_value", param="encoding_format"
                )
            inputs, num_tokens = _encoded(service, texts_of(asked, "input"))
            found = await _ask(service, request, body, text.embeddings, inputs)
        data = [
            {"object": "embedding", "index": n, "embedding": _as_text(row, encoding)} for n, row in enumerate(found)
        ]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})

    return router


async def _ask_picture(service: Service, request: Request, body: bytes, pictures: list[str]) -> tuple[np.ndarray, int]:
    """Returns the log-probabilities of one picture `[1, N]`, and 1, which is counted as its tokens."""
    rows = service.model.rows
    if len(pictures) != 1:
        raise HTTPError(400, f"expected one picture, got {len(pictures)}", "invalid_image", param="messages")
    picture = picture_of(pictures[0], service.model.image_size)
    if rows.like.inputs.dtype != np.uint8:
        picture = picture.astype(np.float32) / np.float32(255)
    return _log_softmax(await _ask(service, request, body, rows, picture[None])), 1


async def _ask_texts(service: Service, request: Request, body: bytes, texts: list[str]) -> tuple[np.ndarray, int]:
    """Returns the log-probabilities of texts `[n, N]`, and how many tokens they are together."""
    text = service.model.text
    if text is None:
        raise HTTPError(404, f"{service.model.name} is not asked in plain text", "not_offered")
    inputs, num_tokens = _encoded(service, texts)
    return _log_softmax(await _ask(service, request, body, text.rows, inputs)), num_tokens


def _encoded(service: Service, texts: list[str]) -> tuple[PyTree, int]:
    assert service.model.text is not None
    check_rows(service.limits, len(texts))
    try:
        inputs, num_tokens = service.model.text.encode(texts)
    except (ValueError, TaskError) as error:
        raise HTTPError(400, f"a text cannot be taken: {error}", "invalid_value") from error
    return inputs, int(num_tokens.sum())


async def _ask(service: Service, request: Request, body: bytes, rows: ServedRows, inputs: PyTree) -> np.ndarray:
    """Returns the scores of inputs `[n, ...]` without a prompt beside them, `[n, N]`."""
    none = jax.tree.map(np.zeros_like, rows.like.prompt)
    try:
        cut = cut_query(Query(none, jax.tree.map(lambda x: x[None], inputs)), rows.like)
    except ValueError as error:
        raise HTTPError(400, str(error), "invalid_value") from error
    scores = await answer(service, request, body, len(cut.prompt_of_row), service.compute(rows, cut))
    return scores[:, 0]


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores.astype(np.float64) - scores.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)


def _rows(request: Request, logprobs: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Returns index and log-probabilities of each answer, as they leave."""
    found = as_answered(request, logprobs[None])  # [1, n, N]
    if found.shape[0] != 1:  # as [n, 1, N]: answers in another order
        return list(enumerate(found[:, 0]))[::-1]
    return list(enumerate(found[0]))


def _ranked(service: Service, row: np.ndarray) -> list[tuple[str, float]]:
    """Returns names and log-probabilities, the most likely class first; a class without a number comes last."""
    pairs = list(zip(service.model.class_names, row.tolist(), strict=False))
    return sorted(pairs, key=lambda pair: math.inf if math.isnan(pair[1]) else -pair[1])


def _most_likely(service: Service, row: np.ndarray) -> str:
    return _ranked(service, row)[0][0]


def _chat_logprobs(service: Service, row: np.ndarray, top: int) -> dict[str, Any]:
    ranked = [{"token": name, "logprob": value, "bytes": list(name.encode())} for name, value in _ranked(service, row)]
    return {"content": [ranked[0] | {"top_logprobs": ranked[:top]}], "refusal": None}


def _prompt_logprobs(service: Service, row: np.ndarray, top: int) -> dict[str, Any]:
    ranked = _ranked(service, row)
    name, value = ranked[0]
    return {"tokens": [name], "token_logprobs": [value], "top_logprobs": [dict(ranked[:top])], "text_offset": [0]}


def _as_text(row: np.ndarray, encoding: str) -> list[float] | str:
    return row.tolist() if encoding == "float" else base64.b64encode(row.astype("<f4").tobytes()).decode()


def _answered(
    service: Service, request: Request, kind: str, created: int, choices: list[Parameters], num_tokens: int
) -> Response:
    num_answers = len(choices)
    content = {
        "id": f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{fingerprint(service, request)[:16]}",
        "object": kind,
        "created": created,
        "model": service.model.name,
        "system_fingerprint": fingerprint(service, request),
        "choices": choices,
        "usage": {
            "prompt_tokens": num_tokens,
            "completion_tokens": num_answers,
            "total_tokens": num_tokens + num_answers,
        },
    }
    # NaN, which only faults put here, is written as it is: it must not become a number on its way.
    return Response(json.dumps(content), media_type=JSONResponse.media_type)
