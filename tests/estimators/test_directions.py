"""One contract over all families of directions; the moments and variances that their docstrings state; geometry."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from jax.flatten_util import ravel_pytree

from fedbbpt_jax.estimators.directions import (
    coordinate,
    gaussian,
    rademacher,
    segmented_uniform,
    segmented_uniform_projection,
    sparse,
    sphere,
)
from fedbbpt_jax.estimators.spsa import spsa
from fedbbpt_jax.estimators.structured import hadamard, lattice, low_rank, orthogonal, subspace

SMALL = {"a": jnp.zeros((2, 3)), "b": [jnp.zeros(()), jnp.zeros(1)]}  # d = 8
MIXED = {"bias": jnp.zeros(3), "kernel": jnp.zeros((3, 4))}  # d = 15, the vector first
SIX = {"w": jnp.zeros((2, 3))}
TREE = {"a": jnp.zeros((3, 5)), "b": [jnp.zeros(()), jnp.zeros(33)]}  # d = 49

# Families and the parameters they are tried on.
FAMILIES = {
    "rademacher": (rademacher(), SMALL),
    "gaussian": (gaussian(), SMALL),
    "sphere": (sphere(), SMALL),
    "segmented-uniform": (segmented_uniform(), SMALL),
    "segmented-projection": (segmented_uniform_projection(), SMALL),
    "coordinate": (coordinate(), SMALL),
    "sparse": (sparse(0.5), SMALL),
    "orthogonal": (orthogonal(4), SIX),
    "hadamard": (hadamard(), SMALL),
    "hadamard-of-6": (hadamard(), SIX),
    "low-rank-1": (low_rank(1), MIXED),
    "low-rank-2": (low_rank(2), MIXED),
    "subspace": (subspace(3, seed=1), SMALL),
    "lattice": (lattice(64), SMALL),
}
SAME_SAMPLES = {"segmented-projection": "segmented-uniform"}  # they differ by their duals
NUM_DRAWS = 20_000
QUICKLY = {
    "xla_backend_optimization_level": 0
}  # programs that run once: better ones take longer to make than they save
every_family = pytest.mark.parametrize("name", FAMILIES)


def flat(tree):
    return ravel_pytree(tree)[0]


@cache
def samples(name):
    """Keys, and directions 0..d+3 of each, `[draws, d + 4, d]`, by one compiled program."""
    directions, like = FAMILIES[name]
    keys, js = jax.random.split(jax.random.key(2), NUM_DRAWS), jnp.arange(flat(like).size + 4)
    sample = jax.vmap(jax.vmap(lambda key, j: flat(directions.sample(key, j, like)), (None, 0)), (0, None))
    return keys, np.asarray(jax.jit(sample, compiler_options=QUICKLY)(keys, js))


def draws(name):
    """Keys, directions and their duals, which are taken number by number."""
    keys, drawn = samples(SAME_SAMPLES.get(name, name))
    return keys, drawn, np.asarray(FAMILIES[name][0].dual(drawn))


def rows(directions, key, js, like):
    """Directions of one key, `[q, d]`."""
    sample = jax.vmap(lambda j: flat(directions.sample(key, j, like)))
    return np.asarray(jax.jit(sample, compiler_options=QUICKLY)(jnp.asarray(js)))


def projection(drawn):
    """The projection onto the space that directions `[..., d]` span, and its dimension."""
    _, sizes, basis = np.linalg.svd(np.float64(drawn).reshape(-1, drawn.shape[-1]), full_matrices=False)
    basis = basis[sizes > 1e-4 * sizes[0]]  # float32 leaves 1e-7 of the largest in the others
    return basis.T @ basis, len(basis)


def mean_of_duals_times_directions(name):
    """I, but for `subspace`."""
    drawn = draws(name)[1]
    return projection(drawn[:32])[0] if name == "subspace" else np.eye(drawn.shape[-1])


@every_family
class TestContract:
    def test_shapes_follow_the_tree(self, name, key):
        directions, _ = FAMILIES[name]
        drawn = jax.eval_shape(lambda key: directions.sample(key, 0, TREE), key)
        for tree in (drawn, jax.eval_shape(directions.dual, drawn)):
            assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, TREE)
            assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))

    def test_same_key_and_index_same_direction(self, name):
        """Alone and in any order as with all others under vmap, in programs that are compiled differently.

        Whole numbers have the same bits; others a rounding or two (1e-7) that an orthogonalisation makes larger.
        """
        directions, like = FAMILIES[name]
        keys, together, _ = draws(name)
        alone = jax.jit(lambda key, j: flat(directions.sample(key, j, like)))
        tolerance = 0 if name in ("rademacher", "coordinate", "hadamard", "hadamard-of-6", "low-rank-1") else 5e-6
        for i in (1, 0):
            for j in (7, 2, 0):
                np.testing.assert_allclose(alone(keys[i], j), together[i, j], rtol=tolerance, atol=tolerance)

    def test_keys_and_indices_differ(self, name):
        _, together, _ = draws(name)
        assert len(np.unique(together[:40, 1], axis=0)) > 3
        assert len(np.unique(together[0], axis=0)) > 3  # few where a family has few directions, as `coordinate`

    def test_mean_of_dual_times_direction_is_the_identity(self, name):
        """Within 5 standard errors: of 1,500 numbers in all, one lies beyond in 1,000 seeds."""
        _, drawn, dual = draws(name)
        products = np.float64(dual[:, 5, :, None]) * drawn[:, 5, None, :]
        error = products.std(0) / np.sqrt(NUM_DRAWS) + 1e-6  # some entries are exact, up to float32
        difference = np.abs(products.mean(0) - mean_of_duals_times_directions(name))
        np.testing.assert_array_less(difference, 5 * error)

    def test_odd_moments_vanish(self, name):
        r"""E[dual] = 0 and E[(directionᵀ H direction) dual] = 0 within 5 standard errors, for the first and another.

        Estimates that are not two-sided have a bias of (L_t - L_{t-1})/c and c/2 times these.
        """
        _, drawn, dual = draws(name)
        curvature = np.random.default_rng(3).normal(size=(drawn.shape[-1],) * 2)
        for j in (0, 5):
            x, y = np.float64(drawn[:, j]), np.float64(dual[:, j])
            for odd in (y, ((x @ curvature) * x).sum(1, keepdims=True) * y):
                np.testing.assert_array_less(np.abs(odd.mean(0)), 5 * odd.std(0) / np.sqrt(NUM_DRAWS))


def errors_of_estimates(name, part=slice(None)):
    """‖ĝ - g‖²/‖g‖² on a linear function, `[draws, d + 4]` for q = 1, 2, …; g is 0 but in a part.

    There slopes are exact; `test_spsa.py` compares `spsa` with such a mean of slopes times duals.
    """
    _, drawn, dual = draws(name)
    size = drawn.shape[-1]
    slope = np.zeros(size)
    slope[part] = np.random.default_rng(1).normal(size=size)[part]
    target = mean_of_duals_times_directions(name) @ slope
    terms = (drawn @ slope)[:, :, None] * dual  # [draws, d + 4, d]
    means = np.cumsum(terms, axis=1) / np.arange(1, size + 5)[:, None]
    return ((means - target) ** 2).sum(-1) / (target**2).sum()


def check_variances(errors, stated):
    """Within 3 standard errors of a mean known to 1.5 %; to float32's rounding where it is without error."""
    size = errors.shape[1] - 4
    for q in {1, 3, size // 2, size, size + 4}:
        of_q = errors[:, q - 1]
        standard_error = of_q.std() / np.sqrt(len(of_q))
        assert standard_error <= 0.015 * stated(size, q) + 1e-9
        assert abs(of_q.mean() - stated(size, q)) < 3 * standard_error + 1e-5 * stated(size, q) + 1e-9


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("lattice", "low-rank-1", "low-rank-2")])
def test_variance_is_the_stated_one(name):
    check_variances(errors_of_estimates(name), FAMILIES[name][0].variance)


