import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedbbpt_jax.data.digits import DIGIT_WORDS, Split, paint, split_scans

SIZES = {"pretrain": 897, "pool": 400, "test": 500}


@pytest.fixture(scope="module")
def split() -> Split:
    return split_scans()


@pytest.fixture(scope="module")
def rows(split) -> dict[str, list[int]]:
    """The rows of `load_digits` that each part holds, found by content."""
    images = (load_digits().images / 16).astype(np.float32)
    row_of = {image.tobytes(): row for row, image in enumerate(images)}
    assert len(row_of) == len(images), "two scans are equal, so content does not identify a row"
    return {part: [row_of[glyph.tobytes()] for glyph in getattr(split, part).glyphs] for part in SIZES}


@pytest.mark.parametrize("part", SIZES)
def test_sizes_and_types(split, part):
    scans = getattr(split, part)
    assert scans.glyphs.shape == (SIZES[part], 8, 8)
    assert scans.glyphs.dtype == np.float32
    assert scans.classes.dtype == np.int32
    assert scans.glyphs.min() == 0
    assert scans.glyphs.max() == 1


def test_every_scan_is_in_exactly_one_part(rows):
    """Disjoint by content, and therefore by row; nothing is left out."""
    everything = [row for part in rows.values() for row in part]
    assert sorted(everything) == list(range(1797))


@pytest.mark.parametrize("part", SIZES)
def test_glyphs_keep_their_classes(split, rows, part):
    assert (getattr(split, part).classes == load_digits().target[rows[part]]).all()


@pytest.mark.parametrize("part", SIZES)
def test_parts_are_stratified(split, part):
    """Class counts are proportional to those of all scans; two stratified cuts round at most one scan each."""
    expected = np.bincount(load_digits().target) * SIZES[part] / 1797
    counts = np.bincount(getattr(split, part).classes, minlength=len(DIGIT_WORDS))
    assert np.abs(counts - expected).max() <= 2


def test_split_is_stable(split):
    """A second computation, past the cache, gives the same scans."""
    again = split_scans.__wrapped__()
    for ours, theirs in zip(split, again, strict=True):
        assert (ours.glyphs == theirs.glyphs).all()
        assert (ours.classes == theirs.classes).all()


def paint_one(glyph, *, size=16, top=5, left=9, colour=(0.2, 0.4, 0.8), ground=0.5):
    canvas = np.full((1, 32, 32, 3), ground, np.float32)
    return paint(canvas, glyph[None], *(np.array([x]) for x in (size, top, left)), np.array([colour]))[0]


def test_a_full_glyph_fills_the_inside_of_its_box_with_the_colour():
    """At scale 2 the bilinear edge is half a source pixel, that is one target pixel, wide."""
    image = paint_one(np.ones((8, 8), np.float32), size=16, top=5, left=9)
    inside = image[6:20, 10:24]
    np.testing.assert_allclose(inside, np.broadcast_to((0.2, 0.4, 0.8), inside.shape), atol=1e-6)  # float32
    outside = np.ones((32, 32), bool)
    outside[4:22, 8:26] = False
    assert (image[outside] == 0.5).all()


def test_an_empty_glyph_leaves_the_canvas():
    assert (paint_one(np.zeros((8, 8), np.float32)) == 0.5).all()


def test_a_glyph_at_its_own_size_is_copied_pixel_by_pixel():
    glyph = split_scans().test.glyphs[0]
    image = paint_one(glyph, size=8, top=5, left=9, colour=(1, 1, 1), ground=0.0)
    np.testing.assert_allclose(image[5:13, 9:17, 1], glyph, atol=1e-6)  # float32
    assert image.sum() == pytest.approx(3 * glyph.sum(), rel=1e-5)


def test_enlarging_is_bilinear():
    """One source pixel at scale 4 becomes the outer product of two triangles."""
    glyph = np.zeros((8, 8), np.float32)
    glyph[3, 5] = 1
    image = paint_one(glyph, size=32, top=0, left=0, colour=(1, 1, 1), ground=0.0)[..., 0]
    centres = (np.arange(32) + 0.5) / 4 - 0.5
    triangle = [np.interp(centres, [i - 1, i, i + 1], [0, 1, 0]) for i in (3, 5)]
    np.testing.assert_allclose(image, np.outer(*triangle), atol=1e-6)  # float32


def test_paint_stays_between_the_canvas_and_the_colour():
    rng = np.random.default_rng(0)
    n = 50
    canvas = rng.random((n, 32, 32, 3)).astype(np.float32)
    place = (rng.uniform(10, 30, n), rng.uniform(-5, 20, n), rng.uniform(-5, 20, n))
    images = paint(canvas, split_scans().test.glyphs[:n], *place, rng.random((n, 3)))
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1 + 1e-6  # two float32 products that sum to one
