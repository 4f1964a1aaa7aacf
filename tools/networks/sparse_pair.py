"""What all sparse networks share: keypoints and descriptors of two images -> matches, and the flags for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from matchanything_ros.bundle import InputSpec
from matchanything_ros.errors import UserError
from matchanything_tools.networks.mutual import CRITERIA, match

Size = tuple[int, int]


class SparsePair(nn.Module):
    """Two images -> matches, with a network that gives keypoints, scores and descriptors of a batch of images."""

    def __init__(
        self,
        features: nn.Module | Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
        criterion: str,
        max_matches: int,
        *,
        one_batch: bool,
    ) -> None:
        """features: image [B, 3, H, W] -> keypoints [B, K, 2] in pixels, scores [B, K] (0: padding), descriptors
        [B, K, D] of unit length. one_batch: both images have the same fixed size and go through it together."""
        super().__init__()
        self.features = features
        self.criterion = criterion
        self.max_matches = max_matches
        self.one_batch = one_batch

    def forward(self, image0: Tensor, image1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [1, 3, H, W] in [0, 1] -> keypoints0, keypoints1 [max_matches, 2], scores [max_matches]."""
        if self.one_batch:
            keypoints, scores, descriptors = self.features(torch.cat((image0, image1)))
            (keypoints0, keypoints1), (valid0, valid1) = keypoints.unbind(), (scores > 0).unbind()
            descriptors0, descriptors1 = descriptors.unbind()
        else:
            keypoints0, scores0, descriptors0 = (x[0] for x in self.features(image0))
            keypoints1, scores1, descriptors1 = (x[0] for x in self.features(image1))
            valid0, valid1 = scores0 > 0, scores1 > 0
        index0, index1, scores = match(
            descriptors0,
            descriptors1,
            valid0,
            valid1,
            criterion=self.criterion,
            max_matches=self.max_matches,
        )
        return keypoints0.index_select(0, index0), keypoints1.index_select(0, index1), scores


# Thresholds that the originals and our measurements use: probability, cosine, cosine.
DEFAULT_THRESHOLD = {"dual_softmax": 0.1, "mutual": 0.75, "ratio": 0.0}


def add_arguments(parser: argparse.ArgumentParser, keypoints: int) -> None:
    """The flags that all sparse networks have."""
    parser.add_argument("--keypoints", type=int, default=keypoints, help="keypoints detected in each image")
    parser.add_argument("--matching", choices=CRITERIA, default="dual_softmax", help="criterion of a match")


def check_arguments(args: argparse.Namespace, largest: int) -> None:
    """Raise UserError for a number of keypoints or matches that cannot be."""
    if not 1 <= args.keypoints <= largest:
        raise UserError(f"--keypoints is {args.keypoints}: choose 1 to {largest}.")
    if args.max_matches is not None and not 1 <= args.max_matches <= args.keypoints:
        raise UserError(f"--max-matches is {args.max_matches}: choose 1 to --keypoints ({args.keypoints}).")


def input_specs(args: argparse.Namespace, default: tuple[Size, Size, Size], divisor: int) -> tuple[InputSpec, ...]:
    """The two inputs as --size or --min, --opt and --max say; `default` is (min, opt, max) without any of them."""
    low, opt, high = (args.size,) * 3 if args.size else (args.min, args.opt, args.max) if args.opt else default
    for size in (low, opt, high):
        if size[0] % divisor or size[1] % divisor:
            raise UserError(f"The size {size[0]}x{size[1]} does not work: both sides must be multiples of {divisor}.")
    if not all(a <= b <= c for a, b, c in zip(low, opt, high, strict=True)):
        raise UserError("--min, --opt and --max must not decrease, in height and in width.")
    return tuple(InputSpec(f"image{image}", image, low, opt, high) for image in (0, 1))


def dynamic_shapes(inputs: tuple[InputSpec, ...], step: int = 1) -> dict[str, Any] | None:
    """The dynamic heights and widths as torch.export takes them (multiples of `step`), or None for fixed shapes."""
    if all(spec.fixed for spec in inputs):
        return None
    shapes: dict[str, Any] = {}
    for spec in inputs:
        shapes[spec.name] = {}
        for axis, letter in ((0, "h"), (1, "w")):
            low, high = spec.min[axis], spec.max[axis]
            if low < high:
                # torch.export stumbles over a range with less than two multiples of what the network divides by; the
                # graph is the same for a wider one.
                high = max(high, 2 * low, 512)
                dim = torch.export.Dim(f"{letter}{spec.image}", min=low // step, max=high // step)
                shapes[spec.name][axis + 2] = dim if step == 1 else step * dim
    return shapes
