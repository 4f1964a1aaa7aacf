"""Kestrel's two sub-pixel stages as they are exported: the same numbers as refine.py's, for single matches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from matchanything_tools.networks.kestrel.refine import PATCH, WINDOW, PatchRefiner, WindowRefiner

PADDED = PATCH * PATCH // 8 * 8 + 8  # samples of a patch, filled up to a multiple of 8: what tensor cores read


class Window(nn.Module):
    """WindowRefiner for queries that are already multiplied by the scale of the product.

    Keys are a linear layer of the map that they are looked up in: it is applied to the queries instead, and to what the
    weights make of the map; where its bias counts only inside the map, the sum of the weights there carries it.
    """

    def __init__(self, refiner: WindowRefiner) -> None:
        super().__init__()
        scale = refiner.key.out_channels**-0.5
        first, second, last = _linear_layers(refiner.offset)
        samples, hidden, key = WINDOW * WINDOW, first.out_features, refiner.key
        matrix, bias = key.weight.detach().flatten(1), key.bias.detach()  # type: ignore[union-attr]
        self.to_map, self.to_bias = _Product(matrix.T), _Product(bias[None])
        # Beside the hidden channels go the expected position, by its positive and negative part, and a 1, by which
        # biases are rows of the weights: an addition less. Everything is a multiple of 8 wide, see PADDED.
        x, y, one, width = hidden, hidden + 2, hidden + 4, hidden + 8
        of_weight, of_query, of_expected = first.weight.detach().split((samples, *[key.out_channels] * 2), 1)
        inputs = torch.cat(
            (
                of_weight,
                (of_expected @ bias[:, None]).expand(-1, samples),
                of_query / scale,
                of_expected @ matrix,
                first.bias.detach()[:, None],
            ),
            1,
        )
        self.filled = -inputs.shape[1] % 8
        a, b, c = torch.zeros(width, inputs.shape[1] + self.filled), torch.zeros(width, width), torch.zeros(2, width)
        a[:hidden, : inputs.shape[1]], a[one, inputs.shape[1] - 1] = inputs, 1.0
        a[x:y, :samples], a[y:one, :samples] = refiner.grid.T, -refiner.grid.T
        b[:hidden, :hidden], b[hidden:, hidden:] = second.weight.detach(), torch.eye(8)
        b[:hidden, one], c[:, one] = second.bias.detach(), last.bias.detach()[:2]
        c[:, :hidden], c[:, x:y], c[:, y:one] = last.weight.detach()[:2], torch.eye(2), -torch.eye(2)
        self.first, self.second, self.last = _Product(a), _Product(b), _Product(c)

    def forward(self, queries: Tensor, fine: Tensor, partner: Tensor, shape: tuple[int, int], start: int) -> Tensor:
        """queries [K, c], fine [rows, c] of which image 1's, of height and width `shape`, begin at `start`; partner
        [K]: cells of image 1. Returns offsets [K, 2] in px from the partner's centre."""
        place, inside = _windows(*shape, fine)
        window = fine.index_select(0, (place + start).index_select(0, partner).reshape(-1))
        window = window.reshape(-1, WINDOW * WINDOW, fine.shape[1])
        inside = inside.index_select(0, partner)
        logits = (window @ self.to_map(queries)[:, :, None]).flatten(1) + self.to_bias(queries)
        weight = torch.softmax(logits * inside, -1)
        seen = weight * inside
        expected = (seen[:, None] @ window).flatten(1)
        one = F.pad(weight.new_ones(1), (0, self.filled)).expand(len(weight), -1)
        x = torch.cat((weight, seen, queries, expected, one), 1)
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
    everywhere: Tensor

    def __init__(self, refiner: PatchRefiner) -> None:
        super().__init__()
        samples, hidden = PATCH * PATCH, refiner.hidden.out_features
        middle, last = _linear_layers(refiner.out)
        # Columns: the hidden layer, a 1, by which biases are rows of the weights, zeros, and the logits of the shifts.
        # Rows: sample 1, then sample 0.
        one, width = hidden, hidden + PADDED
        self.logits = slice(width - samples, width)
        pairs = torch.zeros(width, samples, PADDED)
        for rows, layer in ((slice(0, hidden), refiner.hidden), (self.logits, refiner.shift)):
            pairs[rows, :, :samples] = layer.weight.detach().reshape(-1, samples, samples).transpose(1, 2)
        self.pairs = nn.Linear(samples * PADDED, width, bias=False)
        self.pairs.weight = nn.Parameter(pairs.reshape(width, -1))
        # Inputs: the map, twice the logarithm of its scale, a 1, zeros.
        condition = torch.zeros(width, 16)
        condition[:hidden, :5] = refiner.condition.weight.detach()
        condition[:, 4] /= 2
        condition[:hidden, 5] = (refiner.hidden.bias + refiner.condition.bias).detach()
        condition[one, 5], condition[self.logits, 5] = 1.0, refiner.shift.bias.detach()
        self.condition = _Product(condition)
        second = torch.zeros(middle.out_features, width)
        second[:, :hidden], second[:, one] = middle.weight.detach(), middle.bias.detach()
        # Probabilities add up to 1: their weights take the bias. What they are filled up with has none.
        probability = refiner.grid.T + last.bias.detach()[:2, None]
        final = torch.cat((probability, torch.zeros(2, PADDED - samples), last.weight.detach()[:2]), 1)
        self.middle, self.last = _Product(second), _Rows(final[[0, 1, 0, 1]])
        # Steps [4] (two rows, from x and y) times these are the samples' places about the centre, x, y, x, y, ...
        grid = refiner.grid.detach()
        spread = torch.zeros(2, 2, samples, 2)
        for axis in (0, 1):
            spread[axis, 0, :, axis], spread[axis, 1, :, axis] = grid[:, 0], grid[:, 1]
        self.register_buffer("spread0", F.pad(grid, (0, 0, 0, PADDED - samples)).reshape(1, -1), persistent=False)
        self.register_buffer("spread1", spread.reshape(4, -1), persistent=False)
        # Moves [4] (two summands in x, two in y) times these are those of all the samples.
        self.register_buffer("everywhere", torch.eye(2).repeat_interleave(2, 0).repeat(1, samples), persistent=False)

    def forward(
        self, detail0: Tensor, detail1: Tensor, at0: Tensor, at1: Tensor, affine: Tensor, area: Tensor, rounds: int
    ) -> Tensor:
        """detail [1, c, H/2, W/2] of each image, at [K, 2] units of GridSample (see `units`), affine [4, K] row by row,
        area [1, K]: its determinant. Returns at1 after so many rounds, each from where the last arrived."""
        dtype = self.middle.weight.dtype
        area = area.abs().clamp(min=0.0625, max=16.0)
        unit = area**-0.25
        step = unit * affine
        one = F.pad(torch.ones(1, 1, device=at0.device), (0, 0, 0, 10)).expand(-1, area.shape[1])
        condition = self.condition(torch.cat((step * unit, area.log(), one)).to(dtype).T)
        to0, to1 = (per_pixel(detail) for detail in (detail0, detail1))
        step = step * (2 * to1).repeat_interleave(2)[:, None]
        spread = unit.reshape(-1, 1) * (2 * self.spread0 * to0.repeat(PADDED))
        patch0 = _sample(detail0, at0[:, None] + spread.reshape(len(at0), -1, 2)).to(dtype)
        spread, filled = step.T @ self.spread1, patch0.new_zeros(len(at0), PADDED - PATCH * PATCH)
        places = at1[:, None] + spread.reshape(len(at0), -1, 2)
        moves = []
        for _ in range(rounds):
            patch1 = _sample(detail1, places).to(dtype)
            x = self.pairs((patch1 @ patch0.transpose(1, 2)).flatten(1)) + condition
            hidden = F.relu(self.middle(F.relu(x)))
            shift = self.last(torch.cat((torch.softmax(x[:, self.logits], 1), filled, hidden), 1)).float()
            moves.append(step * shift)
            # As a product, which takes less time than to add the summands up and then to all places.
            places = places + (moves[-1].T @ self.everywhere).reshape(places.shape)
        return at1 + sum(moves[1:], moves[0]).T @ self.everywhere[:, :2] if moves else at1


def per_pixel(detail: Tensor) -> Tensor:
    """Units of GridSample, in which an image goes from -1 to 1, per pixel of the input, (x, y) [2]; detail has half as
    many pixels."""
    return 1 / torch.tensor([detail.shape[3], detail.shape[2]], dtype=torch.float32, device=detail.device)


def units(points: Tensor, detail: Tensor) -> Tensor:
    """Pixels (x, y) [K, 2] -> units of GridSample."""
    scale = per_pixel(detail)
    return points * scale + (scale / 2 - 1)


def pixels(at: Tensor, detail: Tensor) -> Tensor:
    """The inverse of `units`."""
    scale = per_pixel(detail)
    return (at - (scale / 2 - 1)) / scale


def _sample(detail: Tensor, places: Tensor) -> Tensor:
    """Features [K, N, c] at places [K, N, 2]."""
    return F.grid_sample(detail.float(), places[None], align_corners=False).permute(0, 2, 3, 1).squeeze(0)


class _Product(nn.Module):
    """x @ weight^T, the weight stored as the product reads it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class _Rows(nn.Module):
    """weight @ x^T: the same, results as rows."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x.T


def _linear_layers(layers: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in layers if isinstance(layer, nn.Linear)]
