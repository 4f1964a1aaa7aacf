"""What another sensor, another hour or a poor camera would make of a photograph: RGB -> one grey channel.

Every sample of a batch draws its own changes. All functions keep [B, C, H, W] and run on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def sense(rgb: Tensor, difficulty: Tensor, natural: Tensor) -> Tensor:
    """rgb [B, 3, H, W] in [0, 1] -> grey [B, 1, H, W] in [0, 1], quantised to 8 bits.

    difficulty [B] in 0..1; natural [B] bool: keep to what one camera's exposure and colours could do. Sides: multiples
    of 8.
    """
    image = torch.sigmoid(_render(rgb, difficulty, natural))
    image = _tone(image, difficulty, natural)
    image = _degrade(image, difficulty)
    return (image.clamp(0, 1) * 255).round() / 255


class _Draw:
    """Random numbers of a batch."""

    def __init__(self, like: Tensor) -> None:
        self.count, self.device = len(like), like.device

    def chance(self, probability: Tensor | float) -> Tensor:
        return torch.rand(self.count, device=self.device) < probability

    def flat(self, low: float, high: float) -> Tensor:
        return torch.rand(self.count, device=self.device) * (high - low) + low

    def uniform(self, low: float, high: float) -> Tensor:
        return self.flat(low, high).view(-1, 1, 1, 1)

    def field(self, cells: int, shape: torch.Size) -> Tensor:
        """Smooth random map with about cells x cells bumps."""
        coarse = torch.randn(self.count, 1, cells, cells, device=self.device)
        return F.interpolate(coarse, size=shape[-2:], mode="bicubic", align_corners=True)


def _choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.view(-1, 1, 1, 1), yes, no)


def _render(rgb: Tensor, difficulty: Tensor, natural: Tensor) -> Tensor:
    """The grey image of a random kind of sensor, about zero mean and unit variance."""
    draw = _Draw(rgb)
    count = len(rgb)
    weights = -torch.log(torch.rand(count, 3, device=rgb.device) + 1e-6)
    weights = weights / weights.sum(1, keepdim=True)
    camera = 0.3 * weights + 0.7 * torch.tensor([0.3, 0.59, 0.11], device=rgb.device)
    weights = torch.where((draw.chance(0.5) | natural)[:, None], camera, weights)
    luma = (rgb * weights.view(count, 3, 1, 1)).sum(1, keepdim=True)
    signed = (rgb * torch.randn(count, 3, 1, 1, device=rgb.device)).sum(1, keepdim=True) + 0.03 * luma
    soft = blur(luma, draw.flat(0.8, 3.0))
    edges = _gradient(soft)
    alien = _random_sensor(
        torch.cat((_standard(rgb), _standard(soft), _standard(wide_blur(luma, draw.flat(5, 20))), _standard(edges)), 1),
        draw,
    )
    local_mean = wide_blur(luma, draw.flat(5, 16))
    contrast = (luma - local_mean) / (wide_blur((luma - local_mean) ** 2, draw.flat(8, 20)) + 2e-4).sqrt()
    drawn_edges = _standard(edges ** draw.uniform(0.4, 1.0)) * 0.9 - 0.2
    kind = torch.rand(count, device=rgb.device)
    kind = torch.where(natural | draw.chance(1 - difficulty), torch.zeros_like(kind), kind)
    image = _standard(luma)
    shares = (
        (0.33, _standard(signed)),
        (0.46, alien),
        (0.74, drawn_edges),
        (0.82, _standard(contrast)),
        (0.92, _radar(alien, edges, draw)),
    )
    for above, other in shares:
        image = _choose(kind > above, other, image)
    image = image + _choose(
        draw.chance(0.1 + 0.4 * difficulty), draw.field(4, rgb.shape) * draw.uniform(0.1, 0.7), torch.zeros_like(image)
    )
    shadow = torch.sigmoid(draw.field(5, rgb.shape) * 8 - draw.uniform(0, 6)) * draw.uniform(0.2, 0.8)
    image = image * (1 - _choose(draw.chance(0.3 * difficulty), shadow, torch.zeros_like(shadow)))
    return image * draw.uniform(0.7, 2.0) + draw.uniform(-0.8, 0.8)


def _random_sensor(features: Tensor, draw: _Draw) -> Tensor:
    """A random network of 8 hidden units, half of them waves: any response, also to what the eye does not see."""
    count, channels, height, width = features.shape
    gain = torch.tensor([1, 1, 1, 1, 0.7, 0.5], device=features.device) * draw.flat(0.3, 1.0).view(-1, 1, 1)
    hidden = torch.bmm(torch.randn(count, 8, channels, device=features.device) * gain, features.flatten(2))
    hidden = hidden + torch.randn(count, 8, 1, device=features.device)
    waves = torch.sin(hidden[:, :4] * draw.flat(0.7, 1.6).view(-1, 1, 1))
    hidden = torch.cat((waves, torch.tanh(hidden[:, 4:])), 1)
    out = torch.bmm(torch.randn(count, 1, 8, device=features.device), hidden)
    return _standard(out.view(count, 1, height, width))


def _radar(surface: Tensor, edges: Tensor, draw: _Draw) -> Tensor:
    """Reflectivity from a smoothed surface with bright edges, under multiplicative speckle of a few looks, in dB."""
    smooth = blur(surface, draw.flat(0.5, 2.0)) * draw.uniform(0.3, 1.0) + _standard(edges) * draw.uniform(0.1, 0.8)
    looks = draw.uniform(1.0, 6.0).round()
    speckle = torch.zeros_like(smooth)
    for look in range(6):
        single = -torch.log(torch.rand_like(smooth) + 1e-6)
        speckle = speckle + torch.where(look < looks, single, torch.zeros_like(single))
    decibel = smooth + torch.log(speckle / looks + 0.05)
    return _standard(blur(decibel, draw.flat(0.05, 1.0)))


def _tone(image: Tensor, difficulty: Tensor, natural: Tensor) -> Tensor:
    """A random curve through 9 knots, for some not monotone, then inversion for some."""
    draw = _Draw(image)
    knots = 9
    rise = torch.rand(draw.count, knots - 1, device=image.device) ** 1.5 + 0.05
    curve = F.pad(rise.cumsum(1) / rise.sum(1, keepdim=True), (1, 0))
    folded = 0.8 * torch.rand(draw.count, knots, device=image.device) + 0.2 * curve
    curve = torch.where((draw.chance(0.22 * difficulty) & ~natural)[:, None], folded, curve)
    straight = torch.linspace(0, 1, knots, device=image.device)
    curve = torch.where(draw.chance(0.5)[:, None], curve, straight)
    position = image.clamp(0, 1) * (knots - 1)
    low = position.floor().clamp(max=knots - 2)
    index = low.long().flatten(1)
    fraction = position - low
    image = (
        curve.gather(1, index).view_as(image) * (1 - fraction) + curve.gather(1, index + 1).view_as(image) * fraction
    )
    return _choose(draw.chance(0.28 * difficulty) & ~natural, 1 - image, image)


def _degrade(image: Tensor, difficulty: Tensor) -> Tensor:
    """Blur, occluders, additive noise, speckle and 8x8 block quantisation, each for some."""
    draw = _Draw(image)
    hard = difficulty.view(-1, 1, 1, 1)
    sigma = torch.rand(draw.count, device=image.device) ** 2 * (0.8 + 2.4 * difficulty) + 0.3
    image = _choose(draw.chance(0.45), blur(image, sigma), image)
    covered = torch.where(draw.field(7, image.shape) > 1.5, torch.roll(image, 1, 0), image)
    image = _choose(draw.chance(0.25 * difficulty), covered, image)
    noise = _choose(draw.chance(0.6), draw.uniform(0, 0.06) * (0.3 + hard), draw.uniform(0, 0.004))
    image = image + torch.randn_like(image) * noise
    grain = torch.randn_like(image)
    grain = _choose(draw.chance(0.5), grain, F.avg_pool2d(grain, 3, 1, 1) * 2.2)
    speckle = _choose(draw.chance(0.2 * difficulty), draw.uniform(0.05, 0.4), draw.uniform(0, 0.001))
    image = image * torch.exp(grain * speckle)
    return _choose(draw.chance(0.3), _quantise(image, draw.uniform(0.02, 0.15)), image)


def _quantise(image: Tensor, strength: Tensor) -> Tensor:
    """Round the DCT coefficients of 8x8 blocks, coarser for high frequencies."""
    count, _, height, width = image.shape
    k = torch.arange(8.0, device=image.device)
    basis = torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) * 0.5
    basis[0] *= math.sqrt(0.5)
    step = strength.view(count, 1, 1, 1, 1) * (0.3 + 0.15 * (k[:, None] + k))
    blocks = image.view(count, height // 8, 8, width // 8, 8).transpose(2, 3)
    blocks = ((basis @ blocks @ basis.T) / step).round() * step
    return (basis.T @ blocks @ basis).transpose(2, 3).reshape(count, 1, height, width)


def blur(image: Tensor, sigma: Tensor, radius: int = 6) -> Tensor:
    """Gaussian blur with a sigma [B] for each sample, px; edges are continued."""
    count, channels, height, width = image.shape
    offset = torch.arange(-radius, radius + 1, device=image.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None].clamp(min=0.05)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(image.reshape(1, count * channels, height, width), (radius, radius, 0, 0), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None], groups=count * channels)
    flat = F.conv2d(
        F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel[:, None, :, None], groups=count * channels
    )
    return flat.view(count, channels, height, width)


def wide_blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of a large sigma [B], px, on a 4x smaller image."""
    return F.interpolate(blur(F.avg_pool2d(image, 4), sigma / 4), scale_factor=4, mode="bilinear", align_corners=False)


def _gradient(image: Tensor) -> Tensor:
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return (dx * dx + dy * dy + 1e-7).sqrt()


def _standard(image: Tensor) -> Tensor:
    mean = image.mean((2, 3), keepdim=True)
    return (image - mean) / (image.var((2, 3), keepdim=True) + 1e-5).sqrt()
