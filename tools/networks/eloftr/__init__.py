"""MatchAnything-ELoFTR: EfficientLoFTR (Wang et al., CVPR 2024) trained by MatchAnything (He et al., 2025).

The same door serves the other public weights of this architecture (EfficientLoFTR outdoor, MINIMA's, Hugging Face's).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from matchanything_ros.bundle import InputSpec, Preprocess, Size
from matchanything_ros.errors import UserError
from matchanything_ros.match_files import check_limits
from matchanything_tools.checkpoints import load_strict, read_checkpoint
from matchanything_tools.export import Exportable, weights_info

from .layouts import published_keys
from .network import STEP, EfficientLoFTR, Published

WHAT = "MatchAnything-ELoFTR"
TRAINING_SIDE = 832  # pixels; position encodings refer to it
SMALLEST, LARGEST = 224, 1664  # sides that were checked
MAX_MATCHES = 2048
SCORE_THRESHOLD = 0.1  # the published configuration's; the public demo starts at 0.001, its slider at 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `matchanything export eloftr`."""
    parser.add_argument(
        "--pipeline",
        choices=("demo", "evaluation"),
        help="preprocessing of the public demo (fixed size, stretched, padded to a square in the network) or of the "
        "authors' evaluation (aspect kept, positions rescaled to training size); default: demo for a fixed size",
    )


def exportable(args: argparse.Namespace) -> Exportable:
    """Load the checkpoint strictly and build the network that the flags describe."""
    dynamic = args.opt is not None
    pipeline = args.pipeline or ("evaluation" if dynamic else "demo")
    if dynamic and pipeline == "demo":
        raise UserError("The demo pipeline has one fixed size: give --size, or choose --pipeline evaluation.")
    smallest, size, largest = (args.min, args.opt, args.max) if dynamic else (args.size or (480, 640),) * 3
    _check_sizes(smallest, size, largest)
    check_limits(None, args.max_matches)
    max_matches = MAX_MATCHES if args.max_matches is None else args.max_matches
    threshold = SCORE_THRESHOLD if args.score_threshold is None else args.score_threshold
    module = EfficientLoFTR(
        load(args.weights),
        max_matches,
        size=None if dynamic else size,
        square=pipeline == "demo",
        position_scale=1.0 if pipeline == "demo" else TRAINING_SIDE / max(size),
        half=args.precision == "fp16",
    )
    side = {index: {2: STEP * _dim(f"h{index}", 0, args), 3: STEP * _dim(f"w{index}", 1, args)} for index in (0, 1)}
    return Exportable(
        family="eloftr",
        variant=f"matchanything-{pipeline}",
        module=module,
        inputs=tuple(InputSpec(f"image{index}", index, smallest, size, largest) for index in (0, 1)),
        preprocess=preprocessing(pipeline, dynamic),
        max_matches=max_matches,
        score_threshold=threshold,
        weights=(weights_info(args.weights, args.licence),),
        precision=args.precision,
        dynamic_shapes={"image0": side[0], "image1": side[1]} if dynamic else None,
    )


def load(weights: Path) -> Published:
    """The published parameters from a checkpoint of any layout; UserError unless every key fits."""
    published = Published()
    load_strict(published, published_keys(read_checkpoint(weights)), what=WHAT, path=weights)
    return published


def preprocessing(pipeline: str, dynamic: bool) -> Preprocess:
    """What the authors' demo or evaluation does to an image before the network."""
    if pipeline == "demo":
        return Preprocess(
            channels="gray",
            resize="stretch",
            interpolation="area",
            divisor=STEP,
            long_side_limit=TRAINING_SIDE,
            gray="pil_l",
        )
    return Preprocess(
        channels="gray",
        resize="fit_stretch" if dynamic else "stretch",
        interpolation="lanczos",
        divisor=STEP,
        gray="pil_l_first",
    )


def _dim(name: str, axis: int, args: argparse.Namespace) -> torch.export.Dim:
    low, high = (args.min[axis], args.max[axis]) if args.opt else (STEP, 2 * STEP)
    return torch.export.Dim(name, min=low // STEP, max=max(high // STEP, low // STEP + 1))


def _check_sizes(*sizes: Size) -> None:
    for size in sizes:
        if any(side % STEP for side in size) or not all(SMALLEST <= side <= LARGEST for side in size):
            raise UserError(
                f"ELoFTR cannot take {size[0]}x{size[1]} pixels: give multiples of {STEP} from {SMALLEST} to {LARGEST}."
            )
    if any(not low <= mid <= high for low, mid, high in zip(*sizes, strict=True)):
        raise UserError("The sizes must satisfy --min <= --opt <= --max in height and in width.")
