"""The analytic parts of the checkpoint of `decisive`: what each layer of RoMa computes, written into its weights.

All functions change tensors of a seeded state dict in place; what they leave alone stays random.
"""

from __future__ import annotations

import math

import torch

State = dict[str, torch.Tensor]

# Channels of a ViT token: gradients of the patch, position, two large constants, orientations, those of neighbours.
GRADIENTS, POSITION, CONSTANT, OWN, AROUND, END = 0, 128, 192, 256, 320, 832
CONSTANT_VALUE = 40.0  # makes a layer norm all but linear: other channels hardly change the token's deviation
LENGTH = math.sqrt((2 * CONSTANT_VALUE**2 + 40.0) / 1024)  # what the norm divides by
PLACES, ORIENTATIONS, WAVES = 7, 8, 16
CONTRAST = 0.04  # of a gradient that counts as an edge; images are in [0, 1]


def vit(w: State, side: int, random: float = 0.01) -> None:
    """Tokens hold a histogram of oriented gradients of their patch (block 0) and of 16 places around (block 1).

    The other branches, random and this small, read and write what is not position. side: of the image in pixels; the
    distances between tokens, in cells of the position table, depend on it.
    """
    for block in range(24):
        p = f"blocks.{block}."
        for norm, scale in (("norm1", "ls1"), ("norm2", "ls2")):
            w[p + f"{scale}.gamma"] *= random / 0.2
            w[p + f"{norm}.weight"], w[p + f"{norm}.bias"] = torch.ones(1024), torch.zeros(1024)
        for key in ("attn.qkv.weight", "mlp.fc1.weight"):
            w[p + key][:, POSITION:OWN] = 0
            w[p + key] *= 5
        for key in ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"):
            w[p + key][POSITION:OWN] = 0
    w["norm.weight"], w["norm.bias"] = torch.full((1024,), LENGTH), torch.zeros(1024)
    patches = torch.zeros(1024, 3, 14, 14)
    patches[: 2 * PLACES**2] = _gradients()[:, None] / (3 * CONTRAST)
    w["patch_embed.proj.weight"], w["patch_embed.proj.bias"] = patches, torch.zeros(1024)
    _position(w)
    _orientations(w)
    _neighbours(w, 37 / (side / 14 + 0.1))


def _gradients(sigma: float = 1.3) -> torch.Tensor:
    """Derivatives of a Gaussian along x, then y, at 7 x 7 places of a patch [98, 14, 14]."""
    t = torch.arange(14.0)
    step = t - (2 * torch.arange(PLACES) + 0.5)[:, None]  # [7, 14]
    bell = torch.exp(-(step**2) / (2 * sigma**2))
    slope = step * bell
    slope -= bell * (slope.sum(1) / bell.sum(1))[:, None]  # nothing of a constant image, also at the patch's edge
    along_x = torch.einsum("yi,xj->yxij", bell, slope)
    filters = torch.cat((along_x, along_x.permute(1, 0, 3, 2))).reshape(-1, 14, 14)
    return filters / (filters.abs().sum((1, 2), keepdim=True) / 2)


def _frequencies() -> torch.Tensor:
    return 2 * math.pi * torch.arange(1, WAVES + 1) / 80  # the table has 37 cells


def _position(w: State) -> None:
    """cos and sin of x at 16 frequencies, then those of y."""
    angle = torch.arange(37.0)[:, None] * _frequencies()
    waves = torch.stack((angle.cos(), angle.sin()), 2).flatten(1)
    table = torch.zeros(37, 37, 1024)
    table[..., POSITION : POSITION + 32], table[..., POSITION + 32 : POSITION + 64] = waves, waves[:, None]
    w["pos_embed"] = torch.cat((torch.zeros(1, 1024), table.flatten(0, 1)))[None]
    w["pos_embed"][..., CONSTANT : CONSTANT + 2] = torch.tensor([CONSTANT_VALUE, -CONSTANT_VALUE])
    w["cls_token"] = torch.zeros(1, 1, 1024)


