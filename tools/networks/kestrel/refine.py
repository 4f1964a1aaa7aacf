"""From cell matches to sub-pixel matches: the window stage and the patch stage of Kestrel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

WINDOW = 10  # keys per side: +-9 px about the centre of the partner cell
PATCH = 7  # samples per side
MAX_SHIFT = PATCH // 2  # patch steps that the patch stage can move a match by


def _grid(side: int, step: float) -> Tensor:
    """(x, y) [side^2, 2], row by row, symmetrical about 0."""
    axis = (torch.arange(side) - (side - 1) / 2) * step
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)


class WindowRefiner(nn.Module):
    """A query of image 0 against the 10x10 keys about its partner cell in image 1.

    The query starts as the mean of the cell's own central keys (residuals at zero, keys near the identity): separately
    started projections did not learn.
    """

    grid: Tensor

    def __init__(self, fine: int, dim: int) -> None:
        super().__init__()
        self.key = nn.Conv2d(fine, fine, 1)
        self.query_detail = nn.Conv2d(fine, fine, 4, 4)
        self.query_context = nn.Linear(dim, fine)
        self.offset = nn.Sequential(
            nn.Linear(WINDOW**2 + 2 * fine, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 3)
        )
        nn.init.zeros_(self.key.bias)  # type: ignore[arg-type]
        self.key.weight.data = 2 * torch.eye(fine)[:, :, None, None]
        for layer in (self.query_detail, self.query_context, self.offset[-1]):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.register_buffer("grid", _grid(WINDOW, 2.0), persistent=False)

    def keys_and_queries(self, fine: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """fine [B, c, H/2, W/2], tokens [B, h, w, d] -> keys [B, H/2, W/2, c], queries [B, h, w, c]."""
        keys = self.key(fine)
        batch, channels, height, width = keys.shape
        central = keys.reshape(batch, channels, height // 4, 4, width // 4, 4)[:, :, :, 1:3, :, 1:3].mean((3, 5))
        queries = (central + self.query_detail(fine)).permute(0, 2, 3, 1) + self.query_context(tokens)
        return keys.permute(0, 2, 3, 1), queries

    def forward(self, queries: Tensor, keys: Tensor, batch: Tensor | int, partner: Tensor) -> tuple[Tensor, ...]:
        """queries [N, c] with their batch index [N] and partner cell [N], keys [B, H/2, W/2, c].

        Returns the offset [N, 2] in px from the partner's centre, its log scale [N] and the logits [N, 100].
        """
        count, height, width, channels = keys.shape
        columns = width // 4
        padded = F.pad(keys, (0, 0, 3, 3, 3, 3)).reshape(count * (height + 6) * (width + 6), channels)
        row = partner // columns
        first = (batch * (height + 6) + row * 4) * (width + 6) + (partner - row * columns) * 4
        steps = torch.arange(WINDOW, device=keys.device)
        index = first[:, None] + (steps[:, None] * (width + 6) + steps).reshape(-1)
        window = padded[index]
        logits = torch.einsum("nkc,nc->nk", window.float(), queries.float()) * channels**-0.5
        weight = logits.softmax(-1)
        dtype = self.query_context.weight.dtype
        expected = torch.einsum("nk,nkc->nc", weight.to(window.dtype), window)
        out = self.offset(torch.cat((weight.to(dtype), queries.to(dtype), expected.to(dtype)), -1)).float()
        return weight @ self.grid.float() + out[:, :2], out[:, 2].clamp(-4.0, 4.0), logits


class PatchRefiner(nn.Module):
    """Two 7x7 patches, the second resampled with the local affine map, compared sample by sample.

    All 49 x 49 similarities enter a linear layer that starts as "sum along each shift", whose softmax gives the shift,
    and an MLP that corrects it. The answer is in steps of the patch, hence follows rotation and scale by itself.
    """

    grid: Tensor

    def __init__(self, fine: int, channels: int = 32) -> None:
        super().__init__()
        self.project = nn.Conv2d(fine, channels, 1)
        pairs = PATCH**4
        self.shift = nn.Linear(pairs, PATCH**2)
        self.hidden = nn.Linear(pairs, 256)
        self.condition = nn.Linear(5, 256)
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 3))
        nn.init.orthogonal_(self.project.weight)
        nn.init.zeros_(self.out[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.out[-1].bias)  # type: ignore[arg-type]
        self.register_buffer("grid", _grid(PATCH, 1.0), persistent=False)
        where = self.grid
        same = where[None, None] - where[None, :, None] == where[:, None, None]  # [shift, sample 0, sample 1, xy]
        along = same.all(-1).float()
        along = along / along.sum((1, 2), keepdim=True)
        self.shift.weight.data = 20.0 * along.reshape(PATCH**2, pairs)
        nn.init.zeros_(self.shift.bias)

    def detail(self, fine: Tensor) -> Tensor:
        """fine [B, c, H/2, W/2] -> normalised features [B, 32, H/2, W/2]."""
        x = self.project(fine)
        return x * (x.float().square().sum(1, keepdim=True) + 1e-2).rsqrt().to(x.dtype)

    def forward(
        self, detail0: Tensor, detail1: Tensor, points0: Tensor, points1: Tensor, affine: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """detail [B, c, H/2, W/2]; points [B, M, 2] px; affine [B, M, 2, 2] from px of image 0 to px of image 1.

        Returns the shift [B, M, 2] and its log scale [B, M] in patch steps (`steps` turns them into px of image 1), and
        the logits [B, M, 49].
        """
        step0, step1 = steps(affine)
        patch0 = self.sample(detail0, points0, step0)
        return self.compare(patch0, self.sample(detail1, points1, step1), affine)

    def sample(self, detail: Tensor, points: Tensor, step: Tensor) -> Tensor:
        """Features [B, M, 49, c] at points + step @ grid; step [B, M, 2, 2] px per patch step."""
        x, y = self.grid.float()[:, :1], self.grid.float()[:, 1:]
        at = points[:, :, None] + x * step[:, :, None, :, 0] + y * step[:, :, None, :, 1]  # [B, M, 49, 2] px
        size = torch.tensor([detail.shape[3] * 2.0, detail.shape[2] * 2.0], device=detail.device)
        patch = F.grid_sample(detail.float(), (at + 0.5) / size * 2 - 1, align_corners=False)
        return patch.permute(0, 2, 3, 1)

    def compare(self, patch0: Tensor, patch1: Tensor, affine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches [B, M, 49, c] -> as forward."""
        dtype = self.hidden.weight.dtype
        pairs = (patch0.to(dtype) @ patch1.to(dtype).transpose(-1, -2)).flatten(2)
        logits = self.shift(pairs).float()
        scale = area_scale(affine)
        condition = torch.cat((affine.flatten(2) / scale[..., None], scale[..., None].log()), -1)
        out = self.out(self.hidden(pairs) + self.condition(condition.to(dtype))).float()
        return logits.softmax(-1) @ self.grid.float() + out[..., :2], out[..., 2].clamp(-4.0, 3.0), logits


def area_scale(affine: Tensor) -> Tensor:
    """Square root of |determinant|, kept within [1/4, 4]; affine [..., 2, 2]."""
    det = affine[..., 0, 0] * affine[..., 1, 1] - affine[..., 0, 1] * affine[..., 1, 0]
    return det.abs().clamp(min=0.0625).clamp(max=16.0).sqrt()


def steps(affine: Tensor) -> tuple[Tensor, Tensor]:
    """Patch steps [..., 2, 2] in px of image 0 and of image 1: 2 px where the scales agree, else shared fairly."""
    unit = (2 / area_scale(affine).sqrt())[..., None, None]
    return unit * torch.eye(2, device=affine.device), unit * affine
