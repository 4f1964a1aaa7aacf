"""Image -> network input, as the bundle's manifest says; and network pixels back to pixels of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from matchanything_ros.bundle import InputSpec, Preprocess
from matchanything_ros.errors import UserError
from matchanything_ros.resample import resize

Image = npt.NDArray[Any]
Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ToOriginal:
    """Pixels of the network's input -> pixels of the original image (both with centres at integers)."""

    scale_x: float
    scale_y: float

    def __call__(self, keypoints: Float) -> Float:
        """Map keypoints [N, 2] (x, y). Resizing keeps edges, not centres: hence the half pixels."""
        scale = np.array([self.scale_x, self.scale_y], np.float32)
        return (keypoints + np.float32(0.5)) * scale - np.float32(0.5)


def check_image(image: Image, name: str = "image") -> None:
    """Raise UserError unless this is a finite, non-empty uint8 or float32 image, gray [H, W] or RGB [H, W, 3]."""
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        shape = getattr(image, "shape", type(image).__name__)
        raise UserError(f"{name} has shape {shape}: give a gray [H, W] or RGB [H, W, 3] array.")
    if image.shape[0] < 2 or image.shape[1] < 2:
        size = f"{image.shape[1]}x{image.shape[0]} pixels"
        raise UserError(f"{name} is {'too small' if image.size else 'empty'} ({size}): give at least 2x2 pixels.")
    if image.dtype != np.uint8 and image.dtype != np.float32:
        raise UserError(f"{name} has type {image.dtype}: give uint8, or float32 in [0, 1].")
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise UserError(f"{name} has values that are not finite (NaN or infinity): replace them before matching.")


def content_size(height: int, width: int, preprocess: Preprocess, spec: InputSpec) -> tuple[int, int]:
    """(height, width) that an image takes inside the network's input, before padding."""
    if preprocess.resize == "stretch":
        return spec.opt
    limit_h, limit_w = spec.opt
    if not spec.fixed:  # either orientation, as far as the shape range allows
        limit_h, limit_w = min(max(spec.opt), spec.max[0]), min(max(spec.opt), spec.max[1])
    factor = min(limit_h / height, limit_w / width)
    if preprocess.resize == "fit_down":
        factor = min(factor, 1.0)
    if preprocess.resize == "fit_stretch":
        # Rounded, then cut, as LoFTR and its successors do: the product of 720 and 832 / 720 is below 832.
        step, sides = preprocess.divisor, scaled(height, width, factor)
        return max(sides[0] // step * step, spec.min[0]), max(sides[1] // step * step, spec.min[1])
    return scaled(height, width, factor)


def scaled(height: int, width: int, factor: float) -> tuple[int, int]:
    """(height, width) times the factor, in whole pixels and at least one."""
    return max(round(height * factor), 1), max(round(width * factor), 1)


def input_size(content: tuple[int, int], preprocess: Preprocess, spec: InputSpec) -> tuple[int, int]:
    """(height, width) of the network's input for an image that takes `content` in it."""
    if spec.fixed:
        return spec.opt
    step = preprocess.divisor
    height, width = (max(-(-side // step) * step, least) for side, least in zip(content, spec.min, strict=True))
    return height, width


def prepare(image: Image, preprocess: Preprocess, spec: InputSpec) -> tuple[Float, ToOriginal]:
    """Make one network input, float32 [1, C, H, W] in [0, 1], from an image that `check_image` accepts.

    Returns it with the map from its pixels back to the image's.
    """
    height, width = image.shape[:2]
    content = content_size(height, width, preprocess, spec)
    back = ToOriginal(width / content[1], height / content[0])
    # Resizing 8-bit values would round; converting first keeps what the networks were trained with. Where the result is
    # to be truncated, values stay in [0, 255] till then: a rounding more on the way costs a gray level here and there.
    pixels: Float = image.astype(np.float32)
    scale = None if preprocess.gray == "luma" else 255.0 if image.dtype == np.float32 else 1.0
    if scale is not None:
        pixels *= np.float32(scale)
    elif image.dtype == np.uint8:
        pixels *= np.float32(1 / 255)
    if preprocess.channels == "rgb" and pixels.ndim == 2:
        pixels = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB), np.float32)
    if preprocess.channels == "gray" and pixels.ndim == 3 and preprocess.gray == "luma":
        pixels = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.float32)
    eight_bits = preprocess.channels == "gray" and preprocess.gray == "pil_l_first"
    if eight_bits:
        pixels = _pil_l(pixels)
    limit = preprocess.long_side_limit
    if limit is not None and max(height, width) > limit:
        pixels = resize(pixels, *scaled(height, width, limit / max(height, width)), "area")
    if eight_bits:
        pixels = _rounded(resize(pixels, pixels.shape[0], content[1], preprocess.interpolation))
        pixels = _rounded(resize(pixels, content[0], content[1], preprocess.interpolation))
    else:
        pixels = resize(pixels, content[0], content[1], preprocess.interpolation)
        if preprocess.gray == "pil_l" and preprocess.channels == "gray":
            pixels = _pil_l(pixels)
    if scale is not None:
        pixels = pixels / np.float32(255)
    planes = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
    size = input_size(content, preprocess, spec)
    out = np.zeros((1, planes.shape[0], *size), np.float32)
    out[0, :, : content[0], : content[1]] = planes
    return out, back


def _pil_l(pixels: Float) -> Float:
    """[0, 255]: truncate to 8 bits, then luma in PIL's integer arithmetic (ITU-R 601)."""
    bytes_ = np.clip(pixels, 0, 255).astype(np.uint8)
    if bytes_.ndim == 3:
        red, green, blue = (bytes_[..., channel].astype(np.uint32) for channel in range(3))
        bytes_ = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)
    return bytes_.astype(np.float32)


def _rounded(pixels: Float) -> Float:
    """To 8 bits as PIL rounds, kept as float32."""
    return np.asarray(np.clip(np.floor(pixels + np.float32(0.5)), 0, 255), np.float32)