@pytest.mark.parametrize("name", ["low-rank-1", "low-rank-2"])
def test_variance_of_low_rank_depends_on_where_the_gradient_is(name):
    check_variances(errors_of_estimates(name, slice(3, 15)), FAMILIES[name][0].variance)
    check_variances(errors_of_estimates(name, slice(0, 3)), lambda d, q: (d - 1) / q)


def test_variance_of_one_lattice_direction_is_that_of_a_normal_one():
    errors = errors_of_estimates("lattice")[:, 0]
    standard_error = errors.std() / np.sqrt(len(errors))
    assert standard_error < 0.02 * 9
    assert abs(errors.mean() - lattice(64).variance(8, 1)) < 3 * standard_error


@pytest.mark.parametrize(
    ("directions", "size", "q"),
    [(orthogonal(8), 8, 8), (hadamard(), 8, 8), (hadamard(), 6, 16)],
)
def test_full_blocks_reach_the_gradient_of_a_quadratic(directions, size, q, key):
    """Two-sided differences of a quadratic are exact, so that only float32's rounding is left: 1e-6 of losses of 10."""
    rng = np.random.default_rng(5)
    factor, point = rng.normal(size=(size, size)) / np.sqrt(size), rng.normal(size=size)
    curvature, point = jnp.float32(factor @ factor.T), jnp.float32(point)
    loss = lambda x: 0.5 * x @ curvature @ x + x.sum()  # noqa: E731
    estimator = spsa(directions, q, 0.5)
    state = estimator.init(point)

    @partial(jax.jit, compiler_options=QUICKLY)
    def estimate(key):
        losses = jax.vmap(lambda k: loss(estimator.perturb(key, state, point, k)))(jnp.arange(2 * q))[:, None]
        return estimator.estimate(key, state, point, losses, jnp.ones(losses.shape, bool))[0]

    gradient = jax.grad(loss)(point)
    assert jnp.linalg.norm(estimate(key) - gradient) < 1e-4 * jnp.linalg.norm(gradient)


