"""Image messages -> arrays: uint8, gray [H, W] or RGB [H, W, 3].

Works on anything with the attributes of sensor_msgs/Image or CompressedImage: messages of rclpy and of rosbags alike.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from matchanything_ros.errors import UserError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """How the samples of an encoding lie in memory, and the OpenCV conversion that makes them gray or RGB (or none)."""

    dtype: str
    channels: int = 1
    convert: int | None = None


# OpenCV names Bayer patterns by the second row's second and third pixel: its BG is what everybody else calls RGGB.
_BAYER = {
    "rggb": cv2.COLOR_BayerBG2RGB,
    "bggr": cv2.COLOR_BayerRG2RGB,
    "gbrg": cv2.COLOR_BayerGR2RGB,
    "grbg": cv2.COLOR_BayerGB2RGB,
}
ENCODINGS = {
    "mono8": Layout("u1"),
    "8UC1": Layout("u1"),
    "rgb8": Layout("u1", 3),
    "bgr8": Layout("u1", 3, cv2.COLOR_BGR2RGB),
    "8UC3": Layout("u1", 3, cv2.COLOR_BGR2RGB),  # OpenCV's order, as cv_bridge writes it
    "rgba8": Layout("u1", 4, cv2.COLOR_RGBA2RGB),
    "bgra8": Layout("u1", 4, cv2.COLOR_BGRA2RGB),
    "8UC4": Layout("u1", 4, cv2.COLOR_BGRA2RGB),
    "mono16": Layout("u2"),
    "16UC1": Layout("u2"),
    "16SC1": Layout("i2"),
    "32FC1": Layout("f4"),
    "yuv422": Layout("u1", 2, cv2.COLOR_YUV2RGB_UYVY),
    "uyvy": Layout("u1", 2, cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": Layout("u1", 2, cv2.COLOR_YUV2RGB_YUY2),
    "yuyv": Layout("u1", 2, cv2.COLOR_YUV2RGB_YUY2),
    **{f"bayer_{name}8": Layout("u1", 1, code) for name, code in _BAYER.items()},
    **{f"bayer_{name}16": Layout("u2", 1, code) for name, code in _BAYER.items()},
}
# Where cv_bridge gives the same arrays (a test compares). Not for 16 bits and floats: it keeps the high byte or wraps.
# Nor for rows with padding: its Python code divides `step` by the size of a pixel, and shears the image with the rest.
CV_BRIDGE = {"mono8": "mono8", "rgb8": "rgb8", "bgr8": "rgb8", "rgba8": "rgb8", "bgra8": "rgb8"}


@dataclass(frozen=True)
class Stretch:
    """How samples of 16 bits or floating point become 8 bits: linearly from [low, high] to [0, 255], clipped.

    range: a fixed [low, high] in the image's units; None takes the two percentiles of each image, which follows a scene
    (thermal cameras use a small part of their 16 bits) but changes from image to image.
    """

    percentiles: tuple[float, float] = (0.5, 99.5)
    range: tuple[float, float] | None = None


def to_array(message: Any, stretch: Stretch | None = None) -> Array:
    """The pixels of a sensor_msgs/Image or CompressedImage as uint8, gray [H, W] or RGB [H, W, 3].

    The array may be a read-only view of the message's data. Samples of 16 bits and floating point are stretched to 8
    bits; those that are not finite become 0. Raises UserError for encodings not in ENCODINGS and for broken messages.
    """
    stretch = stretch or Stretch()
    if hasattr(message, "encoding"):
        return _raw(message, stretch)
    return _compressed(message, stretch)


def stretch_to_8_bits(image: Array, stretch: Stretch) -> Array:
    """Map samples of any type to uint8 as `stretch` says; see Stretch."""
    if image.dtype == np.uint16:
        low, high = stretch.range or _percentiles16(image, stretch.percentiles)
        table = _scale(np.arange(1 << 16, dtype=np.float32), low, high)
        return np.asarray(table[image])
    values = image.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(image.shape, np.uint8)
    if stretch.range is not None:
        low, high = stretch.range
    else:
        some = values[finite]
        low, high = np.percentile(some, stretch.percentiles)
        if low >= high:  # nearly all of the image has one value: what differs is the content
            low, high = float(some.min()), float(some.max())
    return _scale(np.where(finite, values, np.float32(low)), low, high)


def _raw(message: Any, stretch: Stretch) -> Array:
    encoding, height, width, step = message.encoding, int(message.height), int(message.width), int(message.step)
    layout = ENCODINGS.get(encoding)
    if layout is None:
        raise UserError(f"The image encoding '{encoding}' is not supported: use one of {', '.join(ENCODINGS)}.")
    if height == 0 or width == 0:
        raise UserError(f"The image is empty ({width}x{height} pixels, {encoding}): check the camera driver.")
    samples = np.dtype((">" if message.is_bigendian else "<") + layout.dtype)
    row = width * layout.channels * samples.itemsize
    data = _bytes(message.data)
    if step < row or len(data) < step * (height - 1) + row:  # the last row's padding may be missing
        raise UserError(
            f"The image message is broken: {width}x{height} {encoding} needs rows of at least {row} bytes, "
            f"and it has {len(data)} bytes in rows of {step}; check the camera driver."
        )
    if encoding in CV_BRIDGE and step == row and len(data) == step * height and (bridge := _cv_bridge()) is not None:
        return np.asarray(bridge.imgmsg_to_cv2(message, CV_BRIDGE[encoding]))
    # Rows are cut to their pixels by strides, without a copy: `step` need not be a multiple of the sample.
    strides = (step, layout.channels * samples.itemsize, samples.itemsize)
    pixels: Array = np.ndarray((height, width, layout.channels), samples, data, strides=strides)
    if layout.channels == 1:
        pixels = pixels[..., 0]
    if samples.itemsize > 1:
        pixels = stretch_to_8_bits(pixels.astype(samples.newbyteorder("=")), stretch)
    if layout.convert is None:
        return pixels
    if layout.channels == 2 and width % 2:
        raise UserError(f"The image is {width} pixels wide, and {encoding} needs an even width: check the driver.")
    if encoding.startswith("bayer_") and (width < 4 or height < 4):
        raise UserError(f"The image of {width}x{height} pixels is too small for {encoding}: check the camera driver.")
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels), layout.convert))


def _compressed(message: Any, stretch: Stretch) -> Array:
    if "compressedDepth" in message.format:
        raise UserError(f"The image format '{message.format}' is not supported: use image_transport 'compressed'.")
    # The sensor's own depth and colour; no rotation by EXIF, which would move the pixels of the camera's calibration.
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    data = _bytes(message.data)
    try:
        image = cv2.imdecode(data, flags) if len(data) else None
    except cv2.error:
        image = None
    if image is None:
        raise UserError(
            f"The compressed image (format '{message.format}', {len(data)} bytes) cannot be decoded: "
            "it must be a complete JPEG or PNG."
        )
    if image.dtype != np.uint8:
        image = stretch_to_8_bits(image, stretch)
    return image if image.ndim == 2 else np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


def _bytes(data: Any) -> npt.NDArray[np.uint8]:
    """The data of a message (array.array, bytes or ndarray) as uint8 without a copy."""
    return np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)


def _percentiles16(image: Array, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Percentiles of 16-bit samples from their histogram: exact, and ten times faster than sorting."""
    count = np.cumsum(np.bincount(image.ravel(), minlength=1 << 16))
    low, high = (int(np.searchsorted(count, p / 100 * count[-1], "right" if p < 50 else "left")) for p in percentiles)
    if low >= high:
        low, high = int(image.min()), int(image.max())
    return low, high


def _scale(values: npt.NDArray[np.float32], low: float, high: float) -> npt.NDArray[np.uint8]:
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    scaled = (values - np.float32(low)) * np.float32(255 / (high - low))
    return np.asarray(np.clip(np.rint(scaled), 0, 255), np.uint8)


@functools.cache
def _cv_bridge() -> Any:
    """A CvBridge where ROS has one that can be trusted, else None."""
    if int(np.__version__.split(".")[0]) >= 2:  # builds for numpy 1 crash the process on their first conversion
        return None
    try:
        from cv_bridge import CvBridge
    except ImportError:
        return None
    return CvBridge()
