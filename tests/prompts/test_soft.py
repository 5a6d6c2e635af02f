import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import RobertaConfig

from fedbbpt_jax.black_box.frozen import masked_lm_classifier, query_only
from fedbbpt_jax.models.classifiers import DeepPrompt, MaskedText
from fedbbpt_jax.models.loading import PretrainedText
from fedbbpt_jax.models.roberta import RobertaForMaskedLM
from fedbbpt_jax.prompts.soft import (
    Projection,
    check_fingerprint,
    draw_projection,
    fingerprint,
    intrinsic,
    normal_entries,
    projected,
    soft_prompt,
    spreads,
    uniform_entries,
    word_embeddings,
)
from fedbbpt_jax.types import Query

D, P, E, L, C, K, B, MASK = 10, 3, 32, 2, 2, 3, 4, 4
LABEL_WORDS = (" bad", " good")


@functools.cache
def model() -> PretrainedText:
    """A random RoBERTa of two layers and 60 words; its tokeniser knows two."""
    config = RobertaConfig(
        vocab_size=60, hidden_size=E, num_hidden_layers=L, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=20, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: RobertaForMaskedLM(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)), nnx.to_pure_dict(abstract))
    tokenizer = SimpleNamespace(
        mask_token_id=MASK, encode=lambda word, add_special_tokens: [10 + LABEL_WORDS.index(word)]
    )
    return PretrainedText(graphdef, params, tokenizer)


@functools.cache
def box():
    return query_only(masked_lm_classifier(model(), LABEL_WORDS))


def texts():
    ids = np.random.default_rng(0).integers(5, 60, (C, B, 9)).astype(np.int32)
    ids[..., 0], ids[..., 3] = 0, MASK
    attended = np.arange(9) < np.array([9, 5, 7, 6])[:, None] * np.ones((C, B, 1), int)
    return MaskedText(np.where(attended, ids, 1), attended)


@jax.jit
def ask(box, query):
    return box(query).scores


def numbers(key, *shape):
    return jax.random.normal(key, shape)


# Projections


@pytest.mark.parametrize("entries", [normal_entries, uniform_entries])
def test_first_candidates_are_spread_as_words_are(entries, key):
    """Var(Az) = d s² sigma² for z of standard deviation sigma; 20,000 numbers give it to 1 %, z itself to 10 %."""
    spread, step_size, alpha = 0.13, 2.0, 0.7
    projection = draw_projection(
        key, 200, jnp.zeros((100, 200)), jnp.float32(spread), step_size, alpha=alpha, entries=entries
    )
    z = step_size * numbers(jax.random.fold_in(key, 1), 200)
    expected = alpha * spread
    np.testing.assert_allclose(soft_prompt(projection, z).std(), expected, rtol=0.15)
    np.testing.assert_allclose(projection.matrix.std(), expected / (200**0.5 * step_size), rtol=0.01)
    largest = np.abs(projection.matrix).max() / projection.matrix.std()
    assert largest < 1.74 if entries is uniform_entries else largest > 4


def test_a_prompt_is_the_projection_of_z_and_the_offset(key):
    projection = Projection(numbers(key, D, P, E), numbers(jax.random.fold_in(key, 1), P, E))
    z = numbers(jax.random.fold_in(key, 2), C, K, D)
    expected = np.asarray(projection.offset, "d") + np.einsum(
        "ckd,dpe->ckpe", np.asarray(z, "d"), np.asarray(projection.matrix, "d")
    )
    np.testing.assert_allclose(soft_prompt(projection, z), expected, atol=1e-5)
    np.testing.assert_array_equal(soft_prompt(projection, jnp.zeros(D)), projection.offset)


def test_all_parties_draw_the_same(key):
    arguments = (D, jnp.zeros((P, E)), jnp.float32(0.1), 1.0)
    first, second = (draw_projection(key, *arguments) for _ in range(2))
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert not np.allclose(first.matrix, draw_projection(jax.random.key(8), *arguments).matrix)


def test_layers_have_their_own_matrices_and_spreads(key):
    projection = draw_projection(key, 50, jnp.zeros((20, E)), jnp.array([0.1, 3.0]), 1.0)
    assert projection.matrix.shape == (2, 50, 20, E)
    np.testing.assert_allclose(projection.matrix.std((1, 2, 3)) * 50**0.5, [0.1, 3.0], rtol=0.02)
    assert not np.allclose(projection.matrix[0] / 0.1, projection.matrix[1] / 3.0)


# Fingerprints


@pytest.mark.parametrize("shape", [(D, P, E), (L, D, P, E)])
def test_a_fingerprint_finds_another_key_a_changed_row_and_another_offset(shape, key):
    projection = Projection(numbers(key, *shape), numbers(jax.random.fold_in(key, 1), P, E))
    expected = np.asarray(fingerprint(projection))
    assert expected.nbytes == 32
    check_fingerprint(projection, expected)
    rounded = Projection(projection.matrix * (1 + 1e-6), projection.offset)
    check_fingerprint(rounded, expected)
    matrix, offset = projection
    others = [
        Projection(numbers(jax.random.key(8), *shape), offset),
        Projection(matrix.at[..., 0, :, :].set(matrix[..., 1, :, :]), offset),
        Projection(matrix[..., ::-1, :, :], offset),
        Projection(1.01 * matrix, offset),
        Projection(matrix, offset + 0.1),
    ]
    for other in others:
        with pytest.raises(ValueError, match="another projection than the other party's"):
            check_fingerprint(other, expected)


# Boxes of z


