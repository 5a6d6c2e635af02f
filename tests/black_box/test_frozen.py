"""Frozen classifiers as functions of queries, their precision, and the wall."""

import copy
import dataclasses
import functools
import pickle
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from transformers import CLIPConfig, RobertaConfig

from fedbbpt_jax.black_box.frozen import clip_classifier, frozen, masked_lm_classifier, query_only
from fedbbpt_jax.models.classifiers import MaskedText
from fedbbpt_jax.models.clip import CLIP
from fedbbpt_jax.models.loading import PretrainedCLIP, PretrainedText, load_clip
from fedbbpt_jax.models.roberta import RobertaForMaskedLM
from fedbbpt_jax.pretrained import MINI_CLIP
from fedbbpt_jax.types import Query, Response

C, K, B, P, E, SIZE = 2, 3, 4, 3, 32, 16
PIXELS = {"image_size": SIZE, "patch_size": 8}
LABEL_WORDS, MASK = (" bad", " good"), 4
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ATOL = 5e-5  # float32, of scores up to 20


@jax.jit
def ask(box, query):
    return box(query)


def random_network(network, config):
    """Returns structure and parameters of a network of random numbers."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)), nnx.to_pure_dict(abstract))


def tiny_clip() -> PretrainedCLIP:
    """A random CLIP of one layer, with the texts of the shipped one."""
    text = CLIPConfig.from_pretrained(MINI_CLIP).text_config.to_dict() | {"num_hidden_layers": 1}
    vision = {"hidden_size": E, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = CLIPConfig(text_config=text, vision_config=vision | PIXELS, projection_dim=96)
    shipped = load_clip(MINI_CLIP)
    graphdef, params = random_network(CLIP, config)
    return shipped._replace(graphdef=graphdef, params=params, pixels=shipped.pixels._replace(size=SIZE))


def tiny_masked_lm() -> PretrainedText:
    """A random RoBERTa of one layer and 50 words; its tokeniser knows two."""
    config = RobertaConfig(
        vocab_size=50, hidden_size=E, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=20, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    tokenizer = SimpleNamespace(
        mask_token_id=MASK, encode=lambda word, add_special_tokens: [10 + LABEL_WORDS.index(word)]
    )
    return PretrainedText(*random_network(RobertaForMaskedLM, config), tokenizer)


@functools.cache
def pretrained(kind):
    return tiny_clip() if kind == "image" else tiny_masked_lm()


@functools.cache
def make(kind, precision="highest"):
    if kind == "image":
        return clip_classifier(pretrained(kind), CLASSES, ("the digit {}", "{} the digit"), precision)
    return masked_lm_classifier(pretrained(kind), LABEL_WORDS, precision)


def make_query(kind, *, per_example=False):
    """Returns a query with as many prompts as candidates, or also as examples."""
    rng = np.random.default_rng(0)
    axes = (C, K, B) if per_example else (C, K)
    if kind == "image":
        prompt = rng.normal(0, 0.1, (*axes, SIZE, SIZE, 3)).astype(np.float32)
        return Query(prompt, rng.random((C, B, SIZE, SIZE, 3)).astype(np.float32))
    ids = rng.integers(5, 50, (C, B, 9)).astype(np.int32)
    ids[..., 0], ids[..., 3] = 0, MASK
    attended = np.arange(9) < np.array([9, 5, 7, 6])[:, None] * np.ones((C, B, 1), int)
    texts = MaskedText(np.where(attended, ids, 1), attended)
    if kind == "words":
        return Query(rng.integers(5, 50, (*axes, P)).astype(np.int32), texts)
    return Query(rng.normal(size=(*axes, P, E)).astype(np.float32), texts)


@pytest.fixture(scope="module", params=["image", "words", "embeddings"])
def asked(request):
    """A classifier, a query of each kind and the response."""
    kind = request.param
    classifier, query = make(kind), make_query(kind)
    return SimpleNamespace(kind=kind, classifier=classifier, query=query, response=ask(classifier, query))


@pytest.fixture(scope="module")
def image():
    classifier, query = make("image"), make_query("image")
    return SimpleNamespace(classifier=classifier, box=query_only(classifier), query=query)


def at(query, c, k, b):
    """Returns the query of one example under one prompt."""
    return Query(query.prompt[c : c + 1, k : k + 1], jax.tree.map(lambda x: x[c : c + 1, b : b + 1], query.inputs))


# Answers


def test_a_response_has_a_row_of_scores_for_each_prompt_and_example(asked):
    scores, valid = asked.response
    assert scores.shape == (C, K, B, 10 if asked.kind == "image" else 2)
    assert scores.dtype == jnp.float32
    assert valid.shape == (C, K, B)
    assert valid.dtype == bool
    assert valid.all()
    assert np.unique(scores.reshape(-1, scores.shape[-1]), axis=0).shape[0] == C * K * B  # none is another's


def test_answers_do_not_depend_on_the_other_prompts_and_examples(asked):
    for c, k, b in [(0, 0, 0), (1, 2, 3), (0, 2, 1)]:
        alone = ask(asked.classifier, at(asked.query, c, k, b)).scores[0, 0, 0]
        np.testing.assert_allclose(alone, asked.response.scores[c, k, b], atol=ATOL)


def test_a_prompt_may_depend_on_the_example(asked):
    """Given for each example, the same prompts get the same answers; others get those that they get alone."""
    same = np.stack([asked.query.prompt] * B, axis=2)
    per_example = ask(asked.classifier, asked.query._replace(prompt=same))
    np.testing.assert_allclose(per_example.scores, asked.response.scores, atol=ATOL)
    different = make_query(asked.kind, per_example=True)
    scores = ask(asked.classifier, different).scores
    for c, k, b in [(0, 0, 0), (1, 2, 3)]:
        one = at(different, c, k, b)._replace(prompt=different.prompt[c : c + 1, k : k + 1, b])
        np.testing.assert_allclose(ask(asked.classifier, one).scores[0, 0, 0], scores[c, k, b], atol=ATOL)


def test_images_may_be_bytes(image):
    pixels = np.random.default_rng(1).integers(0, 256, (C, B, SIZE, SIZE, 3), np.uint8)
    as_bytes = ask(image.classifier, image.query._replace(inputs=pixels)).scores
    fractions = pixels.astype(np.float32) / 255
    np.testing.assert_allclose(
        as_bytes, ask(image.classifier, image.query._replace(inputs=fractions)).scores, atol=ATOL
    )


def test_prompted_pixels_are_clipped(image):
    """A prompt beyond the range of pixels whitens the image, whatever stood there."""
    query = image.query._replace(prompt=np.full_like(image.query.prompt, 2.0))
    scores = ask(image.classifier, query).scores
    np.testing.assert_allclose(scores, np.broadcast_to(scores[0, 0, 0], scores.shape), atol=ATOL)


def test_a_score_that_is_not_finite_is_not_valid(asked):
    if asked.kind == "words":
        pytest.skip("token ids are always finite")
    prompt = asked.query.prompt.copy()
    prompt[0, 1] = np.nan
    valid = ask(asked.classifier, asked.query._replace(prompt=prompt)).valid
    expected = np.ones((C, K, B), bool)
    expected[0, 1] = False
    np.testing.assert_array_equal(valid, expected)


def test_weights_enter_a_compiled_program_as_arguments(image):
    """As constants they would be written into its text, 8 digits for each number."""
    lowered = ask.lower(image.box, image.query)
    assert sum(leaf.size for leaf in jax.tree.leaves(image.box)) > 10_000
    assert len(lowered.as_text()) < 80_000
    assert len(jax.tree.leaves(image.box)) > 20


# Precision


@pytest.mark.parametrize("kind", ["image", "embeddings"])
def test_bfloat16_casts_the_kernels_of_the_trunk_only(kind):
    params = traverse_util.flatten_dict(make(kind, "bfloat16").params)
    cast = {path for path, leaf in params.items() if leaf.dtype == jnp.bfloat16}
    assert cast == {path for path in params if path[0] == "trunk" and path[-1] == "kernel"}
    assert len(cast) >= 6
    assert {leaf.dtype for path, leaf in params.items() if path not in cast} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", ["image", "embeddings"])
def test_bfloat16_scores_are_rounded_ones(kind):
    """Relative to the size of the scores: a kernel's rounding, 2^-9, times what a few layers make of it."""
    exact, rounded = (ask(make(kind, precision), make_query(kind)) for precision in ("highest", "bfloat16"))
    assert rounded.scores.dtype == jnp.float32
    assert rounded.valid.all()
    error = np.abs(rounded.scores - exact.scores)
    scale = np.abs(exact.scores).max()
    assert 2**-14 * scale < np.sqrt((error**2).mean()) < 2**-6 * scale
    assert error.max() < 2**-4 * scale


