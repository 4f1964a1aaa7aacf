"""Kestrel: our own small semi-dense matcher across modalities, trained from single photographs (tools/training/)."""

from __future__ import annotations

import argparse
from pathlib import Path

from matchanything_ros.bundle import Preprocess
from matchanything_ros.errors import UserError
from matchanything_tools.checkpoints import load_strict, read_checkpoint
from matchanything_tools.export import Exportable, weights_info
from matchanything_tools.networks.kestrel.blocks import fuse
from matchanything_tools.networks.kestrel.matching import KestrelMatcher
from matchanything_tools.networks.kestrel.model import Kestrel
from matchanything_tools.networks.sparse_pair import dynamic_shapes, input_specs

STEP = 32  # sides are multiples of this: cells of 8 px, attention on 4x4 cells
DEFAULT_SIZES = ((32, 32), (480, 640), (640, 640))  # min, opt, max: the long side becomes 640 px
MAX_MATCHES = 2000
LARGEST_MATCHES = 3840  # TensorRT's limit on one TopK
SCORE_THRESHOLD = 0.05
SOURCE = "trained by this project: docs/model_card.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `matchanything export kestrel`."""
    parser.add_argument("--rounds", type=int, default=2, help="how often the last, sub-pixel stage runs")


def exportable(args: argparse.Namespace) -> Exportable:
    """The network that `matchanything export kestrel` exports."""
    max_matches = MAX_MATCHES if args.max_matches is None else args.max_matches
    if not 1 <= max_matches <= LARGEST_MATCHES:
        raise UserError(f"--max-matches is {max_matches}: choose 1 to {LARGEST_MATCHES}.")
    if not 0 <= args.rounds <= 4:
        raise UserError(f"--rounds is {args.rounds}: choose 0 to 4.")
    network = load(args.weights)
    inputs = input_specs(args, DEFAULT_SIZES, divisor=STEP)
    fixed = all(spec.fixed for spec in inputs)
    threshold = SCORE_THRESHOLD if args.score_threshold is None else args.score_threshold
    return Exportable(
        family="kestrel",
        variant="small",
        module=KestrelMatcher(network, max_matches, args.rounds, fixed, half=args.precision == "fp16").eval(),
        inputs=inputs,
        preprocess=Preprocess(channels="gray", resize="fit", interpolation="area", divisor=STEP),
        max_matches=max_matches,
        score_threshold=threshold,
        weights=(weights_info(args.weights, args.licence, SOURCE),),
        precision=args.precision,
        dynamic_shapes=dynamic_shapes(inputs, STEP),
    )


def load(weights: Path) -> Kestrel:
    """The network of a file that training wrote, in eval mode, every block folded into one convolution, fp32."""
    network = Kestrel()
    state = {
        key: value.float() if value.is_floating_point() else value for key, value in read_checkpoint(weights).items()
    }
    load_strict(network, state, what="Kestrel", path=weights)
    network.eval()
    fuse(network)
    return network
