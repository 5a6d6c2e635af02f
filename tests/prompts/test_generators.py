"""One contract over all visual prompt generators, and what is particular to each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedbbpt_jax.models.checkpoint import num_params
from fedbbpt_jax.prompts.coordinator import BLACKVIP_CHANNELS, SMALL_CHANNELS, Coordinator, Doubling, coordinator
from fedbbpt_jax.prompts.pixels import frame, full_overlay, low_resolution_overlay

# Sums of up to 1,000 float32 terms, normalised: fused and plain order differ by some 1e-5.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}

GENERATORS = {
    "full": (full_overlay(32), 3072),
    "low-resolution": (low_resolution_overlay(32, 8), 192),
    "frame": (frame(32, 4), 1344),
    "coordinator": (coordinator(32, 48, SMALL_CHANNELS), 1008),
}


@pytest.mark.parametrize(("generator", "size"), GENERATORS.values(), ids=GENERATORS.keys())
class TestContract:
    def test_starts_at_zero(self, generator, size, key):
        start = jax.jit(lambda key: generator.generate(generator.init(key), jnp.ones((2, 48))))(key)
        assert not np.asarray(start).any()

    def test_has_as_many_parameters_as_it_says(self, generator, size, key):
        assert num_params(jax.eval_shape(generator.init, key)) == size

    def test_works_under_jit_and_vmap(self, generator, size, key):
        params = jax.tree.map(lambda x: x + jnp.arange(3.0).reshape(3, *[1] * x.ndim), generator.init(key))
        features = jnp.linspace(-1, 1, 5 * 48).reshape(5, 48)
        together = jax.jit(jax.vmap(generator.generate, (0, None)))(params, features)
        for i in range(2):
            alone = generator.generate(jax.tree.map(lambda x, i=i: x[i], params), features)
            np.testing.assert_allclose(together[i], alone, **CLOSE)

    def test_every_parameter_matters(self, generator, size, key):
        params = jax.tree.map(lambda x: x + 0.5, generator.init(key))
        features = jax.random.normal(key, (5, 48))

        def mixed(params):
            prompt = generator.generate(params, features)
            return (jax.random.normal(key, prompt.shape) * prompt).sum()

        gradient = jax.jit(jax.grad(mixed))(params)
        assert all((np.asarray(leaf) != 0).mean() > 0.99 for leaf in jax.tree.leaves(gradient))


def test_frame_leaves_the_centre_alone(key):
    generator = frame(32, 4)
    params = jax.tree.map(lambda x: x + 1, generator.init(key))
    prompt = np.asarray(generator.generate(params, jnp.zeros((1, 0))))
    assert not prompt[4:28, 4:28].any()
    assert prompt.sum() == 3 * (32 * 32 - 24 * 24)


def test_low_resolution_enlarges_bilinearly():
    """A ramp stays a ramp between the outermost cell centres."""
    generator = low_resolution_overlay(32, 8)
    picture = jnp.broadcast_to(jnp.arange(8.0)[:, None, None], (8, 8, 3))
    rows = np.asarray(generator.generate({"picture": picture}, jnp.zeros((1, 0))))[:, 0, 0]
    np.testing.assert_allclose(rows[2:-2], (np.arange(2, 30) + 0.5) / 4 - 0.5, atol=1e-5)


def test_coordinator_depends_on_the_features_of_each_image_alone(key):
    generator = coordinator(32, 48, SMALL_CHANNELS)
    params = jax.tree.map(lambda x: x + 0.1, generator.init(key))
    features = jax.random.normal(key, (4, 48))
    generate = jax.jit(generator.generate)
    prompts, alone = generate(params, features), generate(params, features[:1])
    np.testing.assert_allclose(prompts[0], alone[0], **CLOSE)  # no mixing of examples
    assert np.abs(prompts[0] - prompts[1]).max() > 1e-3


def test_doubling_equals_a_transposed_convolution(key):
    """Against `jax.lax.conv_transpose`, one output channel at a time."""
    module = Doubling(3, 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(key, (2, 4, 5, 3))
    for c, m in np.ndindex(3, 2):
        kernel = module.kernel[...][c, m][::-1, ::-1, None, None]  # JAX correlates, so the kernel is turned round
        expected = jax.lax.conv_transpose(x[..., c : c + 1], kernel, (2, 2), "VALID")
        np.testing.assert_allclose(module(x)[..., 2 * c + m, None], expected, atol=1e-5)


def torch_decoder(params):
    """BlackVIP's decoder as published, in torch, with a norm per example for its batch norm; weights from `params`."""
    torch = pytest.importorskip("torch")
    nn, layers = torch.nn, []
    tensor = lambda x: torch.from_numpy(np.array(x))  # noqa: E731
    for (inputs, outputs), stage in zip(
        [(32, 64), (64, 32), (32, 32), (32, 16)], params["stages"].values(), strict=True
    ):
        hidden = max(inputs, outputs)
        doubling = nn.ConvTranspose2d(inputs, hidden, 2, stride=2, groups=inputs)
        pointwise = nn.ConvTranspose2d(hidden, outputs, 1, bias=False)
        norm = nn.GroupNorm(1, outputs, eps=1e-6)
        with torch.no_grad():
            doubling.weight.copy_(tensor(stage["doubling"]["kernel"]))
            doubling.bias.copy_(tensor(stage["doubling"]["bias"]))
            pointwise.weight.copy_(tensor(stage["pointwise"]["kernel"])[:, :, None, None])
            norm.weight.copy_(tensor(stage["norm"]["scale"]))
            norm.bias.copy_(tensor(stage["norm"]["bias"]))
        layers += [doubling, pointwise, norm, nn.GELU()]
    last = nn.ConvTranspose2d(16, 3, 2, stride=2, bias=False)
    with torch.no_grad():
        last.weight.copy_(tensor(params["last"].transpose(0, 3, 1, 2)))
    decoder = nn.Sequential(*layers, last)

    def decode(features):
        trigger = tensor(params["trigger"]).expand(len(features), -1)
        seed = torch.cat([tensor(features), trigger], dim=1).reshape(len(features), 32, 7, 7)
        with torch.no_grad():
            return decoder(seed).permute(0, 2, 3, 1).numpy()

    return decode, sum(p.numel() for p in decoder.parameters()) + params["trigger"].size


