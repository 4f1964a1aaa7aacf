"""Pictures of matches and of dense warps, for images of any size and kind.

Images come in as RGB or gray (uint8, or float32 in [0, 1]) and pictures go out as RGB uint8 [H, W, 3].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from matchanything_ros.errors import UserError
from matchanything_ros.homography import front_of, project

Picture = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

GAP = 8  # pixels between the two images
SUBPIXEL = 4  # fractional bits of OpenCV's drawing coordinates
OUTLIER = (226, 74, 51)
OUTLINE = (255, 196, 0)
TRUTH = (255, 255, 255)
BACKGROUND = 24


def draw_matches(
    image0: npt.NDArray[Any],
    image1: npt.NDArray[Any],
    keypoints0: Float,
    keypoints1: Float,
    inliers: Mask | None = None,
    scores: Float | None = None,
    homography: Matrix | None = None,
    truth: Matrix | None = None,
    caption: str = "",
    width: int = 1280,
    max_lines: int = 80,
) -> Picture:
    """Both images side by side at one height, `width` pixels in all, with their matches.

    keypoints0, keypoints1: [N, 2], (x, y) in pixels of the images. Every match is a point in both images; lines are
    drawn for at most max_lines of them, spread over image 0, so that the image stays visible below. Colour: with
    `inliers`, yellow to violet by place for inliers (a line's two ends are found by its colour) and red for outliers;
    else by score from violet (low) to yellow (high). homography and truth: the outline of image 0 in
    image 1, in yellow as estimated and in white as it should be.
    """
    left, right, scale0, scale1 = _side_by_side(image0, image1, width)
    height = max(left.shape[0], right.shape[0])
    canvas = np.full((height, left.shape[1] + GAP + right.shape[1], 3), BACKGROUND, np.uint8)
    canvas[: left.shape[0], : left.shape[1]] = left
    canvas[: right.shape[0], left.shape[1] + GAP :] = right
    offset = np.array([left.shape[1] + GAP, 0.0])
    # Pixel centres are integers: resizing maps x to (x + 0.5) * scale - 0.5.
    p0 = (np.asarray(keypoints0, np.float64).reshape(-1, 2) + 0.5) * scale0 - 0.5
    p1 = (np.asarray(keypoints1, np.float64).reshape(-1, 2) + 0.5) * scale1 - 0.5 + offset
    colours = _colours(p0, left.shape, inliers, scores)
    good = np.ones(len(p0), bool) if inliers is None else np.asarray(inliers, bool)
    unit = max(1, round(height / 480))
    outliers = np.flatnonzero(~good)
    lines = canvas.copy()
    for index in _spread(p0, outliers, max_lines // 4):
        _line(lines, p0[index], p1[index], OUTLIER, 1)
    canvas = np.asarray(cv2.addWeighted(lines, 0.35, canvas, 0.65, 0), np.uint8)
    for index in _spread(p0, np.flatnonzero(good), max_lines):
        _line(canvas, p0[index], p1[index], colours[index], unit)
    radius = unit * (2.5 if len(p0) <= 500 else 1.5)  # thousands of large dots would hide the images
    for index in (*outliers, *np.flatnonzero(good)):  # inliers last, on top
        _dot(canvas, p0[index], colours[index], radius)
        _dot(canvas, p1[index], colours[index], radius)
    panel = canvas[: right.shape[0], left.shape[1] + GAP :]
    ends = [np.asarray(x, np.float64).reshape(-1, 2)[good] for x in (keypoints0, keypoints1)]
    for matrix, colour in ((truth, TRUTH), (homography, OUTLINE)):
        if matrix is not None:
            _outline(panel, image0.shape[:2], matrix, front_of(matrix, *ends), scale1, colour, 2 * unit)
    return _captioned(canvas, caption)


def draw_dense(image0: npt.NDArray[Any], image1: npt.NDArray[Any], warp: Float, cert: Float) -> Picture:
    """A dense match as four panels: image 0, image 1; image 1 warped onto image 0, certainty over image 0.

    warp: [4, H, W] with (x0, y0, x1, y1) in [-1, 1] from edge to edge of the images; cert: [H, W] in [0, 1]. A
    symmetric warp holds image 0's grid in its left half and image 1's in its right half: the left one is shown.
    The warped image fades to dark where the match is uncertain.
    """
    if warp.ndim != 3 or warp.shape[0] != 4 or cert.shape != warp.shape[1:]:
        raise UserError(f"A dense match is warp [4, H, W] and cert [H, W]; these are {warp.shape} and {cert.shape}.")
    half = warp.shape[2] // 2
    # In a one-way warp x0 grows from edge to edge; in a symmetric one it ends in the middle and starts over.
    if warp.shape[2] >= 4 and warp[0, 0, half - 1] > 0.5:
        warp, cert = warp[:, :, :half], cert[:, :half]
    left, right, _, _ = _side_by_side(image0, image1, 1280)
    size = (left.shape[1], left.shape[0])
    there = np.asarray(cv2.resize(np.ascontiguousarray(np.moveaxis(warp[2:], 0, 2)), size), np.float32)
    certainty = np.clip(np.asarray(cv2.resize(np.ascontiguousarray(cert), size), np.float32), 0, 1)
    map_x = (there[..., 0] + 1) * np.float32(right.shape[1] / 2) - np.float32(0.5)
    map_y = (there[..., 1] + 1) * np.float32(right.shape[0] / 2) - np.float32(0.5)
    warped = cv2.remap(right, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    faded = (np.asarray(warped, np.float32) * (0.15 + 0.85 * certainty[..., None])).astype(np.uint8)
    heat = cv2.applyColorMap((certainty * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    overlay = np.asarray(cv2.addWeighted(left, 0.35, np.ascontiguousarray(heat), 0.65, 0), np.uint8)
    rows = [(left, right), (faded, overlay)]
    widths = left.shape[1], max(right.shape[1], overlay.shape[1])
    heights = max(left.shape[0], right.shape[0]), left.shape[0]
    canvas = np.full((sum(heights) + GAP, sum(widths) + GAP, 3), BACKGROUND, np.uint8)
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            y, x = row * (heights[0] + GAP), column * (widths[0] + GAP)
            canvas[y : y + panel.shape[0], x : x + panel.shape[1]] = panel
    return _captioned(canvas, "image 0, image 1; image 1 warped onto image 0, certainty (violet 0, yellow 1)")


def write_picture(path: Path, picture: Picture, quality: int = 90) -> None:
    """Write an RGB picture as .jpg or .png."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if path.suffix == ".jpg" else []
    if not cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options):
        raise UserError(f"{path} could not be written: check the folder and the space left on its disk.")


