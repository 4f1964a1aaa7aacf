"""What the tests of RoMa share: the seeded network, the golden pair at any size, and a shallow network for speed."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import seeded
import torch
import torch.nn.functional as F

from matchanything_ros.bundle import Preprocess
from matchanything_tools.export import Exportable, fixed_input
from matchanything_tools.networks.roma import RomaMatcher
from matchanything_tools.networks.roma.network import Roma

SIDE_COARSE, SIDE = 112, 128  # of the shallow network's two passes
GOLDEN = Path(__file__).parent / "data" / "golden"
# Every how many pixels the golden maps of flow and certainty are stored, by stride of the refiner.
STEPS = {"small": {16: 1, 8: 1, 4: 1, 2: 2, 1: 4}, "560_864": {16: 1, 8: 1, 4: 2, 2: 4, 1: 8}}


def network(finest: int = 1, override: dict[str, list[float]] | None = None) -> Roma:
    """RoMa with the seeded checkpoints; shares their memory with every other test."""
    with torch.device("meta"):
        roma = Roma(finest)
    weights = dict(seeded.state("roma"))
    for key, value in (override or {}).items():
        weights[key] = torch.tensor(value)
    roma.published.load_state_dict(weights, assign=True)
    roma.dinov2.load_state_dict(seeded.state("dinov2"), assign=True)
    return roma.eval().requires_grad_(False)


def shallow(finest: int = 1) -> Roma:
    """The same with one transformer block in each encoder and decoder: every operator, a tenth of the work."""
    roma = network(finest)
    roma.dinov2.blocks = roma.dinov2.blocks[:1]
    roma.decoder.embedding_decoder.blocks = roma.decoder.embedding_decoder.blocks[:1]
    return roma


def shallow_item(dtype: torch.dtype) -> Exportable:
    """A network of every operator and little depth, in two passes."""
    module = RomaMatcher(shallow().bake(SIDE_COARSE, SIDE_COARSE, dtype), 1000, dense=True, normalize=False)
    sizes = {"image0": SIDE, "image1": SIDE, "image0_coarse": SIDE_COARSE, "image1_coarse": SIDE_COARSE}
    return Exportable(
        family="roma",
        variant="shallow",
        module=module,
        inputs=tuple(fixed_input(name, int(name[5]), (side, side)) for name, side in sizes.items()),
        preprocess=Preprocess(interpolation="bicubic_antialias"),
        outputs=("keypoints0", "keypoints1", "scores", "warp", "cert"),
        max_matches=1000,
        score_threshold=0.05,
        weights=(),
        precision="fp16" if dtype == torch.float16 else "fp32",
    )


def pictures() -> list[npt.NDArray[np.uint8]]:
    """The golden pair as the original's demo sees it: uint8 RGB 640 x 480."""
    images = [cv2.cvtColor(cv2.imread(str(GOLDEN / f"coffee_{i}.png")), cv2.COLOR_BGR2RGB) for i in (0, 1)]
    return [np.asarray(cv2.resize(image, (640, 480), interpolation=cv2.INTER_AREA)) for image in images]


def batch(side: int) -> torch.Tensor:
    """The golden pair [2, 3, side, side], resized as the original does."""
    pair = torch.stack([torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in pictures()])
    return resized(pair, side)


def resized(images: torch.Tensor, side: int) -> torch.Tensor:
    """Images [N, 3, H, W] at [N, 3, side, side], as the original does it."""
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)


def golden(case: str) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, list[float]]]:
    """Arrays of a golden file, and its conditioning: what changes when the input is multiplied by 1 + 1e-6 N(0, 1)."""
    with np.load(GOLDEN / f"roma_{case}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("conditioning")))


def pixel_error(warp: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32], side: int) -> npt.NDArray[np.float32]:
    """Distance in pixels of the network's input between two warps [..., 4]."""
    difference = (warp - wanted) * (side / 2)
    return np.maximum(
        np.hypot(difference[..., 0], difference[..., 1]), np.hypot(difference[..., 2], difference[..., 3])
    )
