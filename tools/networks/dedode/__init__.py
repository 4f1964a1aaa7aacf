"""DeDoDe, image pair to matches in one graph, or detector and descriptor as graphs of their own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from matchanything_ros.bundle import Preprocess
from matchanything_ros.errors import UserError
from matchanything_tools.checkpoints import load_strict, read_checkpoint
from matchanything_tools.export import Exportable, weights_info
from matchanything_tools.networks import sparse_pair
from matchanything_tools.networks.batchnorm import fold_batch_norms
from matchanything_tools.networks.dedode.network import DescriptorB, DescriptorG, Detector, detect
from matchanything_tools.networks.dinov2 import PATCH, DinoV2, read_dinov2
from matchanything_tools.networks.lengths import lengths
from matchanything_tools.networks.sparse_pair import SparsePair
from matchanything_tools.networks.vgg import VGG19

MAX_KEYPOINTS = 10000
DEFAULT_SIZES = ((784, 784),) * 3  # what it was trained at
SOURCE = "https://github.com/Parskatt/DeDoDe"
DINOV2_SOURCE = "https://github.com/facebookresearch/dinov2"
THRESHOLD = 0.01  # the original's for its dual softmax

Network = TypeVar("Network", Detector, DescriptorB, DescriptorG)


class NormalisedDetector(nn.Module):
    """Image in [0, 1] -> keypoints and scores."""

    def __init__(self, detector: Detector, keypoints: int) -> None:
        super().__init__()
        self.detector = detector
        self.keypoints = keypoints

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image [B, 3, H, W] in [0, 1] -> keypoints [B, K, 2] in pixels, scores [B, K], best first."""
        return detect(self.detector(normalise(image, self.detector)), self.keypoints)


class NormalisedDescriptor(nn.Module):
    """Image in [0, 1] and keypoints -> descriptors of unit length."""

    def __init__(self, descriptor: DescriptorB) -> None:
        super().__init__()
        self.descriptor = descriptor

    def forward(self, image: Tensor, keypoints: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [0, 1], keypoints [B, K, 2] at whole pixels -> descriptors [B, K, 256]."""
        descriptors = self.descriptor(normalise(image, self.descriptor), keypoints)
        return descriptors / lengths(descriptors)


class Dedode(nn.Module):
    """Image -> keypoints, scores, descriptors."""

    def __init__(self, detector: NormalisedDetector, descriptor: NormalisedDescriptor) -> None:
        super().__init__()
        self.detector = detector
        self.descriptor = descriptor

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image [B, 3, H, W] in [0, 1] -> keypoints [B, K, 2], scores [B, K], descriptors [B, K, 256]."""
        keypoints, scores = self.detector(image)
        return keypoints, scores, self.descriptor(image, keypoints)


def normalise(image: Tensor, network: nn.Module) -> Tensor:
    """Subtract ImageNet's mean, divide by its standard deviation; in the precision of `network`."""
    mean = torch.tensor([0.485, 0.456, 0.406], device=image.device).reshape(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], device=image.device).reshape(3, 1, 1)
    return ((image - mean) / deviation).to(next(network.parameters()).dtype)


def load_detector(path: Path) -> Detector:
    """Read a published detector, L or B, told apart by its keys."""
    state = read_checkpoint(path)
    large = "decoder.layers.1.hidden_blocks.7.0.weight" in state
    detector = Detector(large)
    load_strict(detector, state, what=f"DeDoDe detector {'L' if large else 'B'}", path=path)
    return _fold(detector)


