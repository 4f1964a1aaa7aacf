"""Sizes, padding, colour, and pixel conventions of the way into the network and back."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matchanything_ros.bundle import InputSpec, Preprocess
from matchanything_ros.errors import UserError
from matchanything_ros.preprocess import check_image, content_size, input_size, prepare
from matchanything_ros.resample import resize, resize_matrix

FIXED = InputSpec("image0", 0, (480, 640), (480, 640), (480, 640))
DYNAMIC = InputSpec("image0", 0, (64, 64), (480, 640), (1024, 1024))


@given(st.integers(2, 4000), st.integers(2, 4000), st.sampled_from(["fit", "fit_down"]))
def test_dynamic_sizes_stay_in_the_range_and_keep_the_aspect(height: int, width: int, policy: str) -> None:
    preprocess = Preprocess(resize=policy, divisor=32)
    content = content_size(height, width, preprocess, DYNAMIC)
    size = input_size(content, preprocess, DYNAMIC)
    assert all(low <= side <= high for low, side, high in zip(DYNAMIC.min, size, DYNAMIC.max, strict=True))
    assert all(side % 32 == 0 and side >= inside for side, inside in zip(size, content, strict=True))
    if policy == "fit_down":
        assert content[0] <= height and content[1] <= width
    # Rounding to whole pixels moves a side by at most half a pixel.
    factor = content[0] / height if height > width else content[1] / width
    assert abs(content[0] - height * factor) <= 0.5 + 1 or content[0] == 1
    assert abs(content[1] - width * factor) <= 0.5 + 1 or content[1] == 1


@given(st.integers(300, 4000), st.integers(300, 4000))
def test_fit_stretch_is_what_loftr_and_its_successors_do(height: int, width: int) -> None:
    """get_resized_wh and get_divisible_wh of their datasets, written down once more: rounded, then cut to the step."""
    spec = InputSpec("image0", 0, (32, 32), (480, 832), (832, 832))
    scale = 832 / max(height, width)
    wanted = tuple(max(round(side * scale) // 32 * 32, 32) for side in (height, width))
    assert content_size(height, width, Preprocess(resize="fit_stretch", divisor=32), spec) == wanted
    assert max(wanted) == 832


def test_an_image_of_extreme_shape_is_not_reduced_to_nothing() -> None:
    array, _ = prepare(np.zeros((2, 3400), np.uint8), Preprocess(channels="gray", long_side_limit=832), FIXED)
    assert array.shape[2:] == FIXED.opt


@pytest.mark.parametrize("policy", ["stretch", "fit", "fit_down"])
@pytest.mark.parametrize("shape", [(375, 1242), (1080, 1920), (100, 80), (480, 640)])
def test_a_point_comes_back_where_it_was(policy: str, shape: tuple[int, int]) -> None:
    """A blob at a known place of the image is found at the place that the map back says, for every resizing policy."""
    centre = np.array([shape[1] * 0.61, shape[0] * 0.37])
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    sigma = max(shape) / 60
    blob = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * sigma**2)).astype(np.float32)
    preprocess = Preprocess(channels="gray", resize=policy, interpolation="area")
    array, back = prepare(blob, preprocess, FIXED)
    assert array.shape == (1, 1, 480, 640) and array.dtype == np.float32
    plane = array[0, 0].astype(np.float64)
    ny, nx = np.mgrid[0:480, 0:640]
    found = np.array([(plane * nx).sum(), (plane * ny).sum()]) / plane.sum()
    # The centroid of a smooth blob is resampled to a few hundredths of a pixel; a convention off by a half shows.
    scale = max(back.scale_x, back.scale_y)
    assert np.abs(back(found[None].astype(np.float32))[0] - centre).max() < 0.05 * max(scale, 1)


def test_padding_is_zero_and_right_and_below() -> None:
    array, _ = prepare(np.full((100, 100, 3), 255, np.uint8), Preprocess(resize="fit_down", divisor=32), DYNAMIC)
    assert array.shape == (1, 3, 128, 128)
    assert np.allclose(array[0, :, :100, :100], 1) and array[0, :, 100:].max() == 0 and array[0, :, :, 100:].max() == 0


def test_gray_and_colour_are_made_from_each_other() -> None:
    rgb = np.zeros((480, 640, 3), np.uint8)
    rgb[..., 0] = 200  # red: ITU-R 601 gives it 0.299
    gray, _ = prepare(rgb, Preprocess(channels="gray"), FIXED)
    assert np.allclose(gray, 0.299 * 200 / 255, atol=1e-4)
    three, _ = prepare(rgb[..., 0], Preprocess(channels="rgb"), FIXED)
    assert three.shape[1] == 3 and np.allclose(three, 200 / 255, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 64), (97, 64), (150, 200)])
def test_gray_first_is_what_pil_does(size: tuple[int, int]) -> None:
    """To the bit, but for sums at a half, which PIL forms in 22-bit integers."""
    pil = pytest.importorskip("PIL.Image")
    rgb = np.random.default_rng(0).integers(0, 256, (97, 131, 3), np.uint8)
    preprocess = Preprocess(channels="gray", gray="pil_l_first", interpolation="lanczos")
    for image in (rgb, rgb[..., 0], rgb.astype(np.float32) / 255):
        given, _ = prepare(image, preprocess, InputSpec("image0", 0, size, size, size))
        as_bytes = (image * 255).astype(np.uint8) if image.dtype == np.float32 else image
        expected = np.asarray(pil.fromarray(as_bytes).convert("L").resize(size[::-1], pil.LANCZOS), np.float32)
        off = np.abs(given[0, 0] * 255 - expected)
        assert off.max() < 1.01 and (off > 0.01).mean() < 1e-3


def test_pil_l_is_the_integer_formula() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    gray, _ = prepare(rgb, Preprocess(channels="gray", gray="pil_l"), FIXED)
    red, green, blue = rgb.astype(np.int64).transpose(2, 0, 1)
    assert np.array_equal(np.round(gray[0, 0] * 255), (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)


def test_antialiased_resizing_keeps_constants_and_averages() -> None:
    for source, target in ((640, 224), (100, 300), (480, 480)):
        matrix = resize_matrix(source, target, "bicubic_antialias")
        assert matrix.shape == (target, source) and np.allclose(matrix.sum(1), 1, atol=1e-6)
    stripes = np.tile(np.array([0, 1], np.float32), (64, 512))
    assert np.abs(resize(stripes, 16, 64, "bicubic_antialias") - 0.5)[:, 2:-2].max() < 1e-3  # would alias without


def test_area_switches_to_linear_when_a_side_grows() -> None:
    image = np.random.default_rng(1).random((100, 400), np.float32)
    assert np.array_equal(
        resize(image, 200, 200, "area"), cv2.resize(image, (200, 200), interpolation=cv2.INTER_LINEAR)
    )


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((0, 10), np.uint8), "empty"),
        (np.zeros((10, 10, 4), np.uint8), "shape"),
        (np.zeros((10, 10), np.uint16), "uint16"),
        (np.full((10, 10), np.nan, np.float32), "not finite"),
    ],
)
def test_what_is_no_image_is_refused(image: np.ndarray, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_image(image)
