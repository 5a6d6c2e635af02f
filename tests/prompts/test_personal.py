import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.prompts.coordinator import coordinator
from fedbbpt_jax.prompts.personal import personal
from fedbbpt_jax.prompts.pixels import frame, full_overlay, low_resolution_overlay

OVERLAYS = {"full": full_overlay(32), "low-resolution": low_resolution_overlay(32, 8), "frame": frame(32, 4)}


def filled(params, key):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("generator", OVERLAYS.values(), ids=OVERLAYS.keys())
def test_the_prompt_is_the_sum_of_both(generator, key):
    params, features = filled(personal(generator).init(key), key), jnp.zeros((2, 0))
    parts = [np.asarray(generator.generate(params[name], features), "d") for name in ("shared", "local")]
    assert np.abs(parts[0] - parts[1]).max() > 0.1
    found = jax.jit(personal(generator).generate)(params, features)
    np.testing.assert_allclose(found, sum(parts), atol=2e-6)


@pytest.mark.parametrize("generator", [*OVERLAYS.values(), coordinator(8, 4, (2, 2))])
def test_begins_as_the_shared_one(generator, key):
    """Whatever the shared parameters are, a local part of zeros changes nothing."""
    params = personal(generator).init(key)
    jax.tree.map(np.testing.assert_array_equal, params["shared"], generator.init(key))
    assert jax.tree.structure(params["shared"]) == jax.tree.structure(params["local"])
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(params["local"]))
    shared, features = filled(params["shared"], key), jax.random.normal(key, (2, 4))
    found = jax.jit(personal(generator).generate)({**params, "shared": shared}, features)
    np.testing.assert_array_equal(found, jax.jit(generator.generate)(shared, features))


def test_both_parts_matter(key):
    generator = personal(low_resolution_overlay(32, 8))
    params = generator.init(key)
    gradient = jax.grad(lambda p: (generator.generate(p, jnp.zeros((1, 0))) * 0.5).sum())(params)
    for name in ("shared", "local"):
        assert (np.asarray(gradient[name]["picture"]) > 0).all()
