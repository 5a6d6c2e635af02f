"""Templates that turn one or two texts into the text that a masked language model is asked."""

from __future__ import annotations

import re
from typing import Any

from fedbbpt_jax.data.text_rows import Texts
from fedbbpt_jax.errors import TaskError

PLACES = re.compile(r"(\{0\}|\{1\}|\[MASK\]|\[SEP\])")


def check_template(template: str, num_texts: int) -> str:
    """Returns the template.

    Args:
      template: such as "{0} It was [MASK]." for one text, or "{0}[SEP]{1}? [MASK]," for two.
      num_texts: how many texts an example has.

    Raises:
      TaskError: it has not one place for the mask and for each text, or other braces.
    """
    parts, others = PLACES.findall(template), PLACES.sub("", template)
    wanted = [f"{{{index}}}" for index in range(num_texts)]
    if sorted(part for part in parts if part != "[SEP]") != sorted([*wanted, "[MASK]"]) or set("{}") & set(others):
        raise TaskError(
            f"a template for {num_texts} of texts needs {', '.join(wanted)} and [MASK], each once, and no other "
            f"braces; got {template!r}"
        )
    return template


def render(template: str, texts: Texts, tokenizer: Any) -> str:
    """Returns the template with the texts and the tokenizer's own tokens in their places.

    What stands in a text is left as it is, even if it looks like a place.

    Example:
      >>> from types import SimpleNamespace
      >>> render("{0} It was [MASK].", ("A [MASK] film.",), SimpleNamespace(mask_token="<mask>", sep_token="</s>"))
      'A [MASK] film. It was <mask>.'
    """
    filling = {"[MASK]": tokenizer.mask_token, "[SEP]": tokenizer.sep_token}
    filling |= {f"{{{index}}}": text for index, text in enumerate(texts)}
    return "".join(filling.get(part, part) for part in PLACES.split(template))
