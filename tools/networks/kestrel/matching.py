"""Kestrel as a matcher: two images -> keypoints and scores, with a fixed number of rows, in operators for export."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from matchanything_tools.networks.kestrel.affine import local_affine
from matchanything_tools.networks.kestrel.model import SHARPNESS, Features, Kestrel, cell_centres
from matchanything_tools.networks.kestrel.refine import steps

LARGEST_LOGIT = 75.0  # the sum of 1e4 exponentials of it stays within fp32


class KestrelMatcher(nn.Module):
    """Images float32 [1, 1, H, W] in [0, 1], sides multiples of 32 -> keypoints0, keypoints1 [K, 2], scores [K].

    rounds: how often the patch stage runs, each time from where the last one arrived. same_size: both images go
    through the network as one batch, which a graph of fixed shapes can do.
    """

    def __init__(self, network: Kestrel, max_matches: int = 2000, rounds: int = 2, same_size: bool = False) -> None:
        super().__init__()
        self.network, self.max_matches, self.rounds, self.same_size = network, max_matches, rounds, same_size

    def forward(self, image0: Tensor, image1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features0, features1 = self.encode(image0, image1)
        shape0, shape1 = features0.matchable.shape[1:], features1.matchable.shape[1:]
        confidence, partner = dual_softmax(features0, features1)
        centres0 = cell_centres(shape0[0], shape0[1], image0.device)
        centres1 = cell_centres(shape1[0], shape1[1], image0.device)
        affine = local_affine(centres1[partner], confidence, shape0)
        # zeros behind the cells: small images have fewer cells than there are rows to fill
        padded = torch.cat((confidence, confidence.new_zeros(self.max_matches)))
        scores, cells = padded.topk(self.max_matches)
        cells = torch.where(scores > 0, cells, torch.zeros_like(cells))
        points0, affine = centres0[cells], affine[cells]
        points1 = self.place(features0, features1, cells, partner[cells], points0, centres1, affine)
        return points0, points1, scores

    def encode(self, image0: Tensor, image1: Tensor) -> tuple[Features, Features]:
        """Features of both images, each a batch of one."""
        if self.same_size:
            both = self.network.features(torch.cat((image0, image1)))
            return Features(*(part[:1] for part in both)), Features(*(part[1:] for part in both))
        maps = [self.network.pyramid(image) for image in (image0, image1)]
        tokens = self.network.attend([x3.permute(0, 2, 3, 1) for _, _, x3 in maps])
        return (
            self.network.heads(maps[0][0], maps[0][1], tokens[0]),
            self.network.heads(maps[1][0], maps[1][1], tokens[1]),
        )

    def place(
        self,
        features0: Features,
        features1: Features,
        cells: Tensor,
        partner: Tensor,
        points0: Tensor,
        centres1: Tensor,
        affine: Tensor,
    ) -> Tensor:
        """Sub-pixel places [K, 2] in image 1 of the centres `points0` of `cells`."""
        network = self.network
        queries = features0.queries.flatten(0, 2)[cells]
        offset, _, _ = network.window(queries, features1.keys, 0, partner)
        points1 = centres1[partner] + offset
        step0, step1 = steps(affine)
        patch0 = network.patch.sample(features0.detail, points0[None], step0[None])
        for _ in range(self.rounds):
            patch1 = network.patch.sample(features1.detail, points1[None], step1[None])
            shift, _, _ = network.patch.compare(patch0, patch1, affine[None])
            points1 = points1 + (step1 * shift[0, :, None]).sum(2)
        return points1


def dual_softmax(features0: Features, features1: Features) -> tuple[Tensor, Tensor]:
    """Confidence [h0 * w0] of every cell of image 0 in its partner [h0 * w0] of image 1; 0 unless mutual.

    Softmax over rows times softmax over columns (Rocco et al. 2018) times both matchabilities. The exponential is
    taken once, and the products are compared by their square roots: a matrix of all cells by all cells is large, and
    every pass over it costs.
    """
    a, b = features0.descriptors.float().flatten(0, 2), features1.descriptors.float().flatten(0, 2)
    a = a * (SHARPNESS / a.shape[1])
    bound = (a.square().sum(1).amax(0) * b.square().sum(1).amax(0)).sqrt()  # of every logit, by Cauchy-Schwarz
    lowered = (LARGEST_LOGIT - bound).clamp(max=0.0)  # enters as one more channel: cheaper than a pass over all pairs
    a = torch.cat((a, torch.ones_like(a[:, :1])), 1)
    b = torch.cat((b, lowered.expand(b.shape[0], 1)), 1)
    exponential = torch.exp(a @ b.transpose(0, 1))
    share0 = features0.matchable.float().sigmoid().flatten() / exponential.sum(1).clamp(min=1e-30)
    share1 = features1.matchable.float().sigmoid().flatten() / exponential.sum(0).clamp(min=1e-30)
    partner = (exponential * share1.sqrt()).argmax(1)
    upwards = exponential * share0.sqrt()[:, None]
    own = upwards.gather(1, partner[:, None])[:, 0]
    mutual = own >= upwards.amax(0)[partner]
    best = own * own * share1[partner]
    return torch.where(mutual, best, torch.zeros_like(best)), partner
