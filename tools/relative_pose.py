"""Relative pose from matches, and how far it is from the truth: the part of `matchanything evaluate` for --poses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from matchanything_ros.matcher import Matches
from matchanything_tools.accuracy import auc
from matchanything_tools.rooms import Image, Matrix, PosePair

INLIER_PX = 1.0
ANGLES = (5, 10, 20)  # degrees


@dataclass(frozen=True)
class PoseRecord:
    """Angles between estimate and truth in degrees, of the rotation and of the direction of the translation (whose sign
    an essential matrix does not tell); None without an estimate."""

    name: str
    num_matches: int
    inlier_ratio: float
    rotation_deg: float | None = None
    translation_deg: float | None = None


def judge_pose(pair: PosePair, match: Callable[[Image, Image], Matches]) -> PoseRecord:
    """Match the two views, estimate the essential matrix (MAGSAC, 1 px) and compare the pose that it stands for."""
    matches = match(pair.image0, pair.image1)
    found = estimate_pose(matches, pair.intrinsics)
    if found is None:
        return PoseRecord(pair.name, len(matches), 0.0)
    rotation, translation, ratio = found
    turn = math.degrees(math.acos(np.clip((np.trace(rotation.T @ pair.rotation) - 1) / 2, -1, 1)))
    cosine = abs(translation @ pair.translation) / np.linalg.norm(pair.translation) / np.linalg.norm(translation)
    direction = math.degrees(math.acos(min(cosine, 1.0)))
    return PoseRecord(pair.name, len(matches), round(ratio, 4), round(turn, 3), round(direction, 3))


def estimate_pose(matches: Matches, intrinsics: Matrix) -> tuple[Matrix, Matrix, float] | None:
    """Rotation, direction of the translation, and the share of inliers; None if there is no estimate."""
    points0, points1 = (points.astype(np.float64) for points in (matches.keypoints0, matches.keypoints1))
    if len(points0) < 6:
        return None
    cv2.setRNGSeed(0)
    try:
        essential, inliers = cv2.findEssentialMat(
            points0, points1, intrinsics, method=cv2.USAC_MAGSAC, prob=0.99999, threshold=INLIER_PX
        )
        if essential is None or essential.shape != (3, 3):
            return None
        ratio = float(np.count_nonzero(inliers) / len(points0))
        _, rotation, translation, _ = cv2.recoverPose(essential, points0, points1, intrinsics, mask=inliers.copy())
    except cv2.error:  # raised for some degenerate inputs
        return None
    return rotation, translation[:, 0], ratio


def pose_table(methods: dict[str, list[PoseRecord]]) -> str:
    """AUC of the larger of the two angles, and medians, as Markdown."""
    count = len(next(iter(methods.values())))
    lines = [
        "",
        "# Relative pose",
        "",
        f"{count} made pairs of views with known poses. AUC at {'/'.join(map(str, ANGLES))} degrees of the pose error: "
        "the larger of the angles of rotation and of the direction of translation.",
        "",
        "| method | AUC | rotation (median) | translation (median) | matches (median) | inlier ratio |",
        "|---|---|---|---|---|---|",
    ]
    for method, records in methods.items():
        areas = " ".join(f"{auc(errors(records), angle):.3f}".removeprefix("0") for angle in ANGLES)
        rotation, translation = (
            float(np.median([math.inf if angle is None else angle for angle in angles]))
            for angles in zip(*((r.rotation_deg, r.translation_deg) for r in records), strict=True)
        )
        matches, ratio = (
            float(np.median(v)) for v in zip(*((r.num_matches, r.inlier_ratio) for r in records), strict=True)
        )
        lines.append(
            f"| {method} | {areas} | {rotation:.2f} deg | {translation:.2f} deg | {matches:.0f} | {ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


def errors(records: Sequence[PoseRecord]) -> list[float]:
    """The pose error of each in degrees, infinite without an estimate."""
    return [
        math.inf if r.rotation_deg is None or r.translation_deg is None else max(r.rotation_deg, r.translation_deg)
        for r in records
    ]