def encode_jpeg(picture: Picture, quality: int = 80) -> bytes:
    """An RGB picture as the bytes of a JPEG file."""
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise UserError(f"A picture of {picture.shape[1]}x{picture.shape[0]} pixels is too large for JPEG.")
    return bytes(data)


def _side_by_side(
    image0: npt.NDArray[Any], image1: npt.NDArray[Any], width: int
) -> tuple[Picture, Picture, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Both images as RGB uint8, resized to one height so that they fill `width`, with their scales (x, y)."""
    aspects = [image.shape[1] / image.shape[0] for image in (image0, image1)]
    height = (width - GAP) / sum(aspects)
    height = min(height, 1.5 * width)  # two slender portraits would otherwise become a tower
    panels, scales = [], []
    for image, aspect in zip((image0, image1), aspects, strict=True):
        size = max(round(height * aspect), 16), max(round(height), 16)
        shrinks = size[0] < image.shape[1]
        resized = cv2.resize(_rgb(image), size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        panels.append(np.asarray(resized, np.uint8))
        scales.append(np.array([size[0] / image.shape[1], size[1] / image.shape[0]]))
    return panels[0], panels[1], scales[0], scales[1]


def _rgb(image: npt.NDArray[Any]) -> Picture:
    if image.dtype != np.uint8:
        image = (np.clip(np.nan_to_num(image), 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image, np.uint8)


def _colours(
    points: npt.NDArray[np.float64], shape: tuple[int, ...], inliers: Mask | None, scores: Float | None
) -> list[tuple[int, int, int]]:
    if inliers is not None:
        # Hue by place in image 0, from yellow to violet; red is kept for outliers.
        place = np.clip(0.5 * (points[:, 0] / shape[1] + points[:, 1] / shape[0]), 0, 1)
        hue = (24 + place * 100).astype(np.uint8)
        wheel = np.stack([hue, np.full_like(hue, 200), np.full_like(hue, 245)], axis=1)[None]
        rgb = np.asarray(cv2.cvtColor(wheel, cv2.COLOR_HSV2RGB))[0] if len(points) else np.zeros((0, 3), np.uint8)
        good = np.asarray(inliers, bool)
        return [tuple(map(int, c)) if ok else OUTLIER for c, ok in zip(rgb, good, strict=True)]  # type: ignore[misc]
    level = np.full(len(points), 1.0) if scores is None else np.clip(np.asarray(scores, np.float64), 0, 1)
    if not len(level):
        return []
    bgr = np.asarray(cv2.applyColorMap((level * 255).astype(np.uint8)[None], cv2.COLORMAP_PLASMA))[0]
    return [(int(c[2]), int(c[1]), int(c[0])) for c in bgr]


def _spread(points: npt.NDArray[np.float64], indices: npt.NDArray[np.intp], count: int) -> npt.NDArray[np.intp]:
    """At most `count` of the indices: first the best match of each cell of a grid, then the second best, ..."""
    if len(indices) <= count:
        return indices
    extent = np.maximum(points[indices].max(0) - points[indices].min(0), 1)
    cells = np.minimum(((points[indices] - points[indices].min(0)) / extent * 16).astype(int), 15)
    flat = cells[:, 0] * 16 + cells[:, 1]
    order = np.argsort(flat, kind="stable")
    first = np.searchsorted(flat[order], flat[order])
    rank = np.empty(len(indices), int)
    rank[order] = np.arange(len(indices)) - first
    return np.asarray(indices[np.argsort(rank, kind="stable")[:count]])


def _fixed(point: npt.NDArray[np.float64]) -> tuple[int, int]:
    bounded = np.clip(point, -30000, 30000) * (1 << SUBPIXEL)
    return round(float(bounded[0])), round(float(bounded[1]))


def _line(
    canvas: Picture,
    a: npt.NDArray[np.float64],
    b: npt.NDArray[np.float64],
    colour: tuple[int, int, int],
    thickness: int,
) -> None:
    cv2.line(canvas, _fixed(a), _fixed(b), colour, thickness, cv2.LINE_AA, SUBPIXEL)


def _dot(canvas: Picture, point: npt.NDArray[np.float64], colour: tuple[int, int, int], radius: float) -> None:
    cv2.circle(canvas, _fixed(point), round(radius * (1 << SUBPIXEL)), colour, -1, cv2.LINE_AA, SUBPIXEL)


def _outline(
    panel: Picture,
    shape: tuple[int, ...],
    homography: Matrix,
    front: float,
    scale: npt.NDArray[np.float64],
    colour: tuple[int, int, int],
    thickness: int,
) -> None:
    """The border of image 0, cut into short pieces so that what lies behind the horizon can be left out."""
    t = np.linspace(0, 1, 33)[:-1]
    w, h = shape[1] - 1.0, shape[0] - 1.0
    sides = [(t * w, 0 * t), (0 * t + w, t * h), ((1 - t) * w, 0 * t + h), (0 * t, (1 - t) * h)]
    border = np.concatenate([np.stack(side, axis=1) for side in sides])
    mapped = (project(homography, border, front) + 0.5) * scale - 0.5
    pieces = [
        (a, b)
        for a, b in zip(mapped, np.roll(mapped, -1, axis=0), strict=True)
        if np.isfinite(a).all() and np.isfinite(b).all()
    ]
    for ink, width in (((0, 0, 0), thickness + 2), (colour, thickness)):  # a dark rim, visible on any image
        for a, b in pieces:
            _line(panel, a, b, ink, width)


def _captioned(canvas: Picture, caption: str) -> Picture:
    if not caption:
        return canvas
    scale = max(canvas.shape[1] / 2000, 0.4)
    (text_width, text_height), _ = cv2.getTextSize(caption, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    scale *= min(1.0, (canvas.shape[1] - 16) / max(text_width, 1))
    strip = np.full((round(2.4 * text_height) + 2, canvas.shape[1], 3), BACKGROUND, np.uint8)
    origin = (8, round(1.7 * text_height))
    cv2.putText(strip, caption, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, (235, 235, 235), 1, cv2.LINE_AA)
    return np.concatenate([canvas, strip])
