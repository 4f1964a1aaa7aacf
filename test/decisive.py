"""A checkpoint of RoMa that matches images without training: what tests use where a decision must be clear.

With seeded random weights many of the 4096 anchors of a token are all but equal, and any rounding may change which is
the best. Trained weights decide; these do too, being made so that every part does what it is there for:

- the ViT computes oriented gradients of a patch and its surroundings, VGG those of a pixel (decisive_parts);
- the Gaussian process is as published, with cosines on a regular grid of frequencies;
- the classifier's weights are those cosines at the anchors: the logits are the posterior's density there;
- projections whiten, certainty and the corrections of the refiners of stride 16, 8 and 4 are linear regressions
  (decisive_fit) on drone pictures of the demo, warped by known homographies. Those of stride 2 and 1 hardly correct.

Everything else is random as in `seeded`, but small. Layout and keys are the published ones. This is good for
measuring arithmetic, as of fp16 against fp32, on networks that find real matches. It says nothing about the accuracy
of trained weights: these know no more than a hand-made descriptor.

    python test/decisive.py FOLDER        # writes roma.pth and dinov2.pth
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import cv2
import seeded
import torch
from decisive_fit import Case, disturbed, fit_certainty, fit_refiner, project, warp
from decisive_parts import AROUND, END, State, neutral_norm, vgg, vit

from matchanything_tools.networks.dinov2 import PATCH
from matchanything_tools.networks.roma.embedding_decoder import ANCHORS, DEPTH
from matchanything_tools.networks.roma.gaussian_process import WIDTH
from matchanything_tools.networks.roma.grids import pixel_grid
from matchanything_tools.networks.roma.network import Roma
from matchanything_tools.networks.roma.refiner import EMBEDDING, FEATURES, HIDDEN_BLOCKS, RADIUS

PICTURES = Path(__file__).parents[1] / "demo" / "sequence"
FRAMES = (0, 12, 24)
LENGTH = 2.3  # period of the lowest frequency: more than the width of the image, 2
SHARPNESS = 20.0  # of the anchors' logits, rad per half image
SCALE = 60.0  # of the anchors' logits
ENERGY = 20.0  # mean square length of projected tokens, but for the constant channel
CONSTANT = 1.5  # times that is the square of the constant: cosines become (cos + 1.5)/2.5, the kernel wider
RANDOM = 0.03  # of what is random in the decoder and refiners


@torch.no_grad()
def network(side: int = 560, fine: int = 280, vit_blocks: slice = slice(None), blocks: slice = slice(None)) -> Roma:
    """RoMa for a first pass at this size, with these blocks of ViT and decoder; refiners fitted at size `fine`."""
    w, w_vit = ({k: v.clone() for k, v in seeded.state(target).items()} for target in ("roma", "dinov2"))
    vit(w_vit, side)
    vgg(w)
    decoder(w)
    for stride, width in FEATURES.items():
        refiner(w, stride)
        neutral_norm(w, f"decoder.proj.{stride}.1.", width)
    with torch.device("meta"):
        roma = Roma()
    roma.published.load_state_dict(w, assign=True)
    roma.dinov2.load_state_dict(w_vit, assign=True)
    roma.eval().requires_grad_(False)
    roma.dinov2.blocks = roma.dinov2.blocks[vit_blocks]
    roma.decoder.embedding_decoder.blocks = roma.decoder.embedding_decoder.blocks[blocks]
    fit(roma, side, fine)
    return roma


def decoder(w: State) -> None:
    """Targets of the Gaussian process, the classifier, and |posterior| in the last MLP; other branches small."""
    waves = frequencies()
    half = len(waves)
    w["decoder.gps.16.pos_conv.weight"] = (torch.cat((waves, waves)) / (8 * math.pi)).float()[..., None, None]
    w["decoder.gps.16.pos_conv.bias"] = torch.cat((torch.zeros(half), torch.full((half,), -1 / 16)))  # cos, then sin
    phase = pixel_grid(ANCHORS, ANCHORS).flatten(2)[0].T.double() @ waves.T
    share = torch.exp(-(waves**2).sum(1) / (2 * SHARPNESS**2))
    share *= SCALE / share.sum()
    key = "decoder.embedding_decoder."
    out = torch.zeros_like(w[key + "to_out.weight"])
    out[:-1, :WIDTH] = torch.cat((share * phase.cos(), share * phase.sin()), 1).float()
    out[-1, -1] = 1.0  # certainty is what the last MLP adds to the constant channel
    w[key + "to_out.weight"], w[key + "to_out.bias"] = out, torch.zeros(len(out))
    for block in range(DEPTH):
        for part in ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"):
            w[f"{key}blocks.{block}.{part}"] *= RANDOM
    last = f"{key}blocks.{DEPTH - 1}."
    units = 2 * WIDTH
    w[last + "norm2.weight"], w[last + "norm2.bias"] = torch.ones(1024), torch.zeros(1024)
    w[last + "mlp.fc1.bias"][:units], w[last + "mlp.fc2.weight"][:, :units] = 0.0, 0.0
    w[last + "mlp.fc2.weight"][-1] = 0.0
    signs = torch.tensor([3.0, -3.0])
    w[last + "mlp.fc1.weight"][:units] = torch.kron(torch.eye(WIDTH, 1024), signs[:, None])


def frequencies() -> torch.Tensor:
    """The 256 lowest of a square grid of frequencies (x, y), one of each and its negative; rad per half image."""
    n = torch.arange(-20, 21, dtype=torch.float64)
    grid = torch.cartesian_prod(n, n)
    grid = grid[(grid[:, 1] > 0) | ((grid[:, 1] == 0) & (grid[:, 0] > 0))]
    order = torch.argsort((grid**2).sum(1), stable=True)[: WIDTH // 2]
    return grid[order] * (2 * math.pi / LENGTH)


def refiner(w: State, stride: int) -> None:
    """Correlation, smoothed, into one layer of random units; the layers behind pass these on."""
    offsets = (2 * RADIUS[stride] + 1) ** 2 if stride in RADIUS else 0
    first = 2 * FEATURES[stride] + EMBEDDING[stride]
    width = first + offsets
    for number, block in enumerate(("block1", *(f"hidden_blocks.{i}" for i in range(HIDDEN_BLOCKS)))):
        key = f"decoder.conv_refiner.{stride}.{block}."
        depthwise, mix = RANDOM * w[key + "0.weight"], w[key + "3.weight"][:, :, 0, 0]
        depthwise[:, 0, 2, 2] += 1.0
        neutral_norm(w, key + "1.", width)
        if number:
            mix = RANDOM * mix + torch.eye(width)
        elif offsets:
            bell = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * 0.8**2))
            depthwise[first:, 0] = torch.outer(bell, bell) / bell.sum() ** 2
            w[key + "1.bias"][first:] = 4.0  # standard deviations: the ReLU leaves correlations as they are
            mix[:, :first] *= 0.1 * math.sqrt(offsets / first)
            mix[:, first:] *= math.sqrt(width / offsets)
            mix[:, first:] -= mix[:, first:].mean(1, keepdim=True)  # how alike the whole neighbourhood is says nothing
        w[key + "0.weight"], w[key + "0.bias"] = depthwise, torch.zeros(width)
        w[key + "3.weight"], w[key + "3.bias"] = mix[:, :, None, None].contiguous(), torch.zeros(width)


def fit(roma: Roma, side: int, fine: int) -> None:
    """Projections, certainty and the last layers of the refiners, from warped pictures of the demo."""
    generator = torch.Generator().manual_seed(1)
    files = [PICTURES / f"cam{camera}" / f"{frame:06d}.jpg" for frame in FRAMES for camera in (0, 1)]
    arrays = [cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB) for file in files]
    pictures = [torch.from_numpy(array).permute(2, 0, 1)[None] / 255 for array in arrays]
    large = [warp(picture, side, generator) for picture in pictures[::2]]
    small = [warp(picture, fine, generator) for picture in pictures]
    raw = [roma.dinov2(view.images) for view in large]
    encoded = [roma.encoder["cnn"](view.images) for view in small]
    projections = roma.decoder.proj
    project(projections["16"], torch.cat(raw).flatten(0, 1), slice(AROUND, END), WIDTH - 1, 0.3)
    projections["16"][1].weight.mul_(math.sqrt(ENERGY / WIDTH))
    projections["16"][0].bias[-1] = math.sqrt(CONSTANT * WIDTH)
    for stride, width in tuple(FEATURES.items())[1:]:
        thinned = [x[stride].flatten(2)[..., :: max(1, 16 // stride**2)] for x in encoded]
        pixels = torch.cat(thinned).transpose(1, 2).flatten(0, 1)
        project(projections[str(stride)], pixels, slice(None), width, 0.6)

    cells = side // PATCH
    tokens = [projections["16"](x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2) for x in raw]
    truths = [view.truth(cells, cells) for view in large]
    flows = fit_certainty(roma, tokens, truths, 1.5)
    maps = [tuple(token.unflatten(1, (cells, cells)).split(1)) for token in tokens]
    _report(roma, 16, list(zip(maps, flows, truths, strict=True)), 3.0, 2.0)
    for stride, error, reach in ((8, 0.7, 3.0), (4, 0.6, 2.0), (2, 0.6, 2.0), (1, 0.6, 2.0)):
        projection, cases = projections[str(stride)], []
        for view, x in zip(small, encoded, strict=True):
            both = projection(x[stride]).permute(0, 2, 3, 1)
            truth = view.truth(*both.shape[1:3])
            cases.append((tuple(both.split(1)), disturbed(truth, error, generator), truth))
        _report(roma, stride, cases, reach, 1.0)


def _report(roma: Roma, stride: int, cases: list[Case], reach: float, sure: float) -> None:
    before, after = fit_refiner(roma.decoder.conv_refiner[str(stride)], cases, reach, sure)
    print(f"refiner {stride}: {before:.2f} -> {after:.2f} cells")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=560, help="of the first pass (default: 560)")
    args = parser.parse_args()
    save(network(args.side), args.folder)


def save(roma: Roma, folder: Path) -> tuple[Path, Path]:
    """The two checkpoints as they are published; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, dinov2 = folder / "roma.pth", folder / "dinov2.pth"
    state = {f"matcher.model.{key}": value for key, value in roma.published.state_dict().items()}
    torch.save({"state_dict": state}, weights)
    torch.save(roma.dinov2.state_dict(), dinov2)
    return weights, dinov2


if __name__ == "__main__":
    main()
