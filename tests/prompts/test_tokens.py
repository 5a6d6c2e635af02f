import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedbbpt_jax.data.ngrams import candidate_tokens
from fedbbpt_jax.estimators.policy_gradient import bdpl, gumbel, leave_one_out, logits, policy_gradient
from fedbbpt_jax.optimizers.descent import descent
from fedbbpt_jax.prompts.tokens import at_least, on_simplex, project_to_simplex, prompt_text, tokens

VOCABULARY = np.array([318, 257, 922, 40, 77], np.int32)
project = jax.jit(project_to_simplex)


# Generators


def test_samples_and_policies_become_token_ids(key):
    generator = tokens(VOCABULARY, 3)
    features = jnp.zeros((2, 0))
    sampled = generator.generate(jnp.array([4, 0, 2], jnp.int32), features)
    np.testing.assert_array_equal(sampled, [77, 318, 922])
    policy = jnp.zeros((3, 5)).at[jnp.arange(3), jnp.array([1, 1, 3])].set(0.1)
    likeliest = generator.generate(policy, features)
    np.testing.assert_array_equal(likeliest, [257, 257, 40])
    assert sampled.dtype == likeliest.dtype == jnp.int32


@pytest.mark.parametrize(("start", "value"), [(None, 0.2), (0.0, 0.0), (1.0, 1.0)])
def test_all_words_are_equally_likely_at_first(start, value, key):
    params = tokens(VOCABULARY, 3, start).init(key)
    np.testing.assert_array_equal(params, np.full((3, 5), value, np.float32))
    assert params.dtype == jnp.float32


def test_candidates_of_the_policy_gradient_are_prompts(key):
    generator, estimator = tokens(VOCABULARY, 3), bdpl(4)
    params = generator.init(key)

    def prompt(k):
        return generator.generate(estimator.perturb(key, estimator.init(params), params, k), None)

    found = np.asarray(jax.jit(jax.vmap(prompt))(jnp.arange(4)))
    assert found.shape == (4, 3)
    assert set(found.ravel()) <= set(VOCABULARY)
    assert len({row.tobytes() for row in found}) > 1