def load_descriptor(path: Path, dinov2: Path | None, size: tuple[int, int] | None) -> DescriptorB:
    """Read a published descriptor, B or G, told apart by its keys; G needs the file of DINOv2 and a fixed size."""
    state = read_checkpoint(path)
    if not any(key.startswith("encoder.vgg.") for key in state):
        descriptor = DescriptorB()
        load_strict(descriptor, state, what="DeDoDe descriptor B", path=path)
        return _fold(descriptor)
    if dinov2 is None:
        raise UserError(f"{path} is descriptor G, which needs DINOv2 ViT-L/14 too: give its file with --dinov2.")
    if size is None:
        raise UserError("Descriptor G has a fixed size only: give --size instead of --min, --opt and --max.")
    giant = DescriptorG()
    load_strict(giant, state, what="DeDoDe descriptor G", path=path)
    transformer = DinoV2().eval()
    load_strict(transformer, read_dinov2(dinov2), what="DINOv2 ViT-L/14", path=dinov2)
    if size[0] % PATCH or size[1] % PATCH:
        raise UserError(f"Descriptor G needs sides that divide by 14 and 8, such as 560x560, not {size[0]}x{size[1]}.")
    giant.dinov2 = transformer.bake(*size)
    return _fold(giant)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `matchanything export dedode`; --weights is the detector."""
    parser.add_argument("--descriptor", type=Path, help="the published descriptor, B or G")
    parser.add_argument("--dinov2", type=Path, help="DINOv2 ViT-L/14, for descriptor G")
    parser.add_argument(
        "--parts",
        choices=("end2end", "detector", "descriptor"),
        default="end2end",
        help="the bundle, or one half as plain ONNX without a manifest",
    )
    sparse_pair.add_arguments(parser, keypoints=4096)


def exportable(args: argparse.Namespace) -> Exportable:
    """The network that `matchanything export dedode` exports."""
    sparse_pair.check_arguments(args, MAX_KEYPOINTS)
    if args.parts == "descriptor":
        args.descriptor = args.descriptor or args.weights
    if args.parts == "end2end" and args.descriptor is None:
        raise UserError("DeDoDe is two networks: give the descriptor's file with --descriptor.")
    inputs = sparse_pair.input_specs(args, DEFAULT_SIZES, divisor=8)
    fixed = all(spec.fixed for spec in inputs)
    height, width = inputs[0].opt
    detector = descriptor = None
    weights = []
    if args.parts != "descriptor":
        detector = NormalisedDetector(load_detector(args.weights), args.keypoints)
        weights.append(weights_info(args.weights, args.licence, SOURCE))
    if args.parts != "detector":
        described = load_descriptor(args.descriptor, args.dinov2, (height, width) if fixed else None)
        descriptor = NormalisedDescriptor(described)
        weights.append(weights_info(args.descriptor, args.licence, SOURCE))
        if isinstance(described, DescriptorG):
            weights.append(weights_info(args.dinov2, "Apache-2.0", DINOV2_SOURCE))
    for part in (detector, descriptor):
        if part is not None and args.precision == "fp16":
            part.half()
            for layer in part.modules():
                if isinstance(layer, VGG19):
                    layer.stripe()
    threshold = THRESHOLD if args.matching == "dual_softmax" else sparse_pair.DEFAULT_THRESHOLD[args.matching]
    common = {
        "family": "dedode",
        "variant": f"{_letter(detector)}{_letter(descriptor)}",
        "max_matches": args.max_matches or args.keypoints,
        "score_threshold": threshold if args.score_threshold is None else args.score_threshold,
        "weights": tuple(weights),
        "precision": args.precision,
        "preprocess": Preprocess(resize="stretch" if fixed else "fit", interpolation="bicubic_antialias", divisor=8),
    }
    if detector is not None and descriptor is not None:
        if fixed and args.precision == "fp16":
            decoder = descriptor.descriptor.decoder
            decoder.refiner(decoder.strides[-1]).images_as_channels()
        pair = SparsePair(Dedode(detector, descriptor), args.matching, common["max_matches"], one_batch=fixed)
        shapes = sparse_pair.dynamic_shapes(inputs, step=8)
        return Exportable(module=pair, inputs=inputs, dynamic_shapes=shapes, **common)
    image = torch.rand(2, 3, height, width)
    shapes = sparse_pair.dynamic_shapes(inputs, step=8) or {"image0": {}}
    shapes = {"image": {0: torch.export.Dim("batch"), **shapes["image0"]}}
    outputs: tuple[str, ...]
    if detector is not None:
        example, outputs = {"image": image}, ("keypoints", "scores")
    else:
        example, outputs = {"image": image, "keypoints": torch.zeros(2, args.keypoints, 2)}, ("descriptors",)
        shapes["keypoints"] = {0: shapes["image"][0]}
    module = detector or descriptor
    assert module is not None
    return Exportable(module=module, inputs=(), outputs=outputs, part=example, dynamic_shapes=shapes, **common)


def _letter(part: NormalisedDetector | NormalisedDescriptor | None) -> str:
    if part is None:
        return ""
    if isinstance(part, NormalisedDetector):
        return "L" if part.detector.large else "B"
    return "G" if isinstance(part.descriptor, DescriptorG) else "B"


def _fold(network: Network) -> Network:
    network.eval()
    fold_batch_norms(network)
    network.decoder.fold()
    return network
