"""Photographs on the device, and batches of view pairs made from them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from matchanything_ros.errors import UserError
from matchanything_tools.networks.kestrel.model import CELL
from matchanything_tools.training.geometry import Targets, between, cell_targets, random_views, warp
from matchanything_tools.training.sensors import sense

STORED = 512  # px: photographs are kept stretched to this square; their true sizes enter the geometry
REGISTERED, NEGATIVE = 0.20, 0.10  # shares of registered couples and of pairs of different photographs
NATURAL = 0.25  # share of pairs whose views both stay natural, at difficulty 1


@dataclass
class Photographs:
    """images uint8 [N, 2, 3, 512, 512] (second: low-pass, for shrinking), sizes [N, 2] (width, height) in px.

    couples [M, 2]: photographs that show the same pixels in two modalities. weights [N]: how often each is drawn.
    """

    images: Tensor
    sizes: Tensor
    couples: Tensor
    weights: Tensor


def load_photographs(folder: Path, device: torch.device | str, limit: int | None = None) -> Photographs:
    """Read FOLDER/train.json ("images": file, repo, registered_with) and the files in FOLDER/train/.

    Sources are drawn with weight 1/count^0.4 per photograph, so that large ones do not rule. limit: only that many.
    """
    index = folder / "train.json"
    if not index.is_file():
        raise UserError(f"There is no {index}: --images must name a folder with train.json and train/*.jpg.")
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["images"]
        named = [(entry["file"], entry["repo"]) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{index} is no list {{"images": [{{"file": ..., "repo": ...}}]}} ({error!r}).') from error
    if not named:
        raise UserError(f"{index} lists no image.")
    if limit:
        entries = entries[:: max(1, len(entries) // limit)][:limit]

    def read(entry: dict) -> tuple[np.ndarray, tuple[int, int]]:
        image = cv2.imread(str(folder / "train" / entry["file"]), cv2.IMREAD_COLOR)
        if image is None:
            raise UserError(f"{folder / 'train' / entry['file']} is missing or no image.")
        height, width = image.shape[:2]
        return cv2.resize(image[:, :, ::-1], (STORED, STORED), interpolation=cv2.INTER_LINEAR), (width, height)

    with ThreadPoolExecutor(16) as pool:
        read_in = list(pool.map(read, entries))
    sharp = torch.from_numpy(np.stack([image for image, _ in read_in])).permute(0, 3, 1, 2).contiguous().to(device)
    soft = [F.interpolate(F.avg_pool2d(part.float(), 2), scale_factor=2, mode="bilinear") for part in sharp.split(64)]
    position = {entry["file"]: k for k, entry in enumerate(entries)}
    couples = [
        (position[entry["file"]], position[other])
        for entry in entries
        for other in entry.get("registered_with", ())
        if other in position
    ]
    sources = [entry["repo"] for entry in entries]
    return Photographs(
        torch.stack((sharp, torch.cat(soft).round().to(torch.uint8)), 1),
        torch.tensor([size for _, size in read_in], dtype=torch.float32, device=device),
        torch.tensor(couples, dtype=torch.long, device=device).view(-1, 2),
        torch.tensor([sources.count(source) ** -0.4 for source in sources], device=device),
    )


@dataclass
class Batch:
    """Pairs of views with their truth; forward: cells of view 0 in view 1, backward: the other way round."""

    images: Tensor  # [2B, 1, H, W], views 0 first
    homographies: Tensor  # [B, 3, 3] view 0 -> view 1
    forward: Targets
    backward: Targets
    inside: Tensor  # [2, B, L]: cells that show the photograph
    negative: Tensor  # [B]: two different photographs


@torch.no_grad()
def make_batch(photos: Photographs, count: int, shape: tuple[int, int], easiest: float, hardest: float) -> Batch:
    """count pairs of views of (height, width) `shape`, difficulty uniform between the two bounds, pair by pair."""
    device = photos.images.device
    difficulty = easiest + (hardest - easiest) * torch.rand(count, device=device)
    first = torch.multinomial(photos.weights, count, replacement=True)
    second = first
    if len(photos.couples):
        couple = photos.couples[torch.randint(len(photos.couples), (count,), device=device)]
        registered = torch.rand(count, device=device) < REGISTERED
        first, second = torch.where(registered, couple[:, 0], first), torch.where(registered, couple[:, 1], second)
    stranger = torch.multinomial(photos.weights, count, replacement=True)
    negative = (torch.rand(count, device=device) < NEGATIVE) & (stranger != first) & (first == second)
    second = torch.where(negative, stranger, second)
    matrix0, matrix1, side0, side1 = random_views(photos.sizes[first], shape, difficulty)
    _, foreign, _, foreign_side = random_views(photos.sizes[second], shape, difficulty)
    matrix1 = torch.where(negative[:, None, None], foreign, matrix1)
    side1 = torch.where(negative, foreign_side, side1)
    view0, inside0 = _look(photos, first, matrix0, side0, shape)
    view1, inside1 = _look(photos, second, matrix1, side1, shape)
    natural = (torch.rand(count, device=device) < NATURAL + 0.5 * (1 - difficulty)).repeat(2)
    inside = torch.cat((inside0, inside1))
    images = sense(torch.cat((view0, view1)), difficulty.repeat(2), natural) * inside
    cells = (F.avg_pool2d(inside.float(), CELL) > 0.6).flatten(1).view(2, count, -1)
    homographies = between(matrix0, matrix1)
    forward = cell_targets(homographies, cells[0], cells[1], shape)
    backward = cell_targets(between(matrix1, matrix0), cells[1], cells[0], shape)
    forward.valid &= ~negative[:, None]
    backward.valid &= ~negative[:, None]
    return Batch(images, homographies, forward, backward, cells, negative)


def _look(
    photos: Photographs, index: Tensor, matrices: Tensor, sides: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Views [B, 3, H, W] in [0, 1] and where they show the photograph [B, 1, H, W] bool."""
    height, width = shape
    device = matrices.device
    x = torch.arange(width, device=device, dtype=torch.float32)
    y = torch.arange(height, device=device, dtype=torch.float32)
    pixels = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).view(1, -1, 2)
    points, front = warp(matrices, pixels.expand(len(index), -1, -1))
    sizes = photos.sizes[index][:, None]
    inside = front & (points > -0.5).all(-1) & (points < sizes - 0.5).all(-1)
    shrinking = sides / (height * width) ** 0.5 * STORED / photos.sizes[index].min(1).values  # stored px per view px
    source = photos.images[index, (shrinking > 1.7).long()].float() / 255
    grid = ((points + 0.5) / sizes * 2 - 1).clamp(-4, 4).view(-1, height, width, 2)
    view = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return view, inside.view(-1, 1, height, width)