class Letters:
    """A tokenizer whose ids are the codes of letters."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return list(map(ord, text))

    def decode(self, ids):
        assert all(type(i) is int for i in ids)
        return "".join(map(chr, ids))


def test_the_learnt_prompt_is_text():
    generator = tokens(candidate_tokens(Letters(), ["so", "os"], 9), 2)
    assert prompt_text(generator, jnp.array([[0.1, 0.7, 0.2], [0.1, 0.2, 0.7]]), Letters()) == "so"


@pytest.mark.parametrize(
    ("vocabulary", "num_positions", "message"),
    [([], 3, r"vocabulary of token ids"), ([[1, 2]], 3, r"shape \(1, 2\)"), ([1], 0, "num_positions must be positive")],
)
def test_wrong_sizes_are_refused(vocabulary, num_positions, message):
    with pytest.raises(ValueError, match=message):
        tokens(vocabulary, num_positions)


# The simplex

ROWS = arrays.arrays(np.float32, (2, 5), elements=st.floats(-8, 8, width=32))


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_projection_meets_the_conditions_of_the_nearest_point(rows):
    """It is on the simplex, and one threshold per row was taken off all numbers that are left (Karush-Kuhn-Tucker)."""
    found = np.asarray(project(rows), "d")
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)  # float32, after subtracting numbers of up to 16
    for row, point in zip(rows.astype("d"), found, strict=True):
        left = point > 0
        threshold = (row[left] - point[left]).mean()
        np.testing.assert_allclose(row[left] - point[left], threshold, atol=5e-6)
        assert (row[~left] <= threshold + 5e-6).all()


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_a_projected_point_stays(rows):
    once = project(rows)
    np.testing.assert_allclose(project(once), once, atol=2e-7)


def test_projection_equals_a_search_for_the_threshold():
    rows = np.random.default_rng(0).normal(0, 0.3, (20, 7))
    low, high = rows.min(1, keepdims=True) - 1, rows.max(1, keepdims=True)
    for _ in range(100):
        middle = (low + high) / 2
        too_much = np.maximum(rows - middle, 0).sum(1, keepdims=True) > 1
        low, high = np.where(too_much, middle, low), np.where(too_much, high, middle)
    expected = np.maximum(rows - low, 0)
    np.testing.assert_allclose(project(rows.astype("f")), expected, atol=1e-6)


def test_a_constant_changes_nothing_however_large():
    """Eighths can be added to 2^20 in float32, but not summed there."""
    rows = np.random.default_rng(0).integers(-4, 4, (20, 7)).astype("f") / 8
    np.testing.assert_array_equal(project(rows + np.float32(2**20)), project(rows))


@settings(max_examples=60, deadline=None)
@given(ROWS, arrays.arrays(np.float32, (2, 5), elements=st.floats(0, 1, width=32)))
def test_steps_end_on_the_simplex_and_never_below_zero(updates, start):
    """Where the difference and the sum may round: -1e-9 would have no logarithm."""
    params = project(start)
    moved = np.asarray(apply(jnp.asarray(updates), params))
    assert (moved >= 0).all()
    np.testing.assert_allclose(moved, project(params + updates), atol=1e-6)


@jax.jit
def apply(updates, params):
    tx = on_simplex()
    return optax.apply_updates(params, tx.update(updates, tx.init(params), params)[0])


def test_policies_learn_on_the_simplex_without_a_number_that_is_none(key):
    """BDPL on a loss that names one word for each position; the others end at exactly 0, and are drawn no more."""
    target = jnp.array([3, 0, 1])
    optimizer = descent(bdpl(8), optax.chain(optax.clip_by_global_norm(3.0), optax.sgd(0.05), on_simplex()))
    generator = tokens(VOCABULARY, 3)

    def step(state, step_key):
        sampled = jax.vmap(lambda k: optimizer.ask(step_key, state, k))(jnp.arange(8))
        losses = (sampled != target).sum(1, keepdims=True).astype(jnp.float32)
        state, info = optimizer.tell(step_key, state, losses, jnp.ones((8, 1), bool))
        return state, info.loss

    state, losses = jax.lax.scan(step, optimizer.init(generator.init(key)), jax.random.split(key, 60))
    params = np.asarray(optimizer.solution(state))
    np.testing.assert_array_equal(generator.generate(params, None), VOCABULARY[target])
    np.testing.assert_allclose(params.sum(1), 1, atol=1e-6)
    assert (params == 0).any()
    assert np.isfinite(losses).all()


def test_logits_need_no_simplex(key):
    estimator, generator = logits(), tokens(VOCABULARY, 2, start=0.0)
    chances = jnp.exp(estimator.log_probabilities(generator.init(key)))
    np.testing.assert_allclose(chances, np.full((2, 5), 0.2), rtol=1e-6)


def test_gumbels_parameters_stay_above_their_floor(key):
    """Long steps against a word would take its parameter below zero, where there is no logarithm."""
    optimizer = descent(policy_gradient(gumbel(1.0), 8, leave_one_out), optax.chain(optax.adam(0.5), at_least(1e-3)))
    state = optimizer.init(jnp.ones((2, 4)))

    def step(state, key):
        words = jax.vmap(lambda k: optimizer.ask(key, state, k))(jnp.arange(8))
        losses = (words == 0).sum(1, keepdims=True).astype(jnp.float32)
        return optimizer.tell(key, state, losses, jnp.ones((8, 1), bool))[0], state.params.min()

    state, lowest = jax.lax.scan(step, state, jax.random.split(key, 40))
    assert lowest.min() == pytest.approx(1e-3, rel=1e-4)  # p + (floor - p) rounds
    assert jnp.isfinite(state.params).all()
    assert (jnp.argmax(state.params, axis=1) != 0).all()