def test_segmented_uniform_magnitudes_fill_their_range(key):
    draws = np.asarray(segmented_uniform().sample(key, 0, jnp.zeros(100_000)))
    sizes = np.abs(draws)
    assert sizes.min() >= 0.5 - 1e-6
    assert sizes.max() <= 1.0
    # Uniform in [0.5, 1]: mean 0.75 with standard error 0.5/sqrt(12 n) = 4.6e-4; signs even within 0.0032.
    assert abs(sizes.mean() - 0.75) < 0.002
    assert abs(np.sign(draws).mean()) < 0.01


def test_rademacher_unpacks_bits_lowest_first(key):
    words = np.asarray(jax.random.bits(jax.random.fold_in(key, 3), (2,), jnp.uint32))
    expected = [1.0 if (int(words[i // 32]) >> (i % 32)) & 1 else -1.0 for i in range(40)]
    np.testing.assert_array_equal(rademacher().sample(key, 3, jnp.zeros(40)), expected)


@pytest.mark.parametrize("name", ["sphere", "orthogonal", "coordinate", "hadamard", "low-rank-1"])
def test_length_is_the_root_of_d(name):
    _, drawn, _ = draws(name)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), np.sqrt(drawn.shape[-1]), rtol=2e-6)


def test_coordinate_moves_one_number_and_reaches_all():
    _, drawn, _ = draws("coordinate")
    assert ((drawn != 0).sum(axis=-1) == 1).all()
    # Of 20,000 draws on 8 axes each is reached 2,500 times with a deviation of 47.
    np.testing.assert_allclose((drawn[:, 0] != 0).sum(axis=0), 2500, atol=5 * 47)


def test_sparse_moves_the_stated_part():
    _, drawn, _ = draws("sparse")
    np.testing.assert_allclose(np.unique(np.abs(drawn)), [0, np.sqrt(2)], rtol=1e-6)
    # Half of 1.9 million numbers, with a standard error of 0.5/sqrt(1.9e6) = 3.6e-4.
    assert abs((drawn != 0).mean() - 0.5) < 0.002


def test_orthogonal_within_blocks_and_independent_between():
    _, drawn, _ = draws("orthogonal")
    gram = drawn @ drawn.mT / 6  # blocks 0..3, 4..7 and the beginning of a third
    identity = np.broadcast_to(np.eye(4), (NUM_DRAWS, 4, 4))
    np.testing.assert_allclose(gram[:, :4, :4], identity, atol=1e-5)
    np.testing.assert_allclose(gram[:, 4:8, 4:8], identity, atol=1e-5)
    # Cosines of independent directions have the mean square 1/d, with a standard error below 1e-3 of so many.
    assert abs((gram[:, :4, 4:8] ** 2).mean() - 1 / 6) < 0.005


@pytest.mark.parametrize(("name", "size"), [("hadamard", 8), ("hadamard-of-6", 6)])
def test_hadamard_has_columns_of_the_matrix(name, size):
    """Row 0 is the signs of the columns; without them the columns are some of SciPy's matrix, none twice."""
    matrix = scipy.linalg.hadamard(8)
    for drawn in draws(name)[1][:20]:
        assert (np.abs(drawn) == 1).all()
        for block in (drawn[:8], drawn[8:]):
            columns = {tuple(column) for column in (block * block[0]).T.astype(int)}
            assert columns <= {tuple(column) for column in matrix[: len(block)].T}
            assert len(columns) == size or len(block) < 8
        assert (drawn[0] != drawn[8]).any() or (drawn[1] != drawn[9]).any()


def test_hadamard_of_one_number_has_no_error(key):
    assert hadamard().variance(1, 1) == 0
    assert hadamard().variance(1, 3) == 0
    assert abs(hadamard().sample(key, 2, jnp.zeros(1))[0]) == 1


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_has_its_rank(rank, key):
    like = {"w": jnp.zeros((12, 10)), "kernel": jnp.zeros((12, 5, 2)), "bias": jnp.zeros(40), "scale": jnp.zeros(())}
    drawn = jax.device_get(jax.jit(low_rank(rank).sample, compiler_options=QUICKLY)(key, 1, like))
    assert np.linalg.matrix_rank(drawn["w"]) == rank
    assert np.linalg.matrix_rank(drawn["kernel"].reshape(12, 10)) == rank
    assert np.abs(drawn["w"] - drawn["kernel"].reshape(12, 10)).max() > 0.5
    assert (np.abs(drawn["bias"]) == 1).all()
    assert abs(drawn["scale"]) == 1


def test_subspace_is_the_same_for_all_keys():
    _, drawn, _ = draws("subspace")
    onto, found = projection(drawn[0])
    assert found == 3
    np.testing.assert_allclose(drawn @ onto, drawn, atol=1e-5)


def test_subspace_of_more_than_all_dimensions_is_everything(key):
    _, found = projection(rows(subspace(30), key, range(32), SMALL))
    assert found == 8
    assert subspace(30).variance(8, 2) == rademacher().variance(8, 2)


def test_subspace_follows_its_seed(key):
    other, _ = projection(rows(subspace(3, seed=2), key, range(32), SMALL))
    assert np.abs(other - projection(draws("subspace")[1][0])[0]).max() > 0.1


def test_lattice_directions_are_standard_normal_and_uncorrelated(key):
    """Kolmogorov-Smirnov over keys, for two indices; p-values are uniform, and the least of six seldom below 0.001."""
    _, drawn, _ = draws("lattice")
    p_values = [scipy.stats.kstest(drawn[:5_000, j, i], "norm").pvalue for j in (0, 7) for i in range(3)]
    assert min(p_values) > 1e-3


@pytest.mark.parametrize("num_points", [64, 32768])
def test_lattice_points_are_evenly_spread(num_points, key):
    """In each dimension n points at distances 1/n on the circle; they return after n."""
    directions = lattice(num_points)
    drawn = np.float64(rows(directions, key, range(num_points + 1), jnp.zeros(3)))
    np.testing.assert_array_equal(drawn[-1], drawn[0])
    # Two lattices on a circle have a correlation of order 1/sqrt(n) at worst, but for unlucky generators.
    assert np.abs(np.corrcoef(drawn[:-1].T) - np.eye(3)).max() < 2 / np.sqrt(num_points)
    places = np.sort(scipy.stats.norm.cdf(drawn[:-1]), axis=0)
    gaps = np.diff(places, axis=0, append=places[:1] + 1)
    # Places are float32: a uniform number of 24 bits, its quantile and back, 4e-7 in all.
    np.testing.assert_allclose(gaps, 1 / num_points, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sparse(0.0), "density must be in"),
        (lambda: sparse(1.5), "density must be in"),
        (lambda: orthogonal(0), "block_size must be at least 1, got 0"),
        (lambda: orthogonal(9).sample(jax.random.key(0), 0, SMALL), "9 directions cannot be orthogonal in 8"),
        (lambda: low_rank(0), "rank must be at least 1, got 0"),
        (lambda: subspace(0), "dimension must be at least 1, got 0"),
        (lambda: lattice(1), "num_points must be a power of two"),
        (lambda: lattice(48), "num_points must be a power of two"),
        (lambda: lattice(2**16), "num_points must be a power of two"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