@pytest.mark.parametrize("kind", ["image", "words"])
def test_the_default_of_a_cpu_is_exact(kind):
    if jax.default_backend() != "cpu":
        pytest.skip("the default of accelerators rounds")
    exact, default = (ask(make(kind, precision), make_query(kind)).scores for precision in ("highest", "default"))
    np.testing.assert_allclose(default, exact, atol=ATOL)


def products(kind, precision):
    """Returns the matrix products of a program: (type of the operands, precision asked for), in order."""
    text = ask.lower(make(kind, precision), make_query(kind)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    wanted = [(re.search(r"precision = \[(\w+), \w+\]", line) or ["", "DEFAULT"])[1] for line in lines]
    operands = [re.search(r": \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", line).groups() for line in lines]
    assert all(left == right for left, right in operands)
    return [(left, precision) for (left, _), precision in zip(operands, wanted, strict=True)]


@pytest.mark.parametrize(("kind", "head"), [("image", 2), ("embeddings", 2)])
def test_each_matrix_product_asks_for_its_precision(kind, head):
    """What a graphics processor is asked for can be read on any machine. The last two products are the head's."""
    for precision, trunk in {
        "highest": {("f32", "HIGHEST")},
        "default": {("f32", "DEFAULT")},
        "bfloat16": {("bf16", "DEFAULT")},
    }.items():
        found = products(kind, precision)
        assert set(found[:-head]) == trunk
        assert found[-head:] == [("f32", "HIGHEST")] * head


def test_a_surrounding_precision_changes_nothing():
    expected = products("image", "highest")
    with jax.default_matmul_precision("bfloat16"):
        assert products("image", "highest") == expected


# The wall


@pytest.fixture(scope="module", params=["image", "embeddings"])
def behind(request):
    """A box and what must not leave it: the values of its weights."""
    classifier, query = make(request.param), make_query(request.param)
    weights = [np.asarray(leaf) for leaf in jax.tree.leaves(classifier)]
    return SimpleNamespace(classifier=classifier, box=query_only(classifier), query=query, weights=weights)


def loss_of(box, query):
    """Returns the sum of scores as a function of how strong the prompt is."""
    return lambda strength: box(query._replace(prompt=strength * query.prompt)).scores.sum()


def test_the_wall_does_not_change_answers(behind):
    behind_wall, before = ask(behind.box, behind.query), ask(behind.classifier, behind.query)
    assert isinstance(behind_wall, Response)
    jax.tree.map(np.testing.assert_array_equal, behind_wall, before)


@pytest.mark.parametrize(
    "derive",
    [
        jax.grad,
        jax.value_and_grad,
        jax.jacfwd,
        jax.jacrev,
        jax.hessian,
        lambda f: lambda x: jax.vjp(f, x),
        lambda f: lambda x: jax.jvp(f, (x,), (x,)),
        lambda f: lambda x: jax.linearize(f, x),
        lambda f: jax.grad(jax.checkpoint(f)),
        lambda f: jax.grad(lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])).sum()),
        lambda f: jax.grad(lambda x: jax.lax.scan(lambda s, _: (s + f(x), None), 0.0, None, length=1)[0]),
    ],
    ids=[
        "grad",
        "value_and_grad",
        "jacfwd",
        "jacrev",
        "hessian",
        "vjp",
        "jvp",
        "linearize",
        "checkpoint",
        "vmap",
        "scan",
    ],
)
@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_has_no_gradient(image, derive, wrapped):
    loss = loss_of(image.box, image.query)
    with pytest.raises(TypeError, match="queries only"):
        wrapped(derive(loss))(1.0)


