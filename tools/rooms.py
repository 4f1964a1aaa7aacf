"""Made views with an exactly known relative pose: into the corner of a room whose three walls are photographs.

Relative pose needs intrinsics and a translation in front of depth, which image pairs with a homography have not. Here
all is known: two pinhole cameras, three planes, no lens. The photographs are real; exposure and noise of the two views
differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]

SIZE = (640, 480)  # width, height
SUPERSAMPLING = 2  # rays along each side of a pixel
BACKGROUND = 96.0
NOISE = 3.0  # grey levels


@dataclass(frozen=True)
class PosePair:
    """Two views, and the truth: X0 of camera 0 (z forward, y down) is rotation @ X0 + translation in camera 1."""

    name: str
    image0: Image
    image1: Image
    intrinsics: Matrix  # 3x3, of both cameras
    rotation: Matrix
    translation: Matrix  # [3]


def pose_pairs(photographs: Sequence[npt.NDArray[Any]], count: int, seed: int = 0) -> list[PosePair]:
    """`count` pairs, always the same ones for the same photographs (RGB or grey) and seed.

    The cameras are 5 to 35 degrees apart as seen from what they look at, with different distance and roll.
    """
    random = np.random.default_rng(seed)
    width, height = SIZE
    intrinsics = np.array([[0.9 * width, 0, (width - 1) / 2], [0, 0.9 * width, (height - 1) / 2], [0, 0, 1]])
    pairs = []
    for number in range(count):
        walls = [photographs[index] for index in random.integers(len(photographs), size=3)]
        target = random.uniform(0.2, 0.4, 3)
        angles = np.array([np.pi / 4, 0.615]) + random.uniform(-0.3, 0.3, 2)  # towards the room's diagonal
        step = random.uniform(0.09, 0.6)
        turn = random.uniform(0, 2 * np.pi)
        views = []
        for offset in (np.zeros(2), step * np.array([np.cos(turn), np.sin(turn)])):
            azimuth, elevation = np.clip(angles + offset, 0.15, np.pi / 2 - 0.15)
            direction = np.array(
                [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
            )
            position = target + random.uniform(1.0, 1.5) * direction
            rotation = look_at(position, target, roll=random.uniform(-0.25, 0.25))
            image = render(walls, rotation, position, intrinsics) * random.uniform(0.75, 1.15)
            image += random.normal(0, NOISE, image.shape)
            views.append((image.round().clip(0, 255).astype(np.uint8), rotation, position))
        (image0, rotation0, position0), (image1, rotation1, position1) = views
        pairs.append(
            PosePair(
                name=f"room_{number:03d}",
                image0=image0,
                image1=image1,
                intrinsics=intrinsics,
                rotation=rotation1 @ rotation0.T,
                translation=rotation1 @ (position0 - position1),
            )
        )
    return pairs


def look_at(position: Matrix, target: Matrix, roll: float) -> Matrix:
    """Rotation from the world (z up) to a camera (z forward, y down) that looks at `target`, turned by `roll` (rad)."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    upright = np.stack([right, np.cross(forward, right), forward])
    turned = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    return turned @ upright


def render(
    walls: Sequence[npt.NDArray[Any]], rotation: Matrix, position: Matrix, intrinsics: Matrix
) -> npt.NDArray[np.float64]:
    """What a camera sees of the unit squares of the planes x = 0, y = 0 and z = 0, each bearing one image: RGB in 0 to
    255, not rounded."""
    width, height = SIZE
    rows, columns = (
        ((np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - 0.5).astype(np.float64) for side in (height, width)
    )
    x, y = np.meshgrid(columns, rows)
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(intrinsics).T @ rotation
    nearest = np.full(x.shape, np.inf)
    image = np.full((*x.shape, 3), BACKGROUND)
    for axis, wall in enumerate(walls):
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = -position[axis] / rays[..., axis]
            across, up = (position[other] + distance * rays[..., other] for other in range(3) if other != axis)
            seen = (distance > 0) & (distance < nearest) & (across >= 0) & (across < 1) & (up >= 0) & (up < 1)
        wall_rows, wall_columns = wall.shape[:2]
        place = np.where(seen, across, 0) * wall_columns - 0.5, (1 - np.where(seen, up, 0)) * wall_rows - 0.5
        sampled = cv2.remap(
            wall,
            place[0].astype(np.float32),
            place[1].astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        image[seen] = sampled[seen] if wall.ndim == 3 else sampled[seen][:, None]
        nearest[seen] = distance[seen]
    return image.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING, 3).mean(axis=(1, 3))
