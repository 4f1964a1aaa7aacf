"""Image messages of every encoding, padding and byte order become the same arrays; broken ones become one sentence."""

from __future__ import annotations

import array
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from matchanything_ros import images
from matchanything_ros.errors import UserError
from matchanything_ros.images import CV_BRIDGE, ENCODINGS, Stretch, to_array

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 8, 3), np.uint8)
GRAY = RGB[..., 0].copy()


def message(pixels: np.ndarray, encoding: str, padding: int = 0, big: bool = False) -> SimpleNamespace:
    """An image message as rclpy delivers it: flat array.array, `padding` bytes of rubbish after each row."""
    rows = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")))
    rows = rows.view(np.uint8).reshape(len(pixels), -1)
    rows = np.hstack([rows, np.full((len(rows), padding), 77, np.uint8)])
    height, width = pixels.shape[:2]
    return SimpleNamespace(
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=int(big),
        step=rows.shape[1],
        data=array.array("B", rows.tobytes()),
    )


def with_alpha(rgb: np.ndarray) -> np.ndarray:
    return np.dstack([rgb, RNG.integers(0, 256, rgb.shape[:2], np.uint8)])


@pytest.mark.parametrize("padding", [0, 1, 13])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    ("encoding", "pixels", "expected"),
    [
        ("mono8", GRAY, GRAY),
        ("8UC1", GRAY, GRAY),
        ("rgb8", RGB, RGB),
        ("bgr8", RGB[..., ::-1], RGB),
        ("8UC3", RGB[..., ::-1], RGB),
        ("rgba8", with_alpha(RGB), RGB),
        ("bgra8", with_alpha(RGB[..., ::-1]), RGB),
    ],
)
def test_8_bits_are_exact(encoding: str, pixels: np.ndarray, expected: np.ndarray, padding: int, big: bool) -> None:
    result = to_array(message(pixels, encoding, padding, big))
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("padding", [0, 1, 6])  # 1: rows that are no whole number of samples
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(("encoding", "dtype"), [("mono16", "u2"), ("16UC1", "u2"), ("16SC1", "i2"), ("32FC1", "f4")])
def test_a_stated_range_is_linear(encoding: str, dtype: str, padding: int, big: bool) -> None:
    low, high = 1000, 3550  # 10 units to a gray level
    levels = np.arange(48).reshape(6, 8) * 5
    pixels = (low + levels * 10).astype(dtype)
    result = to_array(message(pixels, encoding, padding, big), Stretch(range=(low, high)))
    np.testing.assert_array_equal(result, levels)
    outside = to_array(message(np.array([[0, 9000]], dtype), encoding), Stretch(range=(low, high)))
    assert outside.tolist() == [[0, 255]]  # clipped, not wrapped


@pytest.mark.parametrize(("encoding", "dtype"), [("mono16", "u2"), ("16UC1", "u2"), ("32FC1", "f4")])
def test_percentiles_use_the_whole_range_of_a_thermal_image(encoding: str, dtype: str) -> None:
    scene = np.linspace(7300, 7600, 100 * 100).reshape(100, 100).astype(dtype)
    scene[0, 0], scene[99, 99] = 0, 16000  # a dead and a hot pixel must not squeeze the scene
    result = to_array(message(scene, encoding))
    assert result[result.shape[0] // 2].mean() == pytest.approx(127.5, abs=3)
    assert np.percentile(result, 2) < 6 and np.percentile(result, 98) > 249
    assert (np.diff(result.ravel()[1:-1].astype(int)) >= 0).all()


def test_percentiles_of_16_bits_and_floats_agree() -> None:
    scene = RNG.normal(7000, 80, (120, 160)).round()
    as16, as32 = (to_array(message(scene.astype(t), e)) for t, e in (("u2", "mono16"), ("f4", "32FC1")))
    assert np.abs(as16.astype(int) - as32).max() <= 1  # interpolated or not between neighbouring samples


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_images_of_one_value_and_of_one_bright_spot(dtype: str) -> None:
    encoding = {"u2": "mono16", "f4": "32FC1"}[dtype]
    flat = np.full((50, 50), 7000, dtype)
    assert not to_array(message(flat, encoding)).any()
    flat[25, 25] = 7100  # fewer than the percentile cuts away, but all there is
    assert to_array(message(flat, encoding))[25, 25] == 255


def test_values_that_are_not_finite_are_black() -> None:
    pixels = np.linspace(1, 2, 48, dtype=np.float32).reshape(6, 8)
    pixels[0, :3] = np.nan, np.inf, -np.inf
    result = to_array(message(pixels, "32FC1"))
    assert result[0, :3].tolist() == [0, 0, 0] and result[5, 7] == 255
    assert not to_array(message(np.full((4, 4), np.nan, np.float32), "32FC1")).any()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("pattern", "first"), [("rggb", "rg"), ("bggr", "bg"), ("gbrg", "gb"), ("grbg", "gr")])
def test_bayer_patterns_give_the_colour_back(pattern: str, first: str, bits: int) -> None:
    assert pattern.startswith(first)
    colour = {"r": 200, "g": 120, "b": 40}
    p = [colour[letter] for letter in pattern]
    mosaic = np.tile(np.array([p[:2], p[2:]]), (8, 8))
    pixels = mosaic.astype(np.uint8 if bits == 8 else np.uint16)
    result = to_array(message(pixels, f"bayer_{pattern}{bits}", padding=2), Stretch(range=(0, 255)))
    assert result[4:-4, 4:-4].reshape(-1, 3).mean(0) == pytest.approx([200, 120, 40], abs=1)