def test_has_no_gradient_for_its_inputs_nor_for_its_weights(behind):
    with pytest.raises(TypeError, match="queries only"):
        jax.grad(lambda box: box(behind.query).scores.sum(), allow_int=True)(behind.box)
    with pytest.raises(TypeError, match="queries only"):
        jax.grad(lambda query: behind.box(query).scores.sum(), allow_int=True)(jax.tree.map(jnp.asarray, behind.query))


def test_it_is_the_wall_that_refuses():
    """The classifier itself, which white-box baselines get, can be differentiated."""
    gradient = jax.jit(jax.grad(loss_of(make("embeddings"), make_query("embeddings"))))(1.0)
    assert np.isfinite(gradient)
    assert gradient != 0


def test_a_box_has_no_public_name(behind):
    assert [name for name in dir(behind.box) if not name.startswith("_")] == []


def test_a_box_shows_nothing_of_itself(behind):
    """No number stands in what it prints, nor in the error of whoever changes it."""
    assert repr(behind.box) == str(behind.box) == f"{behind.box}" == "QueryOnly()"
    for change in (lambda: setattr(behind.box, "weights", 1), lambda: delattr(behind.box, "weights")):
        with pytest.raises(AttributeError) as error:
            change()
        assert not re.search(r"\d", str(error.value))


@pytest.mark.parametrize(
    "take", [iter, len, list, dict, lambda box: box[0], lambda box: box["params"], lambda box: box.params, np.float32]
)
def test_a_box_is_no_container(behind, take):
    with pytest.raises((TypeError, AttributeError)):
        take(behind.box)


