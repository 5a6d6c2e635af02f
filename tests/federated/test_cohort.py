import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbbpt_jax.federated.cohort import draw_cohort, own_rows, pack
from fedbbpt_jax.federated.participation import uniform_cohort
from fedbbpt_jax.types import Examples


@pytest.fixture
def clients():
    """Three clients of 5, 2 and 9 examples; every example is its own row number."""
    rows = np.arange(16)
    examples = Examples(rows[:, None].astype(np.float32), np.zeros((16, 0), np.float32), rows.astype(np.int32))
    return pack(examples, [rows[:5], rows[5:7], rows[7:]])


def test_packing_stores_every_example_once(clients):
    assert clients.examples.labels.shape == (16,)
    assert clients.places.shape == (32,)
    assert set(clients.examples.labels[own_rows(clients, 1)]) == {5, 6}
    np.testing.assert_array_equal(clients.sizes, [5, 2, 9])


def test_an_empty_client_is_refused(clients):
    with pytest.raises(ValueError, match="client 1 holds no example"):
        pack(clients.examples, [np.array([0]), np.array([], int)])


def test_batches_are_shuffled_passes_over_own_data(clients, key):
    """T·B = 10 draws: each of n rows comes floor(10/n) or ceil(10/n) times, and from no other client."""
    cohort = draw_cohort(key, 0, clients, uniform_cohort(3), local_steps=5, batch_size=2)
    own = [range(5), range(5, 7), range(7, 16)]
    for i, rows in enumerate(own):
        drawn = clients.examples.labels[np.asarray(cohort.rows[i]).ravel()]
        assert set(drawn) <= set(rows)
        counts = np.bincount(drawn, minlength=16)[list(rows)]
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(cohort.weights, [5, 2, 9])


def test_a_clients_batches_do_not_depend_on_who_else_takes_part(clients, key):
    everyone = draw_cohort(key, 0, clients, uniform_cohort(3), 2, 2)
    some = draw_cohort(key, 0, clients, uniform_cohort(2), 2, 2)
    for position, client in enumerate(np.asarray(some.ids)):
        np.testing.assert_array_equal(some.rows[position], everyone.rows[client])


def test_cohorts_are_uniform_without_replacement(clients, key):
    ids = np.asarray(
        jax.vmap(lambda k: draw_cohort(k, 0, clients, uniform_cohort(2), 1, 1).ids)(jax.random.split(key, 3000))
    )
    assert (ids[:, 0] < ids[:, 1]).all()
    counts = np.bincount(ids.ravel(), minlength=3) / 3000
    np.testing.assert_allclose(counts, 2 / 3, atol=0.035)  # 4 standard errors of sqrt(2/9/3000)


def test_rounds_draw_differently(clients, key):
    a, b = (draw_cohort(jax.random.fold_in(key, i), i, clients, uniform_cohort(3), 2, 2).rows for i in (0, 1))
    assert not jnp.array_equal(a, b)
