"""ALIKED, image pair to matches in one graph. Keypoints and descriptors equal the original's on images of any size."""

from __future__ import annotations

import argparse

import torch
from matchanything_tools.checkpoints import load_strict, read_checkpoint
from matchanything_tools.export import Exportable, weights_info
from matchanything_tools.networks import sparse_pair
from matchanything_tools.networks.aliked.backbone import DIVISOR, VARIANTS, Backbone, Variant
from matchanything_tools.networks.aliked.description import DescriptorHead
from matchanything_tools.networks.aliked.detection import detect
from matchanything_tools.networks.sparse_pair import SparsePair
from torch import Tensor

from matchanything_ros.bundle import Preprocess
from matchanything_ros.errors import UserError

MAX_KEYPOINTS = 5000
SOURCE = "https://github.com/Shiaoming/ALIKED"
DEFAULT_SIZES = ((64, 64), (480, 640), (640, 640))  # min, opt, max: images as they are, up to 640 px


class Aliked(Backbone):
    """Keypoints and descriptors; keys are those of the published checkpoints."""

    def __init__(self, variant: Variant, keypoints: int, threshold: float | None = None) -> None:
        """keypoints: how many rows; threshold: see detection.detect."""
        super().__init__(variant)
        self.desc_head = DescriptorHead(variant.dim, variant.positions)
        self.keypoints = keypoints
        self.threshold = threshold

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Image [B, 3, H, W] in [0, 1] -> keypoints [B, K, 2], scores [B, K] (0: padding), descriptors [B, K, D]."""
        padded, (top, left) = pad_edges(image)
        height, width = image.shape[2:]
        maps = super().forward(padded.to(self.conv1.weight.dtype))
        scores, features = (x.narrow(2, top, height).narrow(3, left, width) for x in maps)
        keypoints, values = detect(scores, self.keypoints, self.threshold)
        return keypoints, values, self.desc_head(features, keypoints)


def pad_edges(image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Repeat the border pixels until both sides are multiples of 32, half on each side; returns (top, left) as well."""
    before = []
    for axis in (2, 3):
        side = image.shape[axis]
        surplus = (side + DIVISOR - 1) // DIVISOR * DIVISOR - side
        before.append(surplus // 2)
        if not isinstance(surplus, int) or surplus:
            index = torch.arange(side + surplus, device=image.device) - surplus // 2
            image = image.index_select(axis, index.clamp(min=0, max=side - 1))
    return image, (before[0], before[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `matchanything export aliked`."""
    parser.add_argument("--variant", choices=VARIANTS, default="n16", help="which network the weights belong to")
    sparse_pair.add_arguments(parser, keypoints=2000)
    parser.add_argument(
        "--detection-threshold", type=float, help="detect where the score is above this, at most --keypoints"
    )


def exportable(args: argparse.Namespace) -> Exportable:
    """The network that `matchanything export aliked` exports."""
    sparse_pair.check_arguments(args, MAX_KEYPOINTS)
    threshold = args.detection_threshold
    if threshold is not None and not 0 <= threshold < 1:
        raise UserError(f"--detection-threshold is {threshold}: scores are in 0 to 1.")
    network = Aliked(VARIANTS[args.variant], args.keypoints, threshold)
    load_strict(network, read_checkpoint(args.weights), what=f"ALIKED {args.variant}", path=args.weights)
    network.eval().fuse()
    if args.precision == "fp16":
        network.half()
    inputs = sparse_pair.input_specs(args, DEFAULT_SIZES, divisor=1)
    if min(min(spec.min) for spec in inputs) < DIVISOR:
        raise UserError(f"ALIKED needs sides of at least {DIVISOR} pixels: choose a larger --size or --min.")
    max_matches = args.max_matches or args.keypoints
    fixed = all(spec.fixed for spec in inputs)
    default_threshold = sparse_pair.DEFAULT_THRESHOLD[args.matching]
    return Exportable(
        family="aliked",
        variant=args.variant,
        module=SparsePair(network, args.matching, max_matches, one_batch=fixed),
        inputs=inputs,
        preprocess=Preprocess(resize="fit_down" if not fixed else "stretch", interpolation="area"),
        max_matches=max_matches,
        score_threshold=default_threshold if args.score_threshold is None else args.score_threshold,
        weights=(weights_info(args.weights, args.licence, SOURCE),),
        precision=args.precision,
        dynamic_shapes=sparse_pair.dynamic_shapes(inputs),
    )
