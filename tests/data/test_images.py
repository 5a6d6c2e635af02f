import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic_images import encode
from transformers import CLIPImageProcessorPil

from fedbbpt_jax.data.images import center_crop, decode_image, grid_means
from fedbbpt_jax.errors import TaskError


def noise(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """A random image of any mode."""
    bands = {"1": 1, "L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
    if mode in ("1", "P"):
        return Image.fromarray(values[..., 0]).convert("RGB").convert(mode)
    return Image.fromarray(values.squeeze(-1) if bands == 1 else values, mode=None if mode != "CMYK" else "CMYK")


def by_processor(image: Image.Image, size: int) -> np.ndarray:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )
    return processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize(("width", "height"), [(300, 200), (97, 251), (224, 224), (31, 33)])
def test_center_crop_is_clips_processor_bit_by_bit(mode, width, height):
    image = noise(mode, width, height)
    ours = center_crop(224)(image)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, by_processor(image, 224))


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_center_crop_of_any_size_is_clips_processor(width, height, size, seed):
    image = noise("RGB", width, height, seed)
    np.testing.assert_array_equal(center_crop(size)(image), by_processor(image, size))


def test_center_crop_takes_the_middle():
    """Three squares side by side, of which the middle one is left."""
    image = Image.new("RGB", (96, 32))
    image.paste((10, 200, 30), (32, 0, 64, 32))
    assert (center_crop(32)(image) == (10, 200, 30)).all()


@pytest.mark.parametrize("size", [0, -3])
def test_center_crop_of_nothing(size):
    with pytest.raises(ValueError, match=f"at least 1 pixel, got {size}"):
        center_crop(size)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_decoding_gives_what_was_encoded(mode):
    image = noise(mode, 13, 7)
    decoded = decode_image(encode(image), "x.png")
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_cmyk_is_converted():
    """Of a CMYK JPEG: no ink is white, full black ink is black."""
    for ink, colour in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0)):
        decoded = decode_image(encode(Image.new("CMYK", (8, 8), ink), "JPEG"), "x.jpg")
        assert np.abs(np.asarray(decoded).astype(int) - colour).max() <= 1  # JPEG


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(mode):
    """Half of the image is an opaque colour, half of it is nothing."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((200, 200, 200, 255), (0, 0, 4, 8))
    pixels = np.asarray(decode_image(encode(image.convert(mode)), "x.png"))
    assert (pixels[:, :4] == 200).all()
    assert (pixels[:, 4:] == 255).all()


def test_partial_transparency_is_blended_with_white():
    decoded = decode_image(encode(Image.new("RGBA", (2, 2), (100, 0, 50, 51))), "x.png")
    expected = np.array([100, 0, 50]) * 0.2 + 255 * 0.8
    np.testing.assert_allclose(np.asarray(decoded)[0, 0], expected, atol=1)  # 8-bit rounding


def test_16_bit_grey_keeps_its_upper_byte():
    values = np.array([[0, 255, 256], [0x1234, 0x80FF, 65535]], np.uint16)
    decoded = decode_image(encode(Image.fromarray(values)), "x.png")
    np.testing.assert_array_equal(np.asarray(decoded)[..., 1], values // 256)


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(orientation, turn):
    """`np.rot90` turns against the clock; orientation 6 means that the image is shown a quarter with the clock."""
    values = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode(Image.fromarray(values), "PNG", exif=exif), "x.png")
    np.testing.assert_array_equal(np.asarray(decoded), np.rot90(values, turn))


def mode_or_message(content: bytes) -> str:
    try:
        return decode_image(content, "photos/cat 7").mode
    except TaskError as error:
        return str(error)


@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_damaged_file_is_an_image_or_one_clear_line(fmt, data):
    content = bytearray(encode(noise("RGB", 9, 8), fmt))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    outcome = mode_or_message(bytes(content))
    assert outcome == "RGB" or outcome.startswith("cannot read the image photos/cat 7: ")
    assert "\n" not in outcome


@pytest.mark.parametrize("content", [b"", b"no image", encode(Image.new("RGB", (64, 64)), "JPEG")[:-200]])
def test_no_image(content):
    with pytest.raises(TaskError, match=r"cannot read the image cat/007\.jpg: "):
        decode_image(content, "cat/007.jpg")


def test_grid_means_of_floats_are_cell_averages():
    images = np.random.default_rng(0).random((3, 8, 8, 3)).astype(np.float32)
    features = grid_means(images).reshape(3, 4, 4, 3)
    assert features.dtype == np.float32
    for row in range(4):
        for column in range(4):
            cell = images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_allclose(features[:, row, column], cell.mean((1, 2)) - 0.5, atol=1e-6)  # float32


@pytest.mark.parametrize("side", [32, 30, 5])
def test_grid_means_of_bytes_are_those_of_their_floats(side):
    images = np.random.default_rng(0).integers(0, 256, (4, side, side + 1, 3), np.uint8)
    np.testing.assert_allclose(grid_means(images), grid_means(images / 255.0), atol=1e-6)  # float32


@given(st.integers(4, 40), st.integers(4, 40), st.integers(1, 4))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_grid_means_use_every_pixel_once(height, width, grid):
    """A cell's mean times its size is its sum; the sums of all cells are the sum of the image."""
    image = np.random.default_rng(0).random((1, height, width, 3))
    means = grid_means(image, grid).reshape(grid, grid, 3) + 0.5
    rows, columns = (np.diff([i * side // grid for i in range(grid + 1)]) for side in (height, width))
    sums = means * rows[:, None, None] * columns[None, :, None]
    np.testing.assert_allclose(sums.sum((0, 1)), image.sum((0, 1, 2)), rtol=1e-5)  # float32


def test_grid_means_of_images_smaller_than_the_grid():
    with pytest.raises(ValueError, match="at least 4 pixels a side, got 3x9"):
        grid_means(np.zeros((1, 3, 9, 3)))
