from types import SimpleNamespace

import pytest

from fedbbpt_jax.data.text_templates import check_template, render
from fedbbpt_jax.errors import TaskError

TOKENIZER = SimpleNamespace(mask_token="<mask>", sep_token="</s>")


@pytest.mark.parametrize(
    ("template", "texts", "expected"),
    [
        ("{0} It was [MASK].", ("A film.",), "A film. It was <mask>."),
        ("{0}[SEP]{1}? [MASK],", ("One", "Two"), "One</s>Two? <mask>,"),
        ("[ Category: [MASK] ] {0}", ("x",), "[ Category: <mask> ] x"),
        ("{1}: [MASK] {0}", ("x", "y"), "y: <mask> x"),
        ("{0} It was [MASK].", ("{0} {1} [MASK] [SEP] {",), "{0} {1} [MASK] [SEP] { It was <mask>."),
    ],
)
def test_places_are_filled_and_texts_are_left_as_they_are(template, texts, expected):
    assert check_template(template, len(texts)) == template
    assert render(template, texts, TOKENIZER) == expected


@pytest.mark.parametrize(
    ("template", "num_texts"),
    [
        ("{0}", 1),
        ("[MASK]", 1),
        ("{0} [MASK] [MASK]", 1),
        ("{0} {0} [MASK]", 1),
        ("{0} [MASK]", 2),
        ("{0} {1} [MASK]", 1),
        ("{} [MASK]", 1),
        ("{0} {x} [MASK]", 1),
        ("{0} [mask]", 1),
        ("{0} {1} {2} [MASK]", 2),
        ("{0} [MASK] }", 1),
    ],
)
def test_templates_that_do_not_suit(template, num_texts):
    with pytest.raises(
        TaskError, match=rf"a template for {num_texts} of texts needs \{{0\}}.* and \[MASK\], each once"
    ):
        check_template(template, num_texts)
