"""Kestrel as a matcher: two images -> keypoints and scores, with a fixed number of rows, in operators for export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from matchanything_tools.networks.kestrel.affine import local_affine
from matchanything_tools.networks.kestrel.attending import BLOCK
from matchanything_tools.networks.kestrel.encoder import Encoder, FixedEncoder
from matchanything_tools.networks.kestrel.model import Kestrel, cell_centres
from matchanything_tools.networks.kestrel.placing import Patch, Window, per_pixel, pixels, units
from matchanything_tools.networks.topk import topk

# Exponents of what exponentials and weights are multiplied by, so that fp16 holds both down to e^-14 or so, which they
# reach where matches are worth it, and their sums up to 20, above which no share reaches the score threshold.
LIFT, WEIGHT_LIFT = 1.5, 6.5
NEVER = -1e4  # the logarithm of no confidence at all


class KestrelMatcher(nn.Module):
    """Images float32 [1, 1, H, W] in [0, 1], sides multiples of 32 -> keypoints0, keypoints1 [K, 2], scores [K].

    network: its parameters are taken over; its blocks must be fused. rounds: how often the patch stage runs, each time
    from where the last one arrived. same_size: both images go through the network as one batch, which a graph of fixed
    shapes can do. half: the network in fp16; coordinates and what decides them stay fp32.
    """

    def __init__(
        self, network: Kestrel, max_matches: int = 2000, rounds: int = 2, same_size: bool = False, half: bool = False
    ) -> None:
        super().__init__()
        self.max_matches, self.rounds, self.same_size = max_matches, rounds, same_size
        self.encoder = FixedEncoder(network) if same_size else Encoder(network)
        self.window, self.patch = Window(network.window), Patch(network.patch)
        if half:
            self.encoder.half()
            for part in (self.window, self.patch):
                for child in part.children():
                    child.half()

    def forward(self, image0: Tensor, image1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        together = self.same_size
        features = self.encoder([torch.cat((image0, image1))] if together else [image0, image1])
        first, second, last = features[0], features[-1], len(features[-1].keys) - 1
        shape0, shape1 = first.matchable.shape[1:], second.matchable.shape[1:]
        logarithm, partner = dual_softmax(
            [each.descriptors for each in features], [each.matchable for each in features]
        )
        centres0 = cell_centres(shape0[0], shape0[1], image0.device)
        centres1 = cell_centres(shape1[0], shape1[1], image0.device)
        confidence = confidence_of(logarithm)
        # The logarithms' order is the same, and a TopK of fp16 takes less time.
        if not together or confidence.shape[0] < self.max_matches:  # fewer cells than there are rows to fill
            highest, cells = topk(F.pad(logarithm, (0, self.max_matches), value=NEVER), self.max_matches)
            scores = confidence_of(highest)
            cells = torch.where(scores > 0, cells, torch.zeros_like(cells))
        else:
            _, cells = topk(logarithm, self.max_matches)
            scores = confidence.index_select(0, cells)
        affine, area = local_affine(shape1, partner, confidence, shape0, cells, scores[:1])
        chosen = partner.index_select(0, cells)
        height, width = second.keys.shape[1:3]
        queries = first.queries.flatten(0, 2).index_select(0, cells)
        keys, start = second.keys.flatten(0, 2), last * height * width
        offset = self.window(queries, keys, chosen, (height, width), start)
        detail0, detail1 = first.detail[:1], _last(second.detail) if together else second.detail
        at0 = units(centres0, detail0).index_select(0, cells)
        at1 = units(centres1, detail1).index_select(0, chosen) + offset * per_pixel(detail1)
        at1 = self.patch(detail0, detail1, at0, at1, affine, area, self.rounds)
        return centres0.index_select(0, cells), pixels(at1, detail1), scores


def dual_softmax(descriptors: list[Tensor], matchable: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Half the logarithm of the confidence [h0 * w0] of every cell of image 0 in its partner [h0 * w0] of image 1, see
    `confidence_of`; NEVER unless mutual.

    descriptors [B, h, w, d], whose products are the logits; matchable [B, h, w] logits; one batch of two images, or two
    of one. Softmax over rows times softmax over columns (Rocco et al. 2018) times both matchabilities.

    A matrix of all cells by all cells is large, and every pass over it costs. So that fp16 suffices for it, half the
    squared lengths of both descriptors are taken off, which leaves minus half their squared distance: precise where it
    is small, never above 0, and above -14 for whatever is worth a match. The sums of its exponentials then tell what
    to add to its rows and columns that makes it half the logarithm of the confidence, and a second product is cheaper
    than two additions to the whole.
    """
    (height0, width0), (height1, width1) = matchable[0].shape[1:], matchable[-1].shape[1:]
    flat = [x.flatten(1, 2) for x in descriptors]
    dtype = flat[0].dtype
    halves = [(x * x) @ torch.full((x.shape[2], 1), 0.5, dtype=dtype) for x in flat]
    above = [half - (_highest(half) - WEIGHT_LIFT) for half in halves]
    weights = [torch.exp(each) for each in above]
    exponential = torch.exp(_product(flat, [[half] for half in halves], [-1.0]))
    rows = exponential @ weights[-1][-1]
    columns = weights[0][0].reshape(1, -1) @ exponential
    totals = [rows[None], columns.reshape(1, -1, 1)]
    totals = totals if len(flat) == 2 else [torch.cat(totals)]
    least = max(torch.finfo(dtype).tiny / 512, 1e-37)  # what fp16 cannot hold any more
    shares = [
        (m.flatten(1)[:, :, None].float().sigmoid() / total.float().clamp(least, 1e30)).log()
        for m, total in zip(matchable, totals, strict=True)
    ]
    summands = [[*pair, *_in_two(share, dtype)] for *pair, share in zip(halves, above, shares, strict=True)]
    logarithm = _product(flat, summands, [-1.0, 0.5, 0.5, 0.5])
    if isinstance(height1, int):
        partner = logarithm.argmax(1)
        best = logarithm.gather(1, partner[:, None]).flatten()
        highest = logarithm.reshape(1, height0, width0, -1).permute(0, 3, 1, 2)
        for window in ((1, width0), (BLOCK, 1), (height0 // BLOCK, 1)):  # pooling, where GPUs reduce slowly
            highest = F.max_pool2d(highest, window)
        highest = highest.permute(0, 2, 3, 1).flatten()
    else:
        # In two steps, which on a CPU are faster than an argmax over all: the best row of image 1, the best in it.
        count = logarithm.shape[0]
        table = logarithm.reshape(count, height1, width1)
        row = table.amax(2).argmax(1)
        among = torch.arange(count, device=row.device) * height1 + row
        chosen = table.flatten(0, 1).index_select(0, among)
        partner, best = row * width1 + chosen.argmax(1), chosen.amax(1)
        highest = logarithm.reshape(height0, width0, -1).amax(1).amax(0)
    better = (highest.index_select(0, partner) - best).bool()  # a comparison of fp16 would be exported with casts
    return torch.where(better, torch.full_like(best, NEVER), best), partner


def _each(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[N, C] of each image, from one batch [2, N, C] or two [1, N, C]. Along different axes: see _last."""
    return x[0][:1].squeeze(0), x[-1].flatten(0, 1)[-x[-1].shape[1] :]


def _last(x: Tensor) -> Tensor:
    """The second of two images [2, C, H, W] as [1, C, H, W], cut out as rows of channels-last memory: with two slices
    along one axis, ONNX Runtime would make a Split, whose kernel takes longer than two copies."""
    height = x.shape[2]
    return x.permute(0, 2, 3, 1).flatten(0, 1)[height:].unsqueeze(0).permute(0, 3, 1, 2)


def confidence_of(logarithm: Tensor) -> Tensor:
    """Confidences, in fp32, of what `dual_softmax` returns."""
    return torch.exp(2 * logarithm.float()).clamp(max=1.0)


def _product(flat: list[Tensor], summands: list[list[Tensor]], factors: list[float]) -> Tensor:
    """The descriptors' products plus LIFT and, of both sides, the summands times their factors, as one product.

    flat [B, N, d], summands [B, N, 1] of its type: one batch of two, or two of one.
    """
    columns = [torch.cat(each, 2) if len(each) > 1 else each[0] for each in summands]
    (x0, x1), (added0, added1) = _each(flat), _each(columns)
    zeros = [0.0] * (-(x0.shape[1] + 2 * len(factors) + 1) % 8)  # tensor cores read eight channels at once
    a = torch.cat((x0, _rows([*factors, 1.0, *zeros], x0), added0), 1)
    b = torch.cat((x1, added1, _rows([LIFT, *zeros, *factors], x1)), 1)
    return a @ b.transpose(0, 1)


def _highest(x: Tensor) -> Tensor:
    """Maximum [B, 1, 1] of [B, N, 1], by its place: on a GPU, ONNX Runtime reduces slowly but finds places fast."""
    flat = x.flatten(1)
    return flat.gather(1, flat.argmax(1, keepdim=True)).unsqueeze(2)


def _rows(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).expand(like.shape[0], -1)


def _in_two(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float32 tensor as a sum of two of another type: what rounding takes away is rounded once more."""
    high = x.to(dtype)
    return high, (x - high.float()).to(dtype)