def test_a_box_of_z_answers_as_the_box_of_its_prompts(key):
    projection = draw_projection(key, D, word_embeddings(model())[5:8], word_embeddings(model()).std(), 1.0)
    z = numbers(jax.random.fold_in(key, 1), C, K, D)
    expected = ask(box(), Query(soft_prompt(projection, z), texts()))
    np.testing.assert_allclose(ask(projected(box(), projection), Query(z, texts())), expected, atol=1e-5)
    assert expected.std() > 0.1


def test_at_zero_the_prompt_is_the_filler_tokens(key):
    fillers = np.arange(20, 20 + P)
    projection = draw_projection(key, D, word_embeddings(model())[fillers], jnp.float32(0.1), 1.0)
    found = ask(projected(box(), projection), Query(jnp.zeros((C, 1, D)), texts()))
    ids = np.broadcast_to(fillers, (C, 1, P)).astype(np.int32)
    np.testing.assert_allclose(found, ask(box(), Query(ids, texts())), atol=1e-5)


@pytest.mark.slow
def test_z_may_depend_on_the_example(key):
    projection = draw_projection(key, D, jnp.zeros((P, E)), jnp.float32(0.3), 1.0)
    z = numbers(jax.random.fold_in(key, 1), C, K, B, D)
    found = ask(projected(box(), projection), Query(z, texts()))
    one = jax.tree.map(lambda x: x[1:, 2:3], texts())
    alone = ask(projected(box(), projection), Query(z[1:, :1, 2:3], one))
    np.testing.assert_allclose(found[1, 0, 2], alone[0, 0, 0], atol=1e-5)


def test_the_matrix_enters_a_compiled_program_as_an_argument(key):
    """As a constant it would be written into its text."""
    big = projected(box(), draw_projection(key, 500, jnp.zeros((P, E)), jnp.float32(0.1), 1.0))
    lowered = ask.lower(big, Query(jnp.zeros((C, K, 500)), texts()))
    assert len(lowered.as_text()) < 100_000
    assert big.projection.matrix.shape in {leaf.shape for leaf in jax.tree.leaves(big)}


def test_the_wall_stays_in_front_of_the_model(key):
    z_box = projected(box(), draw_projection(key, D, jnp.zeros((P, E)), jnp.float32(0.1), 1.0))
    with pytest.raises(TypeError, match="queries only"):
        jax.grad(lambda z: z_box(Query(z, texts())).scores.sum())(jnp.zeros((C, K, D)))


def test_generators_begin_at_zero_and_give_z_itself(key):
    for shape in [(D,), (L, D)]:
        generator = intrinsic(*shape)
        np.testing.assert_array_equal(generator.init(key), np.zeros(shape))
        z = numbers(key, *shape)
        np.testing.assert_array_equal(generator.generate(z, jnp.zeros((1, 0))), z)
    for shape in [(), (0,), (3, -1)]:
        with pytest.raises(ValueError, match="positive sizes"):
            intrinsic(*shape)


# Prompts in each layer


def test_a_part_in_each_layer_reaches_its_layer(key):
    """Against the language model itself, which takes both parts for each example."""
    projection = draw_projection(key, D, word_embeddings(model())[5:8], jnp.array([0.3, 1.0]), 1.0)
    z = numbers(jax.random.fold_in(key, 1), C, K, L, D)
    found = ask(projected(box(), projection), Query(z, texts()))
    words = projection.offset + jnp.einsum("ckd,dpe->ckpe", z[:, :, 0], projection.matrix[0])
    second = jnp.einsum("ckd,dpe->ckpe", z[:, :, 1], projection.matrix[1])
    network = nnx.merge(model().graphdef, model().params)
    language_model = jax.jit(lambda *args: network(*args))
    for c, k in [(0, 0), (1, 2)]:
        layers = jnp.broadcast_to(jnp.stack([jnp.zeros((P, E)), second[c, k]]), (B, L, P, E))
        prompts = jnp.broadcast_to(words[c, k], (B, P, E))
        every_word = language_model(texts().ids[c], texts().attended[c], prompts, layers)
        np.testing.assert_allclose(found[c, k], every_word[:, P + 3, 10:12], atol=2e-5)
    shallow = ask(box(), Query(words, texts()))
    assert np.abs(found - shallow).max() > 0.01


@pytest.mark.slow
def test_prompts_of_parts_may_depend_on_the_example(key):
    parts = DeepPrompt(numbers(key, C, K, B, P, E), numbers(key, C, K, B, L, P, E))
    found = ask(box(), Query(parts, texts()))
    one = jax.tree.map(lambda x: x[1:, 2:3, 3], parts)
    alone = ask(box(), Query(one, jax.tree.map(lambda x: x[1:, 3:], texts())))
    np.testing.assert_allclose(found[1, 2, 3], alone[0, 0, 0], atol=2e-5)


@pytest.mark.slow
def test_spreads_are_those_of_the_words_and_of_the_states_before_each_layer():
    text = jax.tree.map(lambda x: x[0], texts())
    found = np.asarray(spreads(model(), text))
    network = nnx.merge(model().graphdef, model().params)
    roberta = network.roberta
    embedded = roberta.embeddings(
        roberta.embeddings.word_embeddings(text.ids), np.cumsum(text.ids != 1, axis=1) * (text.ids != 1) + 1
    )
    states = roberta.encoder.layers[0](embedded, text.attended[:, None, None])
    expected = [np.asarray(word_embeddings(model())).std(), np.asarray(states)[text.attended].std()]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("change", [{"intrinsic_dim": 0}, {"step_size": 0.0}, {"alpha": -1.0}], ids=str)
def test_wrong_sizes_are_refused(change, key):
    arguments = {"intrinsic_dim": D, "offset": jnp.zeros((P, E)), "spreads": jnp.float32(1), "step_size": 1.0} | change
    with pytest.raises(ValueError, match=next(iter(change))):
        draw_projection(key, **arguments)