def _orientations(w: State, steepness: float = 4.0) -> None:
    """MLP of block 0: clamp(gradient . direction - 0.3, 0, 1), summed over the quarters of the patch."""
    fc1, bias, fc2 = (w[f"blocks.0.mlp.{key}"] for key in ("fc1.weight", "fc1.bias", "fc2.weight"))
    channels = slice(OWN, OWN + 4 * ORIENTATIONS)
    w["blocks.0.ls2.gamma"][channels], w["blocks.0.mlp.fc2.bias"][channels] = 1.0, 0.0
    units = PLACES**2 * ORIENTATIONS * 2
    fc1[:units], fc2[:, :units], fc2[channels] = 0.0, 0.0, 0.0
    at = (2 * torch.arange(PLACES) + 0.5) / 7 - 0.5  # 0 and 1 are the centres of the quarters
    share = torch.stack(((1 - at).clamp(0, 1), at.clamp(0, 1)))
    row = 0
    for place in range(PLACES**2):
        quarters = torch.outer(share[:, place // PLACES], share[:, place % PLACES]).flatten() / (3 * steepness)
        for orientation in range(ORIENTATIONS):
            angle = 2 * math.pi * orientation / ORIENTATIONS
            for above in (0, 1):  # a ramp that ends is the difference of two that do not
                fc1[row, GRADIENTS + place] = steepness * LENGTH * math.cos(angle)
                fc1[row, GRADIENTS + PLACES**2 + place] = steepness * LENGTH * math.sin(angle)
                bias[row] = -steepness * (above + 0.3)
                fc2[OWN + orientation : OWN + 32 : ORIENTATIONS, row] = (1 - 2 * above) * quarters
                row += 1


def _neighbours(w: State, unit: float) -> None:
    """Attention of block 1: each head looks at one offset, by position, and copies the orientations found there."""
    circle = [2 * math.pi * i / 7 for i in range(7)]
    offsets = [(1.5 * dx, 1.5 * dy, 12.0) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    offsets += [(4.5 * math.cos(angle), 4.5 * math.sin(angle), 6.0) for angle in circle]
    omega = _frequencies()
    share = torch.exp(-((1.4 * omega) ** 2) / 2)
    qkv, mix = w["blocks.1.attn.qkv.weight"], w["blocks.1.attn.proj.weight"]
    for tensor in (qkv, mix, w["blocks.1.attn.qkv.bias"], w["blocks.1.attn.proj.bias"]):
        tensor.zero_()
    w["blocks.1.ls1.gamma"].fill_(1.0)
    for head, (dx, dy, sharpness) in enumerate(offsets):
        gain = torch.sqrt(8 * sharpness * share / share.sum()) * LENGTH  # 8: the root of a head's width
        first = 64 * head
        for axis, shift in enumerate((dx, dy)):
            for m in range(WAVES):
                i = 32 * axis + 2 * m
                cos, sin = math.cos(float(omega[m]) * shift * unit), math.sin(float(omega[m]) * shift * unit)
                turn = gain[m] * torch.tensor([[cos, -sin], [sin, cos]])
                place = slice(POSITION + i, POSITION + i + 2)
                qkv[first + i : first + i + 2, place] = turn
                qkv[1024 + first + i : 1024 + first + i + 2, place] = gain[m] * torch.eye(2)
        qkv[2048 + first : 2048 + first + 32, OWN : OWN + 32] = LENGTH * torch.eye(32)
        mix[AROUND + 32 * head : AROUND + 32 * head + 32, first : first + 32] = torch.eye(32)


def vgg(w: State, contrast: float = 0.03, random: float = 0.15) -> None:
    """Clamped gradients in 16 + 8 + 8 directions (brightness, two colours), carried on, shifted and a bit blurred."""
    generator = torch.Generator().manual_seed(0)
    blur = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
    sobel = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-0.25, 0.0, 0.25]))
    colours = [([1 / 3, 1 / 3, 1 / 3], 16), ([0.5, -0.5, 0.0], 8), ([-0.25, -0.25, 0.5], 8)]
    for number, layer in enumerate((0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36)):
        key = f"encoder.cnn.layers.{layer}."
        noise = w[key + "weight"]
        outputs, inputs = noise.shape[:2]
        weight, bias = torch.zeros_like(noise), torch.zeros(outputs)
        if number == 0:
            turns = [(colour, 2 * math.pi * i / count) for colour, count in colours for i in range(count)]
            for i, (colour, angle) in enumerate(turns):
                slope = (math.cos(angle) * sobel + math.sin(angle) * sobel.T) / contrast
                weight[2 * i : 2 * i + 2] = torch.tensor(colour)[:, None, None] * slope
            bias[0::2], bias[1::2] = -0.2, -1.2
        elif number == 1:  # a ramp that ends, once sharp and once blurred
            for i in range(32):
                weight[i, 2 * i, 1, 1], weight[i, 2 * i + 1, 1, 1] = 1.0, -1.0
                weight[32 + i, 2 * i], weight[32 + i, 2 * i + 1] = blur, -blur
            weight += 2 * random * noise
        else:
            for i in range(inputs):
                weight[i, i] = 0.5 * blur
                weight[i, i, 1, 1] += 0.5
            for i in range(inputs, outputs):  # a copy of a neighbouring cell
                place = int(torch.randint(8, (), generator=generator))
                weight[i, i - inputs].view(9)[place + (place > 3)] = 1.0
            weight += random * noise
        w[key + "weight"], w[key + "bias"] = weight, bias
        neutral_norm(w, f"encoder.cnn.layers.{layer + 1}.", outputs)


def neutral_norm(w: State, key: str, width: int) -> None:
    """A batch norm that changes nothing."""
    w[key + "weight"], w[key + "bias"] = torch.ones(width), torch.zeros(width)
    w[key + "running_mean"], w[key + "running_var"] = torch.zeros(width), torch.ones(width) - 1e-5
