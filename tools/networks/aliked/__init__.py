"""ALIKED, image pair to matches in one graph. Keypoints and descriptors equal the original's on images of any size."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from matchanything_ros.bundle import Preprocess
from matchanything_ros.errors import UserError
from matchanything_tools.checkpoints import load_strict, read_checkpoint
from matchanything_tools.export import Exportable, weights_info
from matchanything_tools.fingerprints import guess_family
from matchanything_tools.networks import sparse_pair
from matchanything_tools.networks.aliked.backbone import VARIANTS, Backbone, Variant
from matchanything_tools.networks.aliked.description import DescriptorHead
from matchanything_tools.networks.aliked.detection import detect
from matchanything_tools.networks.aliked.features import Features, ReadFeatures, WholeFeatures, Window
from matchanything_tools.networks.aliked.padding import DIVISOR, PaddingConv, pad_edges, surplus
from matchanything_tools.networks.sampling import DeformableConv3x3
from matchanything_tools.networks.sparse_pair import SparsePair

MAX_KEYPOINTS = 5000
SOURCE = "https://github.com/Shiaoming/ALIKED"
DEFAULT_SIZES = ((64, 64), (480, 640), (640, 640))  # min, opt, max: images as they are, up to 640 px

FeatureReader = Callable[[list[Tensor], Window], Features]


class Aliked(Backbone):
    """Keypoints and descriptors; keys are those of the published checkpoints."""

    def __init__(
        self,
        variant: Variant,
        keypoints: int,
        threshold: float | None = None,
        *,
        features: FeatureReader = WholeFeatures,
    ) -> None:
        """keypoints: how many rows; threshold: see detection.detect; features: see features.py."""
        super().__init__(variant)
        self.desc_head = DescriptorHead(variant.dim, variant.positions)
        self.keypoints = keypoints
        self.threshold = threshold
        self.features = features

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Image [B, 3, H, W] in [0, 1] -> keypoints [B, K, 2], scores [B, K] (0: padding), descriptors [B, K, D]."""
        height, width = image.shape[2:]
        left, top = surplus(width) // 2, surplus(height) // 2
        padded = image if isinstance(self.block1.conv1, PaddingConv) else pad_edges(image)
        logits, groups = super().forward(padded.to(self.conv1.weight.dtype))
        logits = logits.narrow(2, top, height).narrow(3, left, width)
        scores = torch.sigmoid(logits.float())
        ranks = logits if logits.dtype == torch.float16 else None
        keypoints, values = detect(scores, self.keypoints, self.threshold, ranks)
        # The features are not cropped, which would copy them: what is read of them is limited to the image instead.
        first = torch.stack([_float(side, image) for side in (left, top)])
        window = Window(first, first + torch.stack([_float(side - 1, image) for side in (width, height)]))
        return (
            keypoints,
            values,
            self.desc_head(self.features(groups, window), keypoints + first, max(height, width) / 4),
        )


def feature_reader(variant: Variant, keypoints: int, size: tuple[int, int] | None) -> FeatureReader:
    """The cheaper one for a fixed (height, width), or for a size that is not known (None)."""
    reads = keypoints * (9 + 4 * variant.positions)  # pixels, each about twice the work of one of the whole map
    return ReadFeatures if size is not None and 2 * reads <= size[0] * size[1] else WholeFeatures


def _float(side: int, like: Tensor) -> Tensor:
    return torch.full((), side, dtype=torch.float32, device=like.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `matchanything export aliked`."""
    parser.add_argument("--variant", choices=VARIANTS, default="n16", help="which network the weights belong to")
    sparse_pair.add_arguments(parser, keypoints=2000)
    parser.add_argument(
        "--detection-threshold", type=float, help="detect where the score is above this, at most --keypoints"
    )
    parser.add_argument(
        "--deform-conv", action="store_true", help="use this operator, as fixed fp16 networks do: faster on a CPU"
    )


def exportable(args: argparse.Namespace) -> Exportable:
    """The network that `matchanything export aliked` exports."""
    sparse_pair.check_arguments(args, MAX_KEYPOINTS)
    threshold = args.detection_threshold
    if threshold is not None and not 0 <= threshold < 1:
        raise UserError(f"--detection-threshold is {threshold}: scores are in 0 to 1.")
    inputs = sparse_pair.input_specs(args, DEFAULT_SIZES, divisor=1)
    fixed = all(spec.fixed for spec in inputs)
    variant = VARIANTS[args.variant]
    reader = feature_reader(variant, args.keypoints, inputs[0].opt if fixed else None)
    network = Aliked(variant, args.keypoints, threshold, features=reader)
    state = read_checkpoint(args.weights)
    guess = guess_family(state) or ""
    if guess.startswith("ALIKED") and args.variant not in guess.split():
        raise UserError(f"{args.weights} is {guess}, not {args.variant}: add --variant {guess.split()[1]}.")
    load_strict(network, state, what=f"ALIKED {args.variant}", path=args.weights)
    network.eval().fuse()
    for module in network.modules():
        if isinstance(module, DeformableConv3x3):
            module.as_operator = args.deform_conv or (fixed and args.precision == "fp16")
    if args.precision == "fp16":
        if fixed:
            network.stripe()
        network.half()
    smallest = DIVISOR if fixed else DIVISOR + 1  # torch.export takes maps of one cell for fixed
    if min(min(spec.min) for spec in inputs) < smallest:
        raise UserError(f"ALIKED needs sides of at least {smallest} pixels: choose a larger --size or --min.")
    max_matches = args.max_matches or args.keypoints
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
