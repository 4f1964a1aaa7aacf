"""`matchanything match IMAGE0 IMAGE1`: two image files -> matches, homography and a picture in a folder."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from matchanything_ros.engines import BACKENDS
from matchanything_ros.errors import UserError
from matchanything_ros.homography import HomographyEstimate, estimate_homography
from matchanything_ros.images import Stretch, stretch_to_8_bits
from matchanything_ros.matcher import Matcher, Matches
from matchanything_ros.outputs import new_folder
from matchanything_ros.viz import draw_dense, draw_matches, write_picture

Image = npt.NDArray[Any]


def add_matcher_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every command which matches has in common."""
    parser.add_argument("--bundle", help="an exported network (.onnx), or the name of one in the package")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what runs the network (default: auto)")
    parser.add_argument("--score-threshold", type=float, help="drop matches below this score (default: the bundle's)")
    parser.add_argument("--max-matches", type=int, help="keep the best so many (default: the bundle's)")
    parser.add_argument(
        "--ransac-threshold", type=float, default=3.0, help="reprojection error of an inlier in pixels (default: 3)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image0", type=Path)
    parser.add_argument("image1", type=Path)
    add_matcher_arguments(parser)
    parser.add_argument("--dense", action="store_true", help="also write the dense warp and certainty (dense.npz)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")


def run(args: argparse.Namespace) -> int:
    check_matcher_arguments(args)
    image0, image1 = read_image(args.image0), read_image(args.image1)
    with (
        new_folder(args.out) as folder,
        Matcher(args.bundle, args.backend, args.score_threshold, args.max_matches) as matcher,
    ):
        result = match_pair(matcher, image0, image1, args.ransac_threshold, args.dense)
        write_result(folder, args, matcher, image0, image1, result)
    estimate = result.estimate
    print(
        f"{len(result.matches)} matches, {estimate.num_inliers} inliers, homography {estimate.status.name}, "
        f"{result.timings_ms['network']:.0f} ms network of {sum(result.timings_ms.values()):.0f} ms: {args.out}"
    )
    return 0


@dataclass(frozen=True)
class Result:
    """What one pair gave; timings_ms: wall time by stage in milliseconds, the homography's included."""

    matches: Matches
    estimate: HomographyEstimate
    timings_ms: dict[str, float]


def match_pair(
    matcher: Matcher, image0: Image, image1: Image, threshold_px: float = 3.0, dense: bool = False
) -> Result:
    """Match two images and estimate the homography, each stage timed."""
    matches = matcher.match(image0, image1, dense=dense)
    start = time.perf_counter()
    estimate = estimate_homography(
        matches.keypoints0, matches.keypoints1, matches.size0, matches.size1, threshold_px=threshold_px
    )
    timings = {**matches.timings_ms, "homography": 1e3 * (time.perf_counter() - start)}
    return Result(matches, estimate, timings)


def check_matcher_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for values that no matcher can have."""
    check_limits(args.score_threshold, args.max_matches)
    if not (math.isfinite(args.ransac_threshold) and args.ransac_threshold > 0):
        raise UserError(f"--ransac-threshold is {args.ransac_threshold}: give a positive number of pixels.")


def check_limits(score_threshold: float | None, max_matches: int | None) -> None:
    """Raise UserError unless these are values of --score-threshold and --max-matches, or None."""
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise UserError(f"--score-threshold is {score_threshold}: give a number from 0 to 1.")
    if max_matches is not None and max_matches < 1:
        raise UserError(f"--max-matches is {max_matches}: give a positive number.")


def read_image(path: Path) -> Image:
    """Read an image file as uint8, RGB [H, W, 3] or gray [H, W]; pixels as stored, without rotation by EXIF.

    16-bit and floating-point images (thermal, depth) are stretched to 8 bits as the node does. Raises UserError with
    one sentence for everything that is not such an image.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path.")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name an image file in it.")
    data = np.fromfile(path, np.uint8)
    if not data.size:
        raise UserError(f"{path} is empty (0 bytes): copy it again.")
    try:
        image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise UserError(f"{path} cannot be decoded ({error.err}): convert it to PNG or JPEG.") from error
    if image is None:
        raise UserError(f"{path} is no image that OpenCV can read, or it is damaged: convert it to PNG or JPEG.")
    if image.ndim == 3:  # without alpha, which is no pixel to be stretched by
        image = image[..., 0] if image.shape[2] < 3 else np.ascontiguousarray(image[..., 2::-1])
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise UserError(f"{path} has pixels that are not finite (NaN or infinity): replace them before matching.")
    if image.dtype != np.uint8:
        image = stretch_to_8_bits(image, Stretch())
    return np.asarray(image)


def write_result(
    folder: Path, args: argparse.Namespace, matcher: Matcher, image0: Image, image1: Image, result: Result
) -> None:
    """Write matches.npz, result.json, matches.jpg and, for a dense match, dense.npz and dense.jpg."""
    matches, estimate = result.matches, result.estimate
    np.savez(
        folder / "matches.npz",
        keypoints0=matches.keypoints0,
        keypoints1=matches.keypoints1,
        scores=matches.scores,
        inliers=estimate.inliers,
    )
    document = {
        "status": estimate.status.name,
        "homography": None if estimate.matrix is None else estimate.matrix.tolist(),
        "num_matches": len(matches),
        "num_inliers": estimate.num_inliers,
        "inlier_ratio": estimate.inlier_ratio,
        "reprojection_error_px": _finite(estimate.reprojection_error_px),
        "significance": estimate.significance,
        "timings_ms": result.timings_ms,
        "matcher": matcher.bundle.manifest.name,
        "bundle_sha256": matcher.bundle.manifest.onnx_sha256,
        "backend": matcher.engine.backend,
        "score_threshold": matcher.score_threshold,
        "ransac_threshold_px": args.ransac_threshold,
        "image0": {"file": str(args.image0), "width": matches.size0[0], "height": matches.size0[1]},
        "image1": {"file": str(args.image1), "width": matches.size1[0], "height": matches.size1[1]},
    }
    (folder / "result.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    write_picture(folder / "matches.jpg", _picture(image0, image1, result))
    if matches.warp is not None and matches.cert is not None:
        np.savez_compressed(folder / "dense.npz", warp=matches.warp, cert=matches.cert)
        write_picture(folder / "dense.jpg", draw_dense(image0, image1, matches.warp, matches.cert))


def _picture(image0: Image, image1: Image, result: Result) -> npt.NDArray[np.uint8]:
    matches, estimate = result.matches, result.estimate
    return draw_matches(
        image0,
        image1,
        matches.keypoints0,
        matches.keypoints1,
        inliers=estimate.inliers,
        homography=estimate.matrix,
        caption=f"{estimate.num_inliers} inliers of {len(matches)} matches, homography {estimate.status.name}",
    )


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