@pytest.mark.parametrize(("encoding", "luma"), [("yuv422", 1), ("uyvy", 1), ("yuv422_yuy2", 0), ("yuyv", 0)])
def test_yuv_order(encoding: str, luma: int) -> None:
    pixels = np.full((4, 6, 2), 128, np.uint8)
    pixels[..., luma] = 16 + np.arange(6) * 40  # gray ramp; video range 16..235
    result = to_array(message(pixels, encoding, padding=3))
    np.testing.assert_allclose(result[0, :, 0], np.arange(6) * 40 * 255 / 219, atol=2)
    assert np.ptp(result, axis=2).max() <= 2  # gray
    with pytest.raises(UserError, match="even width"):
        to_array(message(pixels[:, :5], encoding))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("kind", ["gray", "colour", "gray16"])
def test_compressed(suffix: str, kind: str) -> None:
    smooth = cv2.resize(RGB, (64, 48), interpolation=cv2.INTER_CUBIC)
    pixels = {"gray": smooth[..., 0], "colour": smooth, "gray16": smooth[..., 0].astype(np.uint16) * 10 + 5000}[kind]
    if kind == "gray16" and suffix == ".jpg":
        pytest.skip("JPEG has 8 bits")
    encoded = cv2.imencode(suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels, [cv2.IMWRITE_JPEG_QUALITY, 98])[1]
    compressed = SimpleNamespace(format="jpeg", data=array.array("B", encoded.tobytes()))
    result = to_array(compressed, Stretch(range=(5000, 7550)))
    expected = smooth if kind == "colour" else smooth[..., 0]
    assert result.shape == expected.shape and result.dtype == np.uint8
    assert np.abs(result.astype(int) - expected).mean() < (6 if suffix == ".jpg" else 0.01)
    compressed.data = compressed.data[: len(compressed.data) // 8]
    if suffix == ".png":  # of a truncated JPEG, decoders show the upper part
        with pytest.raises(UserError, match="cannot be decoded"):
            to_array(compressed)


@pytest.mark.parametrize("data", [b"", b"garbage" * 10])
def test_compressed_garbage(data: bytes) -> None:
    with pytest.raises(UserError, match="cannot be decoded"):
        to_array(SimpleNamespace(format="jpeg", data=data))
    with pytest.raises(UserError, match="compressedDepth"):
        to_array(SimpleNamespace(format="16UC1; compressedDepth png", data=data))


def test_an_unknown_encoding_is_named() -> None:
    with pytest.raises(UserError, match=r"'nv12' is not supported.*mono8.*bayer_rggb8"):
        to_array(message(GRAY, "nv12"))


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_broken_messages_of_every_encoding(encoding: str) -> None:
    layout = ENCODINGS[encoding]
    whole = message(np.zeros((6, 8, layout.channels), layout.dtype), encoding)
    assert to_array(whole).shape[:2] == (6, 8)
    for change, sentence in (
        ({"data": whole.data[:-1]}, "broken"),
        ({"data": array.array("B")}, "broken"),
        ({"step": 0}, "broken"),
        ({"step": whole.step - 1}, "broken"),
        ({"height": 2**31}, "broken"),
        ({"width": 2**31}, "broken"),
        ({"height": 0}, "empty"),
        ({"width": 0}, "empty"),
    ):
        with pytest.raises(UserError, match=sentence):
            to_array(SimpleNamespace(**{**vars(whole), **change}))
    last_row_unpadded = message(np.zeros((6, 8, layout.channels), layout.dtype), encoding, padding=4)
    last_row_unpadded.data = last_row_unpadded.data[:-4]
    assert to_array(last_row_unpadded).shape[:2] == (6, 8)


@pytest.mark.parametrize("encoding", sorted(CV_BRIDGE))
def test_cv_bridge_gives_equal_arrays(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if images._cv_bridge() is None:
        pytest.skip("no usable cv_bridge here: it comes with a ROS installation (not with the wheels), for numpy 1")
    sensor_msgs = pytest.importorskip("sensor_msgs.msg")
    source = message(RNG.integers(0, 256, (6, 8, ENCODINGS[encoding].channels), np.uint8), encoding)
    real = sensor_msgs.Image(**vars(source))
    bridged = to_array(real)
    monkeypatch.setattr(images, "_cv_bridge", lambda: None)
    np.testing.assert_array_equal(bridged, to_array(real))


def test_cv_bridge_is_used_where_it_is_right_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Bridge:
        def imgmsg_to_cv2(self, source: SimpleNamespace, desired: str) -> np.ndarray:
            calls.append((source.encoding, desired))
            return np.zeros((source.height, source.width), np.uint8)

    monkeypatch.setattr(images, "_cv_bridge", Bridge)
    for encoding, layout in ENCODINGS.items():
        to_array(message(np.zeros((6, 8, layout.channels), layout.dtype), encoding))
    assert dict(calls) == CV_BRIDGE
    calls.clear()
    for padding in (1, 2, 6):  # 6 bytes are two pixels of rgb8: even those are not left to it
        to_array(message(np.zeros((6, 8, 3), np.uint8), "rgb8", padding=padding))
    assert calls == []
