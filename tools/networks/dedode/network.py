"""DeDoDe: a keypoint detector and a descriptor that are trained, and usable, apart (Edstedt et al., "DeDoDe: Detect,
Don't Describe - Describe, Don't Detect for Local Feature Matching", 3DV 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchanything_tools.networks.dedode.decoder import Decoder
from matchanything_tools.networks.dedode.reading import read_beside, read_upsampled
from matchanything_tools.networks.dinov2 import PATCH, DinoV2
from matchanything_tools.networks.maxima import largest
from matchanything_tools.networks.sampling import read
from matchanything_tools.networks.topk import quotient, topk_blocks
from matchanything_tools.networks.vgg import VGG19

DESCRIPTOR_LENGTH = 256
# stride: (input, hidden, context) channels
DETECTOR_L = {8: (512, 512, 256), 4: (512, 256, 128), 2: (256, 128, 64), 1: (128, 64, 1)}
BASE = {8: (512, 512, 256), 4: (512, 256, 128), 2: (256, 64, 32), 1: (96, 32, 1)}
GIANT = {14: (1024, 768, 512), **BASE, 8: (1024, 512, 256)}


class Detector(nn.Module):
    """Image -> logits of being a keypoint. `large`: the published detector L (416 keys); otherwise B (308)."""

    def __init__(self, large: bool) -> None:
        super().__init__()
        self.large = large
        self.encoder = VGG19()
        self.decoder = Decoder(DETECTOR_L if large else BASE, 1, 8 if large else 5)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [B, 3, H, W] -> logits [B, 1, H, W] float32."""
        total: Tensor | None = None
        for stride, hidden in self.decoder(self.encoder(image)).items():
            prediction = self.decoder.predict(stride, hidden).float()
            if total is not None:  # bicubic with a = -0.75, no antialiasing
                coarse = F.interpolate(total, size=prediction.shape[2:], mode="bicubic", align_corners=False)
                prediction = prediction + coarse
            total = prediction
        assert total is not None
        return total


class DescriptorB(nn.Module):
    """Image and keypoints -> descriptors (308 keys)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder: nn.Module = VGG19()
        self.decoder = Decoder(BASE, DESCRIPTOR_LENGTH, 5)

    def features(self, image: Tensor) -> dict[int, Tensor]:
        """Normalised image [B, 3, H, W] -> features by stride."""
        return self.encoder(image)

    def forward(self, image: Tensor, keypoints: Tensor) -> Tensor:
        """Normalised image [B, 3, H, W], keypoints [B, K, 2] at whole pixels -> descriptors [B, K, 256], not of unit
        length.

        The original computes all 256 channels of every scale, upsamples and sums them, and reads K pixels of the sum.
        All of that is linear, so reading first gives the same: hidden channels at K places, then one output layer.
        """
        hidden = self.decoder(self.features(image))
        finest, *coarser = sorted(hidden)
        height, width = image.shape[2:]
        beside = hidden[finest][0].shape[0] < image.shape[0]
        parts = (read_beside if beside else read)(hidden[finest], keypoints)
        parts += read_upsampled({stride: hidden[stride][0] for stride in coarser}, keypoints, (height, width))
        layers = [layer for stride in (finest, *coarser) for layer in self.decoder.refiner(stride).output]
        weight = torch.cat([layer.get_parameter("weight")[:, :, 0, 0] for layer in layers], dim=1)
        bias = torch.stack([layer.bias for layer in layers if isinstance(layer.bias, Tensor)]).sum(dim=0)
        return F.linear(torch.cat(parts, dim=2), weight, bias).float()


class DescriptorG(DescriptorB):
    """Descriptor B with DINOv2 features below (364 keys, and the 343 of DINOv2 from their own file)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"vgg": VGG19()})
        self.decoder = Decoder(GIANT, DESCRIPTOR_LENGTH, 5)
        self.dinov2: DinoV2 | None = None  # set after loading: its keys are not among this checkpoint's

    def features(self, image: Tensor) -> dict[int, Tensor]:
        assert self.dinov2 is not None and isinstance(self.encoder, nn.ModuleDict)
        height, width = image.shape[2:]
        tokens = self.dinov2(image)
        coarse = tokens.transpose(1, 2).reshape(image.shape[0], -1, height // PATCH, width // PATCH)
        return {14: coarse, **self.encoder["vgg"](image)}


def detect(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best pixels after dividing by the root of the local density of keypoints.

    logits [B, 1, H, W] -> keypoints [B, k, 2] (whole pixels), scores [B, k], best first (not probabilities).
    """
    height, width = logits.shape[2:]
    # The softmax over all pixels, in steps that many threads share.
    logits = logits.squeeze(1)
    exponential = torch.exp(logits - largest(largest(logits, -1), -2))
    ones = torch.ones(width, 1, device=logits.device)
    total = (exponential @ ones).transpose(1, 2) @ torch.ones(height, 1, device=logits.device)
    probability = exponential / total
    # Columns, then rows, both from the right: products with one matrix from the left are slower in ONNX Runtime.
    density = ((probability + 1e-6) * 1e4) @ density_matrix(width, logits)
    density = (density.transpose(1, 2) @ density_matrix(height, logits)).transpose(1, 2)
    score = (probability * torch.rsqrt(density + 1e-8)).flatten(1)
    # The least work is with blocks of sqrt(pixels / k); 8 is near that for the usual sizes and numbers.
    scores, index = topk_blocks(score, k, block=8)
    y, x = quotient(index, width)
    return torch.stack((x, y), dim=2).float(), scores.clamp(min=0)


def density_matrix(size: int, like: Tensor) -> Tensor:
    """[size, size] matrix that filters along one axis with the 51 taps exp(-t^2), t = -2 ... 2, zero outside.

    One matrix product is faster on a GPU than a convolution of one channel with 51 taps, and a constant at fixed size.
    """
    place = torch.arange(size, device=like.device, dtype=torch.float32)
    distance = (place[:, None] - place).abs()
    return torch.exp(-((distance * 0.08) ** 2)) * (distance <= 25).float()
