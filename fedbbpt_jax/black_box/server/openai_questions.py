"""What is asked on OpenAI's routes: the parameters of a request, and the pictures and texts in it."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from typing import Any

import numpy as np
from PIL import Image

from fedbbpt_jax.black_box.server.http_errors import HTTPError

Parameters = dict[str, Any]

_LIKE_GREEDY = {
    "n": (1,),
    "best_of": (1,),
    "temperature": (0,),
    "stream": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "top_p": (1,),
}
"""Parameters that are taken with the values that change nothing: the answer is the most likely class."""
_IGNORED = ("model", "seed", "user")
_NEVER_SHORTER = ("max_tokens", "max_completion_tokens")


def read_parameters(body: bytes, max_json: int, model: str, own: tuple[str, ...]) -> Parameters:
    """Returns the parameters of a request.

    Args:
      body: JSON.
      max_json: most bytes.
      model: the name of what is served.
      own: parameters that the route itself understands.

    Raises:
      HTTPError: it is no JSON, asks another model, or has a parameter that is not offered.
    """
    if len(body) > max_json:
        raise HTTPError(413, f"JSON must be at most {max_json} bytes", "body_too_large")
    try:
        parameters = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPError(400, "the body is no JSON", "invalid_json") from error
    if not isinstance(parameters, dict):
        raise HTTPError(400, "the body is no object of JSON", "invalid_json")
    if parameters.get("model") != model:
        raise HTTPError(404, f"the model is {model!r}", "model_not_found", param="model")
    for name, value in parameters.items():
        if name in own or name in _IGNORED or value is None:
            continue
        if name in _NEVER_SHORTER and type(value) is int and value >= 1:
            continue
        if name not in _LIKE_GREEDY:
            raise HTTPError(400, f"not offered: {name[:100]}", "unsupported_parameter", param=name[:100])
        if value not in _LIKE_GREEDY[name]:
            (only,) = _LIKE_GREEDY[name]
            raise HTTPError(400, f"{name} can only be {json.dumps(only)}", "unsupported_value", param=name)
    return parameters


def number_of(parameters: Parameters, name: str, most: int) -> int:
    """Returns a whole number of a request, 0 if it is left out.

    Raises:
      HTTPError: it is none, or too large.
    """
    value = parameters.get(name)
    if value is None or value is False:
        return 0
    if type(value) is not int or not 0 <= value <= most:
        raise HTTPError(400, f"{name} must be a whole number between 0 and {most}", "invalid_value", param=name)
    return value


def texts_of(parameters: Parameters, name: str) -> list[str]:
    """Returns the text or the texts of a request.

    Raises:
      HTTPError: there is none, or it is something else, such as token ids.
    """
    value = parameters.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise HTTPError(
            400, f"{name} must be a text, or a list of texts, that are not empty", "invalid_value", param=name
        )
    return texts


def parts_of_messages(parameters: Parameters) -> tuple[str, list[str]]:
    """Returns the text of a chat, its parts in lines, and the addresses of its pictures.

    Raises:
      HTTPError: the messages are not of OpenAI's form, or hold something else.
    """

    def wrong(what: str) -> HTTPError:
        return HTTPError(400, what, "invalid_value", param="messages")

    messages = parameters.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages must be a list that is not empty")
    texts, pictures = [], []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user"):
            raise wrong("a message must have the role system, developer or user")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise wrong("the content of a message must be a text or a list of parts")
        for part in parts:
            image, text = part.get("image_url"), part.get("text")
            if part.get("type") == "text" and isinstance(text, str):
                texts.append(text)
            elif part.get("type") == "image_url" and isinstance(image, dict) and isinstance(image.get("url"), str):
                pictures.append(image["url"])
            else:
                raise wrong("a part of a message must be a text or an image_url")
    return "\n".join(texts), pictures


def picture_of(url: str, size: int) -> np.ndarray:
    """Returns the picture in a data URI, uint8 `[H, W, 3]`. Nothing is fetched, and nothing resized.

    Raises:
      HTTPError: it is another address, no PNG, JPEG or WebP, or not of the model's size.
    """

    def wrong(what: str) -> HTTPError:
        return HTTPError(400, what, "invalid_image", param="messages")

    head = re.match(r"data:image/(png|jpeg|webp);base64,", url)
    if head is None:
        raise wrong("a picture must be a data URI (data:image/png;base64,...): no address is fetched")
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.size != (size, size):
                raise wrong(f"a picture must be {size}x{size} pixels, as the model sees it, got {image.size}")
            return np.asarray(image.convert("RGB"))
    except (binascii.Error, OSError, ValueError, SyntaxError, *_BOMBS) as error:
        raise wrong("a picture is damaged, or no PNG, JPEG or WebP") from error


_BOMBS = Image.DecompressionBombError, Image.DecompressionBombWarning
