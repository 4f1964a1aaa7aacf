"""RoMa with the weights of MatchAnything, or of RoMa, GIM and MINIMA: dense matching, coarse to fine."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from matchanything_ros.bundle import InputSpec, Preprocess
from matchanything_ros.errors import UserError
from matchanything_tools.export import Exportable, fixed_input, weights_info
from matchanything_tools.networks.roma import selection
from matchanything_tools.networks.roma.loading import load
from matchanything_tools.networks.roma.network import Roma, symmetric_warp

# Variant -> stride of the last refiner of each pass. The second pass exists in "accurate" only.
VARIANTS = {"accurate": 1, "fast": 1, "coarse": 8}
DEFAULT_SIDE = {"accurate": 560, "fast": 518, "coarse": 560}
MAX_MATCHES = 10_000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SOURCES = {
    "none": ("https://github.com/zju3dv/MatchAnything", "https://github.com/facebookresearch/dinov2"),
    "imagenet": ("https://github.com/Parskatt/RoMa", "https://github.com/facebookresearch/dinov2"),
}


class RomaMatcher(nn.Module):
    """Images of both passes -> keypoints0, keypoints1, scores, and with `dense` warp and cert (see symmetric_warp)."""

    def __init__(self, network: Roma, count: int, dense: bool, normalize: bool) -> None:
        super().__init__()
        self.network = network
        self.count = count
        self.dense = dense
        self.normalize = normalize

    def forward(
        self,
        image0: torch.Tensor,
        image1: torch.Tensor,
        image0_coarse: torch.Tensor | None = None,
        image1_coarse: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        image = (image0.shape[2], image0.shape[3])
        if image0_coarse is None or image1_coarse is None:
            flow, certainty = self.network(self._batch(image0, image1))
        else:
            coarse = self._batch(image0_coarse, image1_coarse)
            flow, certainty = self.network(coarse, self._batch(image0, image1))
        matches = selection.select(flow, certainty, self.count, image, self.network.finest)
        return (*matches, *symmetric_warp(flow, certainty)) if self.dense else matches

    def _batch(self, image0: torch.Tensor, image1: torch.Tensor) -> torch.Tensor:
        images = torch.cat((image0, image1))
        if self.normalize:
            images = (images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
        return images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `matchanything export roma`."""
    parser.add_argument("--dinov2", type=Path, help="dinov2_vitl14_pretrain.pth, the ViT-L/14 of DINOv2")
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        default="accurate",
        help="accurate: two passes; fast: the first only; coarse: the first, down to the refiner of stride 8",
    )
    parser.add_argument("--coarse", type=int, metavar="N", help="side of the first pass, square (560; fast: 518)")
    parser.add_argument("--upsample", type=int, metavar="N", help="side of the second pass, square (864)")
    parser.add_argument("--resize", choices=("stretch", "fit"), default="stretch", help="fit keeps the aspect ratio")
    parser.add_argument(
        "--normalize",
        choices=tuple(SOURCES),
        default="none",
        help="of colours, as the weights were trained: none for MatchAnything, imagenet for RoMa, GIM and MINIMA",
    )
    parser.add_argument("--no-dense", action="store_true", help="leave the outputs warp and cert out (fit has none)")


def exportable(args: argparse.Namespace) -> Exportable:
    """The network that `matchanything export roma` exports."""
    coarse, upsample = _sides(args)
    finest = VARIANTS[args.variant]
    stride, side = finest, upsample or coarse
    cells = side // stride
    most = min(MAX_MATCHES, selection.candidates(cells, cells, stride))
    count = min(5000, most) if args.max_matches is None else args.max_matches
    if not 1 <= count <= most:
        raise UserError(f"--max-matches is {count}: at this size give 1 to {most}.")
    if args.dinov2 is None:
        raise UserError(
            "RoMa needs the weights of its coarse encoder as well: give --dinov2 dinov2_vitl14_pretrain.pth "
            "(DINOv2 ViT-L/14, published by Meta)."
        )
    dense = not args.no_dense and args.resize == "stretch"  # a padded map would need a way back of its own
    network = load(args.weights, args.dinov2, finest)
    network.bake(coarse, coarse, torch.float16 if args.precision == "fp16" else torch.float32)
    source, source_dinov2 = SOURCES[args.normalize]
    return Exportable(
        family="roma",
        variant=args.variant,
        module=RomaMatcher(network, count, dense, args.normalize == "imagenet"),
        inputs=_inputs(coarse, upsample),
        preprocess=Preprocess(resize=args.resize, interpolation="bicubic_antialias"),
        outputs=("keypoints0", "keypoints1", "scores", *(("warp", "cert") if dense else ())),
        max_matches=count,
        score_threshold=selection.CERTAIN if args.score_threshold is None else args.score_threshold,
        weights=(
            weights_info(args.weights, args.licence, source),
            weights_info(args.dinov2, "Apache-2.0", source_dinov2),
        ),
        precision=args.precision,
        stages=_stages(finest, upsample),
    )


def _sides(args: argparse.Namespace) -> tuple[int, int | None]:
    """Sides of the first and second pass (None: there is none)."""
    if args.size or args.opt:
        raise UserError("RoMa takes square inputs of fixed size: give --coarse N and --upsample N instead.")
    coarse = DEFAULT_SIDE[args.variant] if args.coarse is None else args.coarse
    if coarse % 14 or not 112 <= coarse <= 1400:
        raise UserError(f"--coarse is {coarse}: give a multiple of 14 (the ViT's patch) from 112 to 1400, such as 560.")
    if args.variant != "accurate":
        if args.upsample is not None:
            raise UserError(f"--upsample is for the variant 'accurate': '{args.variant}' has no second pass.")
        return coarse, None
    upsample = 864 if args.upsample is None else args.upsample
    if coarse % 8 or upsample % 8 or not 112 <= upsample <= 2048:
        raise UserError(
            f"The sizes are --coarse {coarse} --upsample {upsample}: give a multiple of 56 and a multiple of 8 up to "
            "2048, such as 560 and 864."
        )
    return coarse, upsample


def _inputs(coarse: int, upsample: int | None) -> tuple[InputSpec, ...]:
    main = upsample or coarse
    specs = [fixed_input(f"image{i}", i, (main, main)) for i in (0, 1)]
    if upsample:
        specs += [fixed_input(f"image{i}_coarse", i, (coarse, coarse)) for i in (0, 1)]
    return tuple(specs)


def _stages(finest: int, upsample: int | None) -> tuple[str, ...]:
    first = [f"refiner_{stride}" for stride in (16, 8, 4, 2, 1) if stride >= finest]
    second = [f"upsample_refiner_{stride}" for stride in (8, 4, 2, 1)] if upsample else []
    encoders = ("vgg19", "dinov2_vitl14")
    return (*encoders, "gaussian_process", "embedding_decoder", *first, *second, "attenuation", "selection")