def test_an_answer_is_no_weight(behind):
    """Its two arrays are scores and validity, of the query's axes; no weight has their shape and values."""
    response = ask(behind.box, behind.query)
    assert response._fields == ("scores", "valid")
    for answer in response:
        assert isinstance(answer, jax.Array)
        assert answer.shape[:3] == (C, K, B)
        assert not any(answer.shape == weight.shape for weight in behind.weights)


@pytest.mark.parametrize("take", [dataclasses.asdict, dataclasses.astuple, dataclasses.fields, vars, pickle.dumps])
def test_no_function_of_the_language_takes_the_weights_out(behind, take):
    with pytest.raises(TypeError):
        take(behind.box)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_is_the_box(behind, duplicate):
    assert duplicate(behind.box) is behind.box


def test_boxes_are_told_apart_without_looking_inside(behind):
    """Equality of weights would be an answer too."""
    twin = query_only(behind.classifier)
    assert behind.box == behind.box
    assert behind.box != twin
    assert len({behind.box, twin}) == 2


def test_a_box_remains_one_in_a_pytree(behind):
    """As transformations pass it on; nothing but the leaves, which `jit` needs, comes out."""
    twin = jax.tree.map(lambda leaf: leaf, behind.box)
    assert repr(twin) == "QueryOnly()"
    assert not re.search(r"\d\.\d", str(jax.tree.structure(behind.box)))
    with pytest.raises(TypeError, match="queries only"):
        jax.grad(loss_of(twin, behind.query))(1.0)


IMAGES, PROMPT = np.zeros((1, 2, SIZE, SIZE, 3), np.float32), np.zeros((1, 1, SIZE, SIZE, 3), np.float32)
TEXTS, SOFT = MaskedText(np.full((1, 2, 9), 5), np.ones((1, 2, 9), bool)), np.zeros((1, 1, P, E), np.float32)


@pytest.mark.parametrize(
    ("kind", "query"),
    [
        ("image", None),
        ("image", ()),
        ("image", PROMPT),
        ("image", Query(None, None)),
        ("image", Query(PROMPT, None)),
        ("image", Query(None, IMAGES)),
        ("image", Query({"prompt": PROMPT}, IMAGES)),
        ("image", Query("white", IMAGES)),
        ("image", Query(PROMPT, "digits")),
        ("image", Query(PROMPT[0, 0], IMAGES)),
        ("image", Query(PROMPT[..., :8, :], IMAGES)),
        ("image", Query(PROMPT, IMAGES[0])),
        ("image", Query(PROMPT, np.zeros((1, 2, 8, 8, 3), np.float32))),
        ("image", Query(PROMPT[..., :8, :8, :], np.zeros((1, 2, 8, 8, 3), np.float32))),
        ("image", Query(np.zeros((1, 1, 32, 32, 3), np.float32), np.zeros((1, 2, 32, 32, 3), np.float32))),
        ("image", Query(PROMPT, TEXTS)),
        ("text", Query(PROMPT, IMAGES)),
        ("text", Query(SOFT, IMAGES)),
        ("text", Query(SOFT, TEXTS.ids)),
        ("text", Query(SOFT, TEXTS._replace(attended=None))),
        ("text", Query(SOFT, TEXTS._replace(attended=np.ones((1, 2, 8), bool)))),
        ("text", Query(SOFT[..., : E - 1], TEXTS)),
        ("text", Query(np.zeros((1, 1, 12, E), np.float32), TEXTS)),
    ],
)
def test_the_error_of_a_wrong_query_holds_no_weight(kind, query):
    """Texts of errors, and what they carry, are shapes and types; weights would be numbers with a point."""
    box = query_only(make(kind))
    with pytest.raises((TypeError, ValueError, AttributeError, IndexError)) as error:
        ask(box, query)
    carried = error.value.args, vars(error.value)
    assert all(isinstance(part, str) for part in jax.tree.leaves(carried))
    assert not re.search(r"\d\.\d", str(error.value))


def test_a_query_has_room_for_a_prompt_and_inputs_only():
    """No labels, no parameters, no keys."""
    assert Query._fields == ("prompt", "inputs")


@pytest.mark.parametrize("shape", [(2, 1, 4, 4, 3), (1, 1, 3, 4, 4, 3), (2, 1, 2, 4, 4, 3)])
def test_a_prompt_for_other_clients_or_examples_is_refused(shape):
    """Inputs of one client and two examples; nothing is broadcast by chance."""
    box = query_only(frozen(Summed()))
    with pytest.raises(ValueError, match=r"for 1 clients and 2 examples"):
        box(Query(jnp.zeros(shape), jnp.zeros((1, 2, 4, 4, 3))))


class Summed(nnx.Module):
    """A classifier of pixels without weights."""

    def __call__(self, prompts, inputs):
        return (prompts + inputs).sum((1, 2))

    @staticmethod
    def prompt_rank(prompts):
        return 3
