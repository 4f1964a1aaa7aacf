#!/usr/bin/env python3
"""What reduced precision changes in ELoFTR's matches: the table in docs/eloftr.md, in PyTorch on a GPU.

usage, from the repository, installed: PYTHONPATH=test python3 scripts/precision_eloftr.py [FOLDER of image pairs ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import seeded
import torch

from matchanything_ros.bundle import InputSpec
from matchanything_ros.preprocess import prepare
from matchanything_tools.checkpoints import load_strict
from matchanything_tools.deviation import compare, summarise
from matchanything_tools.networks.eloftr import preprocessing
from matchanything_tools.networks.eloftr.network import EfficientLoFTR, Published
from matchanything_tools.pairs import read_pairs
from matchanything_tools.validate import read_images

SIZE, THRESHOLD, SEEDS = (480, 640), 0.01, (0, 1, 2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network(seed: int, half: bool) -> EfficientLoFTR:
    published = Published()
    load_strict(published, seeded.state("eloftr", seed), what="ELoFTR", path=Path("seeded"))  # type: ignore[arg-type]
    return EfficientLoFTR(published, 2048, size=SIZE, square=True, half=half).eval().to(DEVICE)


def pyramid_and_backbone_fp32(seed: int) -> EfficientLoFTR:
    net, exact = network(seed, half=True), network(seed, half=False)
    assert net.fixed is not None and exact.fixed is not None
    net.dtype, net.backbone, net.pyramid = torch.float32, exact.backbone, exact.pyramid
    net.fixed.double_blocks, net.fixed.double_map = exact.fixed.double_blocks, exact.fixed.double_map
    together, pyramid = net.transformer.together, net.pyramid.forward
    net.transformer.together = lambda both, grid: together(both.half(), grid)  # type: ignore[method-assign]
    net.pyramid.forward = lambda blocks, *rest: pyramid(blocks.float(), *rest)  # type: ignore[method-assign]
    return net


ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp16 as exported": (lambda seed: network(seed, half=True), {}),
    "fp32, convolutions in TF32": (lambda seed: network(seed, half=False), {"tf32": True}),
    "fp16, backbone and pyramid fp32": (pyramid_and_backbone_fp32, {}),
    "autocast to fp16": (lambda seed: network(seed, half=False), {"autocast": True}),
}


def run(net: EfficientLoFTR, images: list[torch.Tensor], tf32: bool = False, autocast: bool = False) -> dict[str, Any]:
    torch.backends.cudnn.allow_tf32 = tf32
    with torch.inference_mode(), torch.device(DEVICE), torch.autocast(DEVICE, torch.float16, enabled=autocast):
        outputs = net(*images)
    return dict(zip(("keypoints0", "keypoints1", "scores"), (x.float().cpu().numpy() for x in outputs), strict=True))


def main(folders: list[str]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    preprocess, spec = preprocessing("demo", dynamic=False), InputSpec("image0", 0, SIZE, SIZE, SIZE)
    pairs = [
        [torch.from_numpy(prepare(x, preprocess, spec)[0]).to(DEVICE) for x in read_images(p.files)]
        for folder in folders
        for p in read_pairs(Path(folder))
    ]
    for seed in SEEDS:
        exact = network(seed, half=False)
        expected = [run(exact, pair) for pair in pairs]
        for name, (make, settings) in ROWS.items():
            net = make(seed)
            result = summarise(
                [compare(e, run(net, pair, **settings), THRESHOLD) for e, pair in zip(expected, pairs, strict=True)]
            )
            print(
                f"seed {seed} {name:34} {result['matches_expected']} -> {result['matches']} matches, "
                f"mean {result['mean_px']:.3f} px, within 1 px {result['within_1_px']:.1%}, "
                f"correlation {result['score_correlation']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:] or ["test/data/pairs"])
