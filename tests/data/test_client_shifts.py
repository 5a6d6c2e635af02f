import numpy as np
import pytest

from fedbbpt_jax.data.client_shifts import CORRUPTIONS, corruption_of, shift_clients

NUM_CLIENTS = 12
PARTS = [np.arange(client, 48, NUM_CLIENTS) for client in range(NUM_CLIENTS)]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """48 pictures of grey values away from black and white, with a bright square at random places."""
    rng = np.random.default_rng(0)
    images = rng.integers(90, 130, (48, 16, 20, 3), dtype=np.uint8)
    for image, (top, left) in zip(images, rng.integers(0, 10, (48, 2)), strict=True):
        image[top : top + 6, left : left + 6] = 190
    return images


def clients_of(name: str) -> list[int]:
    return [client for client in range(NUM_CLIENTS) if corruption_of(client, seed=0) == name]


def corrupt(name: str, images: np.ndarray, severity: float, seed: int = 0) -> np.ndarray:
    return CORRUPTIONS[name](images.astype(np.float32) / 255, np.random.default_rng(seed), severity)


def test_pictures_come_back_as_they_were_but_shifted(images):
    before = images.copy()
    shifted = shift_clients(images, PARTS, seed=0)
    assert (images == before).all()
    assert shifted.dtype == np.uint8
    assert shifted.shape == images.shape
    assert all((shifted[part] != images[part]).any() for part in PARTS)


def test_floats_stay_floats_and_are_shifted_alike(images):
    shifted = shift_clients(images, PARTS, seed=0)
    floats = shift_clients(images.astype(np.float32) / 255, PARTS, seed=0)
    assert floats.dtype == np.float32
    assert floats.min() >= 0
    assert floats.max() <= 1
    np.testing.assert_allclose(floats, shifted / 255, atol=0.5 / 255 + 1e-6)  # rounding to bytes


def test_strength_0_changes_nothing(images):
    assert (shift_clients(images, PARTS, seed=0, strength=0.0) == images).all()


