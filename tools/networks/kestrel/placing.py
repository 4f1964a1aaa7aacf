"""Kestrel's two sub-pixel stages as they are exported: the same numbers as refine.py's, for single matches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from matchanything_tools.networks.kestrel.refine import PATCH, WINDOW, PatchRefiner, WindowRefiner

PADDED = PATCH * PATCH // 8 * 8 + 8  # samples of a patch, filled up to a multiple of 8: what tensor cores read


class Window(nn.Module):
    """WindowRefiner for queries that are already multiplied by the scale of the product, with keys of a whole map."""

    def __init__(self, refiner: WindowRefiner) -> None:
        super().__init__()
        scale = refiner.key.out_channels**-0.5
        first, second, last = _linear_layers(refiner.offset)
        samples, hidden = WINDOW * WINDOW, first.out_features
        width = hidden + 8  # the expected position, by its positive and negative part, rides along (8: see PADDED)
        a, b, c = torch.zeros(width, first.in_features), torch.zeros(width, width), torch.zeros(2, width)
        a[:hidden] = first.weight.detach()
        a[:hidden, samples : samples + refiner.key.out_channels] /= scale
        a[hidden : hidden + 2, :samples], a[hidden + 2 : hidden + 4, :samples] = refiner.grid.T, -refiner.grid.T
        b[:hidden, :hidden], b[hidden:, hidden:] = second.weight.detach(), torch.eye(8)
        c[:, :hidden] = last.weight.detach()[:2]
        c[:, hidden : hidden + 2], c[:, hidden + 2 : hidden + 4] = torch.eye(2), -torch.eye(2)
        self.filled = -a.shape[1] % 8
        self.first = _Linear(F.pad(a, (0, self.filled)), F.pad(first.bias.detach(), (0, 8)))
        self.second = _Linear(b, F.pad(second.bias.detach(), (0, 8)))
        self.last = _Linear(c, last.bias.detach()[:2])

    def forward(self, queries: Tensor, keys: Tensor, partner: Tensor, shape: tuple[int, int], start: int) -> Tensor:
        """queries [K, c], keys [rows, c] of which image 1's, of height and width `shape`, begin at `start`; partner
        [K]: cells of image 1. Returns offsets [K, 2] in px from the partner's centre."""
        place, inside = _windows(*shape, keys)
        window = keys.index_select(0, (place + start).index_select(0, partner).reshape(-1))
        window = window.reshape(-1, WINDOW * WINDOW, keys.shape[1])
        inside = inside.index_select(0, partner)
        logits = (window @ queries[:, :, None]).flatten(1) * inside
        weight = torch.softmax(logits, -1)
        expected = ((weight * inside)[:, None] @ window).flatten(1)
        x = torch.cat((weight, queries, expected, weight.new_zeros(len(weight), self.filled)), 1)
        return self.last(F.relu(self.second(F.relu(self.first(x))))).float()


