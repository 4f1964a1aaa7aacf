"""RoMa: dense matching of two images in both directions, coarse to fine.

Edstedt et al., "RoMa: Robust Dense Feature Matching", CVPR 2024, as MatchAnything trained it again (no normalisation of
the image, both passes from bicubic resized copies of the original). Key layout of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from matchanything_tools.networks.batchnorm import fold_batch_norms
from matchanything_tools.networks.dinov2 import PATCH, DinoV2
from matchanything_tools.networks.roma.embedding_decoder import EmbeddingDecoder, decode_anchors
from matchanything_tools.networks.roma.gaussian_process import GaussianProcess
from matchanything_tools.networks.roma.grids import pixel_grid
from matchanything_tools.networks.roma.refiner import FEATURES, ConvRefiner, Pair
from matchanything_tools.networks.vgg import VGG19

ENCODED = {16: 1024, 8: 512, 4: 256, 2: 128, 1: 64}  # channels of the encoders by stride; "16" is the patch of 14
ATTENUATION = 0.5

Features = dict[int, Pair]  # by stride, each [1, H, W, C]
State = tuple[int, torch.Tensor, torch.Tensor]  # stride, flow [2, 2, h, w], certainty logit [2, 1, h, w]


class Decoder(nn.Module):
    """The parameters of the decoder, under their published names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_decoder = EmbeddingDecoder()
        self.gps = nn.ModuleDict({"16": GaussianProcess()})
        self.proj = nn.ModuleDict(
            {
                str(stride): nn.Sequential(nn.Conv2d(width, FEATURES[stride], 1), nn.BatchNorm2d(FEATURES[stride]))
                for stride, width in ENCODED.items()
            }
        )
        self.conv_refiner = nn.ModuleDict({str(stride): ConvRefiner(stride) for stride in ENCODED})


