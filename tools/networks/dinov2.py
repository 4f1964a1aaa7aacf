"""DINOv2 ViT-L/14, the coarse features of RoMa and of DeDoDe G.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023. Key layout of the published
`dinov2_vitl14_pretrain.pth` (343 keys, no register tokens).
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from matchanything_ros.errors import UserError
from matchanything_tools.checkpoints import State, read_checkpoint
from matchanything_tools.networks.attention import Block, run_blocks

PATCH = 14
WIDTH, DEPTH, HEADS = 1024, 24, 16
TABLE = 37  # side of the trained position table: 518 pixels


class DinoV2(nn.Module):
    """Image [B, 3, H, W], sides multiples of 14 -> patch features [B, H/14 * W/14, 1024], row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.empty(1, TABLE * TABLE + 1, WIDTH))
        self.mask_token = nn.Parameter(torch.empty(1, WIDTH))  # published, used in training only
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.blocks = nn.ModuleList(_Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    @torch.no_grad()
    def bake(self, height: int, width: int) -> DinoV2:
        """Make it ready for export at one input size; it is then no longer loadable.

        The position table becomes a constant of that size (the graph needs no cubic resize), which holds the bias of
        the patches too, and the scales of the residual branches become part of their last linear layers.
        """
        projection = self._projection
        table = position_table(self.pos_embed.float(), height // PATCH, width // PATCH)
        table[:, :1] += self.cls_token
        assert projection.bias is not None
        table[:, 1:] += projection.bias
        projection.bias = None
        del self.pos_embed, self.cls_token, self.mask_token
        self.table = nn.Parameter(table.to(self.norm.weight.dtype), requires_grad=False)
        for block in self.blocks:
            block.bake()
        return self

    @property
    def _projection(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.patch_embed["proj"])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = image.shape
        # A convolution whose stride is its size is a product, which a GPU computes faster than one of three channels.
        patches = image.reshape(batch, 3, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
        projection = self._projection
        patches = F.linear(patches.flatten(3).flatten(1, 2), projection.weight.flatten(1), projection.bias)
        table: torch.Tensor
        if hasattr(self, "table"):
            table = self.table
        else:
            table = position_table(self.pos_embed, height // PATCH, width // PATCH)
            table = torch.cat((table[:, :1] + self.cls_token, table[:, 1:]), 1)
        first = table[:, :1].expand(image.shape[0], -1, -1)
        x = torch.cat((first, patches + table[:, 1:]), 1)
        if hasattr(self, "table"):
            return run_blocks(x, self.blocks, self.norm)[:, 1:]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]


def position_table(pos_embed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Position embedding [1, 1 + 37*37, C] -> [1, 1 + rows*columns, C].

    As trained: bicubic without antialiasing, by the scale (rows + 0.1)/37 rather than to a size. The sampling step is
    therefore 37/(rows + 0.1), and that tenth is not negligible (it shifts the last row by about a tenth of a patch).
    """
    if (rows, columns) == (TABLE, TABLE):
        return pos_embed.clone()
    grid = pos_embed[:, 1:].reshape(1, TABLE, TABLE, -1).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / TABLE, (columns + 0.1) / TABLE)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat((pos_embed[:, :1], grid.flatten(2).transpose(1, 2)), 1)


class _LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class _Block(Block):
    """Its residual branches are scaled (LayerScale)."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, bias=True, eps=1e-6)
        self.ls1 = _LayerScale()
        self.ls2 = _LayerScale()

    @torch.no_grad()
    def bake(self) -> None:
        """gamma * (W x + b) = (gamma W) x + gamma b: one operation less in each branch. Attention: see there."""
        self.attn.bake()
        for linear, scale in ((self.attn.proj, self.ls1), (self.mlp.fc2, self.ls2)):
            linear.weight = nn.Parameter(linear.weight * scale.gamma[:, None], requires_grad=False)
            linear.bias = nn.Parameter(linear.bias * scale.gamma, requires_grad=False)
        del self.ls1, self.ls2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As published; a baked block is run by `run_blocks`."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def read_dinov2(path: Path) -> State:
    """State dict of DINOv2 ViT-L/14 without registers."""
    state = read_checkpoint(path)
    token = state.get("cls_token")
    if token is not None:
        width = token.shape[-1]
        size = {384: "ViT-S/14", 768: "ViT-B/14", 1024: "ViT-L/14", 1536: "ViT-g/14"}.get(width, f"of width {width}")
        registers = "register_tokens" in state
        if width != WIDTH or registers:
            raise UserError(
                f"{path} is DINOv2 {size}{' with registers' if registers else ''}: these networks were "
                "trained with ViT-L/14 without registers, give dinov2_vitl14_pretrain.pth."
            )
    return state