def _windows(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """For each cell (4x4 keys) the rows of its window's 10x10 keys in a map [height * width], and 1 where they are
    inside of it, 0 where not (there the nearest key is named): [cells, 100]."""
    axes = []
    for length in (height, width):
        index = (torch.arange(length // 4, device=like.device) * 4)[:, None] + torch.arange(WINDOW, device=like.device)
        wanted = index - 3
        axes.append((wanted.clamp(min=0).clamp(max=length - 1), wanted))
    (rows, wanted_rows), (columns, wanted_columns) = axes
    place = rows[:, None, :, None] * width + columns[None, :, None, :]
    inside = (rows == wanted_rows)[:, None, :, None] & (columns == wanted_columns)[None, :, None, :]
    return place.reshape(-1, WINDOW * WINDOW), inside.reshape(-1, WINDOW * WINDOW).to(like.dtype)


class Patch(nn.Module):
    """PatchRefiner for one affine map per match; the patch of image 0 is filled up to PADDED samples."""

    grid: Tensor
    spread0: Tensor
    spread1: Tensor

    def __init__(self, refiner: PatchRefiner) -> None:
        super().__init__()
        samples, hidden = PATCH * PATCH, refiner.hidden.out_features
        self.hidden_width = hidden
        # Columns: the hidden layer, the logits of the shifts, and such of no weight; rows: sample 1, then sample 0.
        pairs = torch.zeros(hidden + PADDED, samples, PADDED)
        joined = torch.cat((refiner.hidden.weight, refiner.shift.weight)).detach()
        pairs[: hidden + samples, :, :samples] = joined.reshape(-1, samples, samples).transpose(1, 2)
        self.pairs = nn.Linear(samples * PADDED, hidden + PADDED, bias=False)
        self.pairs.weight = nn.Parameter(pairs.reshape(hidden + PADDED, -1))
        condition = F.pad(refiner.condition.weight.detach(), (0, 3, 0, PADDED))
        bias = torch.cat((refiner.hidden.bias + refiner.condition.bias, refiner.shift.bias)).detach()
        never = torch.full((PADDED - samples,), -1e4)
        self.condition = _Linear(condition, torch.cat((bias, never)))
        middle, last = _linear_layers(refiner.out)
        self.middle = _Linear(middle.weight.detach(), middle.bias.detach())
        final = torch.zeros(2, PADDED + middle.out_features)
        final[:, :samples], final[:, PADDED:] = refiner.grid.T, last.weight.detach()[:2]
        self.last = _Linear(final[[0, 1, 0, 1]], last.bias.detach()[[0, 1, 0, 1]])
        # Steps [4] (two rows, from x and y) times these are the samples' places about the centre, x, y, x, y, ...
        grid = refiner.grid.detach()
        spread = torch.zeros(2, 2, samples, 2)
        for axis in (0, 1):
            spread[axis, 0, :, axis], spread[axis, 1, :, axis] = grid[:, 0], grid[:, 1]
        self.register_buffer("spread0", F.pad(grid, (0, 0, 0, PADDED - samples)).reshape(1, -1), persistent=False)
        self.register_buffer("spread1", spread.reshape(4, -1), persistent=False)

    def forward(
        self, detail0: Tensor, detail1: Tensor, points0: Tensor, points1: Tensor, affine: Tensor, rounds: int
    ) -> Tensor:
        """detail [1, c, H/2, W/2] of each image, points [K, 2] px, affine [K, 4] row by row. Returns points1 after so
        many rounds, each from where the last one arrived."""
        dtype = self.middle.weight.dtype
        a, b, c, d = affine.split(1, 1)
        area = (a * d - b * c).abs().clamp(min=0.0625).clamp(max=16.0).sqrt()
        unit = 2 / area.sqrt()
        condition = torch.cat((affine / area, area.log(), area.new_zeros(len(area), 3)), 1)
        condition = self.condition(condition.to(dtype))
        to0, to1 = (_per_pixel(detail) for detail in (detail0, detail1))
        step = unit * affine * to1.repeat_interleave(2)
        # Everything below is in the units of GridSample, in which the image ends at -1 and 1.
        patch0 = _sample(detail0, points0 * to0 + (to0 / 2 - 1), unit * (self.spread0 * to0.repeat(PADDED)))
        patch0 = patch0.to(dtype)
        spread, at = step @ self.spread1, points1 * to1 + (to1 / 2 - 1)
        for _ in range(rounds):
            patch1 = _sample(detail1, at, spread).to(dtype)
            x = self.pairs((patch1 @ patch0.transpose(1, 2)).flatten(1)) + condition
            hidden, logits = x.split((self.hidden_width, PADDED), 1)
            hidden = F.relu(self.middle(F.relu(hidden)))
            shift = self.last(torch.cat((torch.softmax(logits, 1), hidden), 1)).float()
            at = at + (step * shift).reshape(-1, 2, 2).sum(2)
        return (at - (to1 / 2 - 1)) / to1


def _per_pixel(detail: Tensor) -> Tensor:
    """Units of GridSample per pixel of the input, (x, y) [2]; detail has half as many pixels."""
    return 1 / torch.tensor([detail.shape[3], detail.shape[2]], dtype=torch.float32, device=detail.device)


def _sample(detail: Tensor, centres: Tensor, spread: Tensor) -> Tensor:
    """Features [K, N, c] at centres [K, 2] + spread [K, 2 N]."""
    at = centres[:, None] + spread.reshape(spread.shape[0], -1, 2)
    return F.grid_sample(detail.float(), at[None], align_corners=False).permute(0, 2, 3, 1).squeeze(0)


class _Linear(nn.Module):
    """A product and a sum: ONNX Runtime's Gemm spreads the bias over the output first, with a slow kernel."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _linear_layers(layers: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in layers if isinstance(layer, nn.Linear)]
