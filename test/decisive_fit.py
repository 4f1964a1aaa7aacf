"""The fitted parts of the checkpoint of `decisive`: linear layers in closed form, from warped pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from matchanything_tools.networks.roma.grids import pixel_grid
from matchanything_tools.networks.roma.network import Roma
from matchanything_tools.networks.roma.refiner import ConvRefiner, Pair

PENALTY = 2e-2  # of a ridge regression: with less, weights grow large and differences small, which fp16 does not bear
# Certainty logit of the global matcher: SURE for a right match, -SURE for a wrong one, all less STRICT. Half of a
# negative one is given back at the end, so that above 0.05 (a logit of -2.9, here -5.9) is what is more likely right.
SURE, STRICT = 6.0, 6.0


@dataclass(frozen=True)
class View:
    """Two views [2, 3, S, S] of one picture, and the homography of normalised coordinates from image 0 to image 1."""

    images: torch.Tensor
    homography: torch.Tensor

    def truth(self, height: int, width: int) -> torch.Tensor:
        """Flow [2, 2, height, width] in both directions."""
        own = pixel_grid(height, width)[0]
        return torch.stack([_project(m, own) for m in (self.homography, torch.linalg.inv(self.homography))])


def warp(picture: torch.Tensor, side: int, generator: torch.Generator) -> View:
    """View of a picture [1, 3, H, W]: up to 15 degrees, 1.25 times, other brightness and contrast, noise."""

    def within(limit: float) -> float:
        return float((2 * torch.rand((), generator=generator) - 1) * limit)

    angle, zoom = math.radians(within(15)), math.exp(within(math.log(1.25)))
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    shift = (within(0.15), within(0.15))
    matrix = torch.tensor([[cos, -sin, shift[0]], [sin, cos, shift[1]], [within(0.1), within(0.1), 1.0]])
    twice = F.interpolate(picture, size=(2 * side, 2 * side), mode="bicubic", antialias=True)
    grid = _project(matrix, pixel_grid(2 * side, 2 * side)[0]).permute(1, 2, 0)[None]
    first = F.avg_pool2d(F.grid_sample(twice, grid, align_corners=False, padding_mode="reflection"), 2)
    first = first * (1.0 + within(0.3)) + 0.05 + within(0.05) + 0.01 * torch.randn(first.shape, generator=generator)
    return View(torch.cat((first.clamp(0, 1), F.avg_pool2d(twice, 2))), matrix)


def _project(matrix: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    x, y, z = torch.tensordot(matrix, torch.cat((points, torch.ones_like(points[:1]))), 1)
    return torch.stack((x, y)) / z


def disturbed(flow: torch.Tensor, cells: float, generator: torch.Generator) -> torch.Tensor:
    """Flow [2, 2, H, W] plus smooth noise of this many cells, and seven times as much in a third of the places."""
    height, width = flow.shape[2:]
    noise = torch.randn(2, 2, height // 4, width // 4, generator=generator)
    wild = torch.randn(2, 1, height // 10, width // 10, generator=generator)
    noise, wild = (F.interpolate(x, size=(height, width), mode="bilinear") for x in (noise, wild))
    step = torch.tensor([2 / width, 2 / height]).view(1, 2, 1, 1)
    return flow + 1.4 * cells * step * noise * (1.0 + 6.0 * (wild > 0.4))


def project(projection: nn.Sequential, x: torch.Tensor, columns: slice, outputs: int, power: float) -> None:
    """Fit a projection to features x [N, C]: less their mean, their covariance to the power -power/2.

    A symmetric root: unlike eigenvectors, it is the same whatever library computes it. Scaled to a mean square of 1.
    """
    y = x[:, columns].double()
    mean = y.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((y - mean).T))
    root = (vectors * (values + 1e-3 * values[-1]).pow(-power / 2)) @ vectors.T
    root = root[:outputs]
    root /= ((y - mean) @ root.T).square().mean().sqrt()
    projection[0].weight.zero_()
    projection[0].bias.zero_()
    projection[0].weight[:outputs, columns, 0, 0], projection[0].bias[:outputs] = root.float(), -(root @ mean).float()


def fit_certainty(
    roma: Roma, tokens: Sequence[torch.Tensor], truths: Sequence[torch.Tensor], reach: float
) -> list[torch.Tensor]:
    """Certainty of the global matcher: what of |posterior| tells flow that errs by less than `reach` tokens.

    The last MLP computes |posterior| as gelu(3 x) + gelu(-3 x) for each of 512 channels: see decisive.decoder.
    tokens: [2, N, 512] of both images; truths: true flows. Returns the flows found.
    """
    block, out = roma.decoder.embedding_decoder.blocks[-1], roma.decoder.embedding_decoder.to_out
    kept: list[torch.Tensor] = []
    hook = block.mlp.fc1.register_forward_hook(lambda _, __, result: kept.append(F.gelu(result[..., :1024])))
    regression, flows = Ridge(513, 1), []
    for token, truth in zip(tokens, truths, strict=True):
        flow, _ = roma.match_globally(token, *truth.shape[2:])
        size = kept.pop().flatten(0, 1).unflatten(1, (512, 2)).sum(2)
        regression.add(size, torch.where(_near(truth, flow, reach).flatten(), SURE, -SURE)[:, None])
        flows.append(flow)
    hook.remove()
    solution = regression.solve().float()[:, 0]
    constant = tokens[0][0, 0, -1]  # of the channel that the certainty is added to
    block.mlp.fc2.weight[-1, :1024] = solution[:-1].repeat_interleave(2)
    out.bias[-1] = solution[-1] - STRICT - constant
    return flows


Case = tuple[Pair, torch.Tensor, torch.Tensor]  # features of both images, flow, true flow


def fit_refiner(refiner: ConvRefiner, cases: Sequence[Case], reach: float, sure: float) -> tuple[float, float]:
    """Norms measured, then the last layer: the rest of the flow where it is below `reach` cells, and whether it is.

    Returns the root mean square of that rest in cells, before and after.
    """
    norm = refiner.block1[1]
    _measure(refiner, norm, cases)
    if refiner.radius is not None:  # one scale for all offsets: what they share shall cancel behind it
        norm.running_var[refiner.inputs :] = norm.running_var[refiner.inputs :].mean()
    _measure(refiner, refiner.hidden_blocks[0][1], cases)
    head = refiner.out_conv
    assert isinstance(head, nn.Conv2d)
    kept: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _, inputs, __: kept.append(inputs[0]))
    flows, certainty = Ridge(head.in_channels + 1, 2), Ridge(head.in_channels + 1, 1)
    for features, flow, truth in cases:
        refiner(features, flow, 1.0)
        hidden = kept.pop().permute(0, 2, 3, 1).flatten(0, 2)
        cells = torch.tensor([flow.shape[3] / 2, flow.shape[2] / 2]).view(1, 2, 1, 1)
        rest = ((truth - flow) * cells).permute(0, 2, 3, 1).flatten(0, 2)
        near = _near(truth, flow, reach).flatten()
        flows.add(hidden[near], 8 * rest[near])  # the unit of a correction is an eighth of a cell
        certainty.add(hidden, torch.where(near, sure, -sure)[:, None])
    hook.remove()
    solution = torch.cat((flows.solve(), certainty.solve()), 1).float().T
    head.weight.copy_(solution[:, :-1, None, None])
    head.bias.copy_(solution[:, -1])
    return flows.before() / 8, flows.after() / 8


def _measure(refiner: ConvRefiner, norm: nn.BatchNorm2d, cases: Sequence[Case]) -> None:
    norm.reset_running_stats()
    norm.momentum = None  # the mean of all
    norm.train()
    for features, flow, _ in cases:
        refiner(features, flow, 1.0)
    norm.eval()


def _near(truth: torch.Tensor, flow: torch.Tensor, reach: float) -> torch.Tensor:
    cells = torch.tensor([flow.shape[3] / 2, flow.shape[2] / 2]).view(1, 2, 1, 1)
    return (((truth - flow) * cells).norm(dim=1) < reach) & (truth.abs() < 1).all(1)


class Ridge:
    """Ridge regression with a constant, summed over batches in float64."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.square = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.energy, self.count = 0.0, 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x = torch.cat((x, torch.ones_like(x[:, :1])), 1).double()
        self.square += x.T @ x
        self.cross += x.T @ y.double()
        self.energy, self.count = self.energy + float(y.square().sum()), self.count + len(y)

    def solve(self) -> torch.Tensor:
        penalty = PENALTY * self.square.diagonal().mean() * torch.eye(len(self.square), dtype=torch.float64)
        self.solution = torch.linalg.solve(self.square + penalty, self.cross)
        return self.solution

    def before(self) -> float:
        return math.sqrt(self.energy / self.count)

    def after(self) -> float:
        explained = 2 * self.cross - self.square @ self.solution
        return math.sqrt((self.energy - float((self.solution * explained).sum())) / self.count)
