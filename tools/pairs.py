"""Image pairs with a known homography, read from a folder.

Two layouts: `pairs.json` beside the pairs' folders (its list "pairs" gives names, files, kind and homography), or
plain folders `NAME/0.*`, `NAME/1.*` with the 3x3 matrix in `NAME/H.txt` (none: the images do not overlap). Files are
named relative to the list, to the folder `pairs` beside it, or to the folder that was given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matchanything_ros.errors import UserError

Matrix = npt.NDArray[np.float64]
IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".jp2", ".pgm", ".ppm", ".pnm", ".exr", ".gif")
CATEGORIES = ("cross-modal", "viewpoint", "rotation", "other")


@dataclass(frozen=True)
class ImagePair:
    """homography: pixels of image 0 to pixels of image 1 (centres at integers); None: the images share nothing.

    sources: where the images come from, to find images that certainly show different places.
    """

    name: str
    files: tuple[Path, Path]
    category: str
    homography: Matrix | None
    sources: frozenset[str]


def read_pairs(folder: Path) -> list[ImagePair]:
    """All pairs of a folder in order of their names. Raises UserError if there are none or one is damaged."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder: name one with pairs.json, or with pairs in folders NAME/0.*, 1.*, H.txt."
        )
    listing = next((path for path in (folder / "pairs.json", folder.parent / "pairs.json") if path.is_file()), None)
    pairs = _plain(folder) if listing is None else _listed(listing, folder)
    if not pairs:
        raise UserError(f"{folder} holds no image pair: expected pairs.json, or folders NAME with 0.*, 1.* and H.txt.")
    return sorted(pairs, key=lambda pair: pair.name)


def category(kind: str) -> str:
    """One of CATEGORIES for the free text `kind`; a change of sensor outweighs a change of view."""
    for name in ("cross-modal", "viewpoint", "rotation"):
        if name in kind:
            return name
    return "other"


def shuffled_pairs(pairs: Sequence[ImagePair], count: int, seed: int = 0) -> list[ImagePair]:
    """`count` pairs that show different places: image 0 of one pair with image 1 of another, without common source.

    Drawn without repetition, the same ones for the same arguments; all of them if there are fewer.
    """
    known = [pair for pair in pairs if pair.homography is not None]
    combinations = [(a, b) for a in known for b in known if not a.sources & b.sources]
    order = np.random.default_rng(seed).permutation(len(combinations))[:count]
    return [
        ImagePair(f"{a.name}+{b.name}", (a.files[0], b.files[1]), "shuffled", None, a.sources | b.sources)
        for a, b in (combinations[index] for index in order)
    ]


def _listed(listing: Path, folder: Path) -> list[ImagePair]:
    try:
        entries = json.loads(listing.read_text(encoding="utf-8"))["pairs"]
        return [_entry((listing.parent, listing.parent / "pairs", folder), entry) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{listing} is no list of pairs ({error!r}): see the layout in tools/pairs.py.") from error


def _entry(roots: tuple[Path, ...], entry: dict[str, Any]) -> ImagePair:
    matrix = entry["homography"]
    base = next((root for root in roots if (root / entry["files"][0]).is_file()), roots[-1])
    file0, file1 = (base / name for name in entry["files"])
    for file in (file0, file1):
        if not file.is_file():
            raise UserError(f"{file} of pair {entry['name']} is missing: copy it, or take the pair out of pairs.json.")
    return ImagePair(
        name=entry["name"],
        files=(file0, file1),
        category="no overlap" if matrix is None else category(entry.get("kind", "")),
        homography=None if matrix is None else _matrix(np.array(matrix, np.float64), entry["name"]),
        sources=frozenset(source.get("repo", entry["name"]) for source in entry.get("sources", []))
        or _own(entry["name"]),
    )


def _plain(folder: Path) -> list[ImagePair]:
    root = folder / "pairs" if (folder / "pairs").is_dir() else folder
    pairs = []
    for each in sorted(path for path in root.iterdir() if path.is_dir()):
        images = [sorted(each.glob(f"{index}.*"), key=_unlike_image) for index in (0, 1)]
        if not any(images):
            continue
        if not all(images):
            raise UserError(f"{each} holds only one image of two, named 0.* and 1.*: add the other, or move it away.")
        truth = each / "H.txt"
        try:
            words = truth.read_text(encoding="utf-8").replace(",", " ").split() if truth.is_file() else None
            matrix = None if words is None else np.array(words, np.float64)
        except ValueError as error:
            raise UserError(f"{truth} holds no 3x3 matrix ({error}): write nine numbers in three rows.") from error
        pairs.append(
            ImagePair(
                name=each.name,
                files=(images[0][0], images[1][0]),
                category="no overlap" if matrix is None else "other",
                homography=None if matrix is None else _matrix(matrix, each.name),
                sources=_own(each.name),
            )
        )
    return pairs


def _unlike_image(path: Path) -> tuple[bool, str]:
    """Sorts images before what else has their name (a note, a depth map in numbers)."""
    return path.suffix.lower() not in IMAGES, path.name


def _own(name: str) -> frozenset[str]:
    return frozenset({name})


def _matrix(matrix: Matrix, name: str) -> Matrix:
    if matrix.size != 9 or not np.isfinite(matrix).all() or matrix.reshape(9)[8] == 0:
        raise UserError(f"The homography of pair {name} is no finite 3x3 matrix with a last element: correct it.")
    matrix = matrix.reshape(3, 3)
    if abs(np.linalg.det(matrix / np.linalg.norm(matrix, axis=1, keepdims=True).clip(1e-300))) < 1e-12:
        raise UserError(f"The homography of pair {name} maps the plane to a line or a point: correct it.")
    return matrix / matrix[2, 2]