def test_same_seed_same_pictures_another_seed_others(images):
    first, again, other = (shift_clients(images, PARTS, seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_a_client_does_not_depend_on_the_others(images):
    """Alone, or with other rows at the other clients, client 2 sees what it saw."""
    whole = shift_clients(images, PARTS, seed=0)
    alone = shift_clients(images, [PARTS[0][:1], PARTS[1][:0], PARTS[2]], seed=0)
    assert (alone[PARTS[2]] == whole[PARTS[2]]).all()
    untouched = np.setdiff1d(np.arange(48), [PARTS[0][0], *PARTS[2]])
    assert (alone[untouched] == images[untouched]).all()


def test_every_kind_is_drawn_as_often():
    """Of 1,000 clients 200 have each kind, with standard deviation 12.6."""
    names = [corruption_of(client, seed=0) for client in range(1000)]
    assert set(names) == set(CORRUPTIONS)
    assert all(abs(names.count(name) - 200) < 50 for name in CORRUPTIONS)
    assert names[:20] != [corruption_of(client, seed=1) for client in range(20)]


def test_all_pictures_of_a_client_are_shifted_by_one_amount(images):
    """Brightness adds one number to all its pictures, another one at another client."""
    shifted = shift_clients(images, PARTS, seed=0, strength=0.3).astype(int)
    first, second = clients_of("brightness")[:2]
    amounts = [set((shifted[part] - images[part]).ravel()) for part in (PARTS[first], PARTS[second])]
    assert all(len(amount) == 1 for amount in amounts)
    assert amounts[0] != amounts[1]


def test_severities_are_between_half_the_strength_and_the_whole(images):
    """Brightness moves a picture by half of the severity."""
    parts = [np.array([0])] * 200
    for client in (c for c in range(200) if corruption_of(c, seed=0) == "brightness"):
        alone = [part[:0] for part in parts[:client]] + [np.array([0])]
        moved = shift_clients(images[:1] * 0 + np.uint8(128), alone, seed=0, strength=0.4) - 128.0
        assert 255 * 0.1 - 1 <= abs(moved.mean()) <= 255 * 0.2 + 1


def test_brightness_goes_both_ways(images):
    amounts = [(corrupt("brightness", images, 0.5, seed) - images / 255).mean() for seed in range(10)]
    np.testing.assert_allclose(sorted(set(np.round(amounts, 4))), [-0.25, 0.25])


def test_contrast_keeps_the_mean_and_shrinks_the_rest(images):
    plain, flat = images / 255, corrupt("contrast", images, 1.0)
    np.testing.assert_allclose(flat.mean((1, 2)), plain.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(flat.std((1, 2)), 0.05 * plain.std((1, 2)), atol=1e-5)


def test_colour_cast_moves_towards_one_saturated_colour(images):
    colours = [(corrupt("colour cast", images, 1.0, seed) - 0.3 * images / 255) / 0.7 for seed in range(5)]
    for colour in colours:
        np.testing.assert_allclose(colour, np.broadcast_to(colour[0, 0, 0], colour.shape), atol=1e-5)
        assert colour.max() > 0.999
        assert colour.min() < 0.001
    assert len({tuple(colour[0, 0, 0].round(3)) for colour in colours}) == 5


def test_noise_has_its_standard_deviation_and_none_in_common(images):
    noise = corrupt("Gaussian noise", images, 0.5) - images / 255
    np.testing.assert_allclose(noise.std(), 0.19, rtol=0.02)  # 46,080 values: 0.3 %
    assert abs(noise.mean()) < 0.005
    assert abs(np.corrcoef(noise.reshape(48, -1))[np.triu_indices(48, 1)]).max() < 0.2


def test_blur_of_a_point_is_a_gaussian():
    """Severity 1 at 224 pixels is sigma 6, and what is lost at no edge stays."""
    point = np.zeros((1, 99, 224, 3), np.float32)
    point[0, 49, 112] = 1
    blurred = CORRUPTIONS["blur"](point, np.random.default_rng(0), 1.0)
    y, x = np.mgrid[:99, :224] - np.array([49, 112])[:, None, None]
    expected = np.exp(-(x**2 + y**2) / 72) / (72 * np.pi)
    np.testing.assert_allclose(blurred[0, :, :, 0], expected, atol=2e-6)
    np.testing.assert_allclose(blurred.sum((1, 2)), 1, atol=1e-4)


def test_blur_of_small_pictures_is_not_lost(images):
    """2 pixels at 32 as at 20: a point keeps 1 / (8·pi) of its light."""
    point = np.zeros((1, 32, 32, 3), np.float32)
    point[0, 16, 16] = 1
    np.testing.assert_allclose(
        CORRUPTIONS["blur"](point, np.random.default_rng(0), 1.0).max(), 1 / (8 * np.pi), rtol=0.01
    )


def test_blur_mirrors_at_the_edges_and_keeps_an_even_picture(images):
    even = np.full((1, 7, 9, 3), 0.3, np.float32)
    np.testing.assert_allclose(CORRUPTIONS["blur"](even, np.random.default_rng(0), 1.0), even, atol=1e-6)
    mirrored = np.concatenate([images[:, ::-1], images, images[:, ::-1]], 1)
    np.testing.assert_allclose(corrupt("blur", images, 1.0), corrupt("blur", mirrored, 1.0)[:, 16:32], atol=1e-5)


def test_ten_thousand_clients():
    images = np.full((10_000, 4, 4, 3), 100, np.uint8)
    shifted = shift_clients(images, list(np.arange(10_000)[:, None]), seed=0)
    assert (shifted != images).any((1, 2, 3)).mean() > 0.5  # contrast and blur leave an even picture as it is


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_bad_strength(images, strength):
    with pytest.raises(ValueError, match=f"strength must be between 0 and 1, got {strength}"):
        shift_clients(images, PARTS, seed=0, strength=strength)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 4, 4, 3), int), np.zeros((4, 4, 3), np.uint8), np.zeros((2, 4, 4, 1), np.uint8)],
    ids=["int64", "one", "grey"],
)
def test_what_is_no_picture(images):
    with pytest.raises(ValueError, match=r"images must be uint8 or floats \[n, H, W, 3\], got "):
        shift_clients(images, [np.array([0])], seed=0)