class Roma(nn.Module):
    """Dense matcher. In the batch of 2, element 0 is the direction from image 0 to image 1, element 1 the other.

    `finest`: stride of the last refiner that runs (1: all of them).
    """

    def __init__(self, finest: int = 1) -> None:
        super().__init__()
        self.finest = finest
        self.encoder = nn.ModuleDict({"cnn": VGG19()})
        self.decoder = Decoder()
        self.dinov2 = DinoV2()

    @property
    def published(self) -> nn.ModuleDict:
        """The part whose parameters are in the RoMa checkpoint; those of `dinov2` come from a file of their own."""
        return nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder})

    def bake(self, height: int, width: int, dtype: torch.dtype = torch.float32) -> Roma:
        """Make it ready for export, with a first pass at this size: norms folded, widths padded, tables fixed.

        dtype float16: the encoders, the transformer and the convolutions of the refiners become fp16. The Gaussian
        process, coordinates, flow and certainty stay in fp32; the last layer of each head is as exact as there.
        """
        fold_batch_norms(self)
        self.dinov2.bake(height, width).to(dtype)
        self.decoder.gps["16"].bake(height // PATCH, width // PATCH)
        for block in self.decoder.embedding_decoder.blocks:
            block.attn.bake()
        for stride, refiner in list(self.decoder.conv_refiner.items()):
            if int(stride) < self.finest:
                del self.decoder.conv_refiner[stride], self.decoder.proj[stride]
                continue
            # Those of stride 16 go to the Gaussian process and the transformer as well: they stay as they are.
            refiner.bake(None if stride == "16" or refiner.radius is None else self.decoder.proj[stride][0])
            if dtype == torch.float16:
                refiner.narrow()
        if dtype == torch.float16:
            self.encoder["cnn"].stripe(width)
        self.encoder.to(dtype)
        self.decoder.proj.to(dtype)
        self.decoder.embedding_decoder.blocks.to(dtype)
        return self

    def forward(self, coarse: torch.Tensor, fine: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Both images at the size of the first pass [2, 3, h, w] and, if there is one, of the second [2, 3, H, W].

        Returns flow [2, 2, H, W], normalised target in the other image, possibly outside [-1, 1], and certainty
        [2, 1, H, W] in [0, 1], both at the size of the last refiner's map.
        """
        states = list(self.first_pass(coarse))
        low = states[0][2]
        _, flow, certainty = states[-1]
        if fine is not None:
            *_, (_, flow, certainty) = self.second_pass(fine, flow, certainty, coarse.shape[2:])
        return self.finish(low, flow, certainty)

    @staticmethod
    def finish(low: torch.Tensor, flow: torch.Tensor, certainty: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Certainty logit -> certainty in [0, 1], attenuated by the logit `low` after the first refiner."""
        low = _resize(low, flow.shape[2:])
        # The sign is as trained: half of a negative coarse logit is taken away, which raises the certainty.
        certainty = torch.sigmoid(certainty - ATTENUATION * low.clamp(max=0.0))
        inside = torch.maximum(flow[:, :1].abs(), flow[:, 1:].abs()) <= 1.0
        return flow, certainty * inside

    def first_pass(self, images: torch.Tensor) -> Iterator[State]:
        """Global matching on ViT tokens, then the refiners from stride 16 to `finest`; yields after each of them."""
        height, width = images.shape[2] // PATCH, images.shape[3] // PATCH
        tokens = self._project_tokens(images)
        flow, certainty = self.match_globally(tokens, height, width)
        features = {**self._fine_features(images), 16: tokens.unflatten(1, (height, width)).split(1)}
        yield from self._refine(features, flow, certainty, (16, 8, 4, 2, 1), images.shape[2:], 1.0)

    def second_pass(
        self, images: torch.Tensor, flow: torch.Tensor, certainty: torch.Tensor, before: torch.Size
    ) -> Iterator[State]:
        """The refiners from stride 8 again, on larger images, starting from the result of the first pass."""
        height, width = images.shape[2:]
        zoom = ((height * width) / (before[0] * before[1])) ** 0.5
        features = self._fine_features(images)
        yield from self._refine(features, flow, certainty, (8, 4, 2, 1), (height, width), zoom)

    def match_globally(self, tokens: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected ViT tokens [2, N, 512] -> coarse flow [2, 2, h, w] and certainty logit [2, 1, h, w]."""
        posterior = self.decoder.gps["16"](tokens.float(), height, width)
        logits, certainty = self.decoder.embedding_decoder(posterior.to(tokens.dtype), tokens)
        flow = decode_anchors(logits)
        size = (height, width)
        return flow.transpose(1, 2).unflatten(2, size), certainty.transpose(1, 2).unflatten(2, size)

    def _project_tokens(self, images: torch.Tensor) -> torch.Tensor:
        projection = self.decoder.proj["16"]
        if isinstance(projection[1], nn.Identity):  # folded: a 1x1 convolution of a token list is a linear layer
            tokens = self.dinov2(images.to(projection[0].weight.dtype))
            return F.linear(tokens, projection[0].weight[:, :, 0, 0], projection[0].bias)
        return projection(self.dinov2(images).transpose(1, 2)[..., None])[..., 0].transpose(1, 2)

    def _fine_features(self, images: torch.Tensor) -> Features:
        """By stride. One image after the other: what needs each apart need not copy."""
        encoder = self.encoder["cnn"]
        both = [encoder(image.to(encoder.layers[0].weight.dtype)) for image in images.split(1)]
        return {
            stride: tuple(self.decoder.proj[str(stride)](x[stride]).permute(0, 2, 3, 1) for x in both)
            for stride in encoder.strides
            if stride >= self.finest
        }

    def _refine(
        self,
        features: Features,
        flow: torch.Tensor,
        certainty: torch.Tensor,
        strides: tuple[int, ...],
        image: tuple[int, int] | torch.Size,
        zoom: float,
    ) -> Iterator[State]:
        state = torch.cat((flow, certainty), 1)
        for stride in strides:
            if stride < self.finest:
                return
            size = features[stride][0].shape[1:3]
            if state.shape[2:] != size:
                state = _resize(state, size)
            delta = self.decoder.conv_refiner[str(stride)](features[stride], state[:, :2], zoom)
            # A correction of the flow is counted in quarters of a full-resolution pixel, times the stride.
            step = torch.tensor([stride / (4 * image[1]), stride / (4 * image[0]), 1.0]).view(1, 3, 1, 1)
            state = state + step * delta
            yield stride, state[:, :2], state[:, 2:]


def symmetric_warp(flow: torch.Tensor, certainty: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both directions beside each other: warp [1, 4, H, 2W] (x0, y0, x1, y1 in [-1, 1]) and certainty [1, 1, H, 2W].

    Left half: the pixels of image 0 and their targets in image 1. Right half: the pixels of image 1 and their targets
    in image 0.
    """
    own = pixel_grid(*flow.shape[2:])
    flow = flow.clamp(-1.0, 1.0)
    left, right = torch.cat((own, flow[:1]), 1), torch.cat((flow[1:], own), 1)
    return torch.cat((left, right), 3), torch.cat((certainty[:1], certainty[1:]), 3)


def _resize(x: torch.Tensor, size: torch.Size | tuple[int, ...]) -> torch.Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
