"""The Open Inference Protocol V2, with binary tensors both ways: prompts and inputs without loss."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from fedbbpt_jax.black_box.protocol import HEAD_LENGTH, Tensors, decode, encode, named_leaves, tree_like
from fedbbpt_jax.black_box.rows import Cut, cut_query
from fedbbpt_jax.black_box.server.http_errors import HTTPError
from fedbbpt_jax.black_box.server.limits import Limits
from fedbbpt_jax.black_box.server.served_model import ServedModel, ServedRows, max_length, tensor_specs
from fedbbpt_jax.black_box.server.service import (
    Service,
    answer,
    as_answered,
    check_rows,
    fingerprint,
    received,
)
from fedbbpt_jax.errors import ResponseFormatError
from fedbbpt_jax.types import Query

MODEL_VERSION = "1"
OUTPUT = "scores"


class Asked(NamedTuple):
    """One request: rows of which kind, how many prompts on how many examples, its id, whether scores are binary."""

    rows: ServedRows
    cut: Cut
    num_prompts: int
    num_examples: int
    id: str | None
    binary: bool


def v2_routes(service: Service) -> APIRouter:
    """Returns the routes below /v2."""
    router, model = APIRouter(), service.model

    def check(name: str, model_version: str | None) -> None:
        if name != model.name or model_version not in (None, MODEL_VERSION):
            wanted = name if model_version is None else f"{name} of version {model_version}"
            raise HTTPError(404, f"there is no model {wanted}, but {model.name}", "model_not_found", param="model")

    @router.get("/v2")
    @router.get("/v2/", include_in_schema=False)
    async def server_metadata() -> dict[str, Any]:
        return {"name": "fedbbpt", "version": version("fedbbpt_jax"), "extensions": ["binary_tensor_data"]}

    @router.get("/v2/health/live")
    async def live() -> dict[str, Any]:
        return {"live": True}

    @router.get("/v2/health/ready")
    async def ready() -> dict[str, Any]:
        return {"ready": True}

    @router.get("/v2/models/{name}")
    @router.get("/v2/models/{name}/versions/{model_version}", include_in_schema=False)
    async def model_metadata(name: str, request: Request, model_version: str | None = None) -> dict[str, Any]:
        check(name, model_version)
        scores = {"name": OUTPUT, "datatype": "FP32", "shape": [-1, -1, model.rows.num_classes]}
        about = {"system_fingerprint": fingerprint(service, request), "class_names": list(model.class_names)}
        about |= {"num_rows": model.rows.num_rows, "max_rows": service.limits.rows}
        about |= {} if max_length(model.rows) is None else {"max_length": max_length(model.rows)}
        return {
            "name": model.name,
            "versions": [MODEL_VERSION],
            "platform": "jax",
            "inputs": tensor_specs(model),
            "outputs": [scores],
            "parameters": about,
        }

    @router.get("/v2/models/{name}/ready")
    @router.get("/v2/models/{name}/versions/{model_version}/ready", include_in_schema=False)
    async def model_ready(name: str, model_version: str | None = None) -> dict[str, Any]:
        check(name, model_version)
        return {"name": name, "ready": True}

    @router.post("/v2/models/{name}/infer")
    @router.post("/v2/models/{name}/versions/{model_version}/infer", include_in_schema=False)
    async def infer(name: str, request: Request, model_version: str | None = None) -> Response:
        check(name, model_version)
        async with received(service, request) as body:
            asked = parse(body, request.headers.get(HEAD_LENGTH), model, service.limits)
            num_requests = asked.num_prompts * asked.num_examples
            compute = service.compute(asked.rows, asked.cut)
            scores = await answer(service, request, body, num_requests, compute)
        scores = scores.reshape(asked.num_prompts, -1, model.rows.num_classes)[:, : asked.num_examples]
        about = {"system_fingerprint": fingerprint(service, request), "num_requests": num_requests}
        return _response(model.name, asked, as_answered(request, scores), about)

    return router


def parse(body: bytes, head_length: str | None, model: ServedModel, limits: Limits) -> Asked:
    """Returns what a request asks: prompts `[K, ...]` or `[K, B, ...]`, and inputs `[B, ...]`.

    Raises:
      HTTPError: it is not what the protocol says, or not what the model takes.
    """
    if head_length is not None and not (head_length.isascii() and head_length.isdecimal() and len(head_length) < 12):
        raise HTTPError(400, f"{HEAD_LENGTH} must be a number of bytes, got {head_length!r}", "invalid_request")
    length = None if head_length is None else int(head_length)
    if (len(body) if length is None else length) > limits.json_bytes:
        raise HTTPError(413, f"JSON must be at most {limits.json_bytes} bytes: send binary tensors", "body_too_large")
    try:
        tensors, head = decode("inputs", body, length)
        rows = _rows_for(model, tensors)
        like = rows.like
        query = Query(tree_like("prompt", like.prompt, tensors), tree_like("inputs", like.inputs, tensors))
        known = named_leaves("prompt", like.prompt).keys() | named_leaves("inputs", like.inputs).keys()
        if unknown := tensors.keys() - known:
            raise ResponseFormatError(f"expected no tensors but {', '.join(sorted(known))}, got {sorted(unknown)}")
        for name, tensor in tensors.items():
            if 0 in (tensor.shape or (0,)) and (rows is not model.bare or name != "prompt"):
                raise ResponseFormatError(f"tensor {name!r} is empty: {list(tensor.shape)}")
            if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
                raise ResponseFormatError(f"tensor {name!r} has numbers that are not finite")
        num_prompts, num_examples = (len(jax.tree.leaves(part)[0]) for part in query)
        check_rows(limits, num_prompts * num_examples)  # before anything as large is made
        cut = cut_query(Query(*jax.tree.map(lambda x: x[None], tuple(query))), like)
    except (ResponseFormatError, ValueError) as error:
        raise HTTPError(400, str(error), "invalid_request") from error
    own = head.get("id")
    if own is not None and (not isinstance(own, str) or len(own) > 256):
        raise HTTPError(400, "an id is a text of at most 256 characters", "invalid_request", param="id")
    return Asked(rows, cut, num_prompts, num_examples, own, _wants_binary(head))


def _rows_for(model: ServedModel, tensors: Tensors) -> ServedRows:
    """Returns the kind of rows that a request is of: those without a prompt's words where it has none."""
    has_words = "prompt" not in tensors or tensors["prompt"].shape[1:] != (0,)
    return model.rows if has_words or model.bare is None else model.bare