@pytest.mark.slow
def test_published_coordinator_equals_its_torch_layers(key):
    generator = coordinator(224, feature_size=768)
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), generator.init(key))
    features = np.asarray(jax.random.normal(key, (3, 768)))
    decode, num_numbers = torch_decoder(params)
    prompts, expected = generator.generate(params, features), decode(features)
    assert num_numbers == 9_920
    np.testing.assert_allclose(prompts, expected, atol=5e-5 * np.abs(expected).max())  # the order of float32 sums


def test_published_coordinator_is_9920_numbers_from_a_grid_of_7_to_224_pixels(key):
    generator = coordinator(224, feature_size=768)
    params = jax.eval_shape(generator.init, key)
    assert num_params(params) == 9_920
    assert params["trigger"].shape == (800,)
    assert jax.eval_shape(generator.generate, params, jnp.zeros((2, 768))).shape == (2, 224, 224, 3)
    module = nnx.eval_shape(lambda: Coordinator(7, 768, BLACKVIP_CHANNELS, rngs=nnx.Rngs(0)))
    assert [stage.pointwise.in_features for stage in module.stages] == [64, 64, 32, 32]


@pytest.mark.parametrize(("generator", "size"), [(full_overlay(224), 150_528), (frame(224, 30), 69_840)])
def test_published_sizes_of_the_other_visual_prompts(generator, size, key):
    """3·224² for the full overlay, and 3·(224² - 164²) for VP's frame of 30 pixels."""
    assert num_params(jax.eval_shape(generator.init, key)) == size


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: low_resolution_overlay(32, 33), "resolution"),
        (lambda: low_resolution_overlay(32, 0), "resolution"),
        (lambda: frame(32, 0), "width"),
        (lambda: frame(32, 16), "width"),
        (lambda: coordinator(336, 768), "image size"),
        (lambda: coordinator(32, 128, SMALL_CHANNELS), "trigger"),
        (lambda: coordinator(32, 48), "trigger"),
        (lambda: coordinator(32, 48, (8, 12, 16)), "channels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()