def _wants_binary(head: dict[str, Any]) -> bool:
    """Returns whether the scores are wanted in binary.

    Raises:
      HTTPError: other outputs are wanted, or something that is not offered.
    """
    outputs, parameters = head.get("outputs"), head.get("parameters")
    default = bool(parameters.get("binary_data_output")) if isinstance(parameters, dict) else False
    if outputs is None or outputs == []:
        return default
    one = outputs[0] if isinstance(outputs, list) and len(outputs) == 1 else None
    if not isinstance(one, dict) or one.get("name") != OUTPUT:
        raise HTTPError(400, f"the only output is {OUTPUT!r}", "invalid_request", param="outputs")
    parameters = one.get("parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    if unknown := parameters.keys() - {"binary_data"}:
        raise HTTPError(400, f"not offered for an output: {', '.join(sorted(unknown))}", "unsupported_parameter")
    return bool(parameters.get("binary_data", default))


def _response(name: str, asked: Asked, scores: np.ndarray, about: dict[str, Any]) -> Response:
    head: dict[str, Any] = {"model_name": name, "model_version": MODEL_VERSION, "parameters": about}
    head |= {} if asked.id is None else {"id": asked.id}
    scores = np.ascontiguousarray(scores, np.float32)
    if asked.binary:
        content, length = encode("outputs", {OUTPUT: scores}, head)
        return Response(content, media_type="application/octet-stream", headers={HEAD_LENGTH: str(length)})
    output = {"name": OUTPUT, "datatype": "FP32", "shape": scores.shape, "data": scores.ravel().tolist()}
    # NaN, which is no JSON, is written as it is: it must not become a number on its way.
    return Response(json.dumps(head | {"outputs": [output]}), media_type=JSONResponse.media_type)
