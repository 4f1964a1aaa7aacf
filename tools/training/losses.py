"""What Kestrel is trained to do: find cells, know which have a partner, and place the match within them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from matchanything_tools.networks.kestrel.model import CELL, Features, similarity
from matchanything_tools.networks.kestrel.refine import MAX_SHIFT, PatchRefiner, WindowRefiner, steps
from matchanything_tools.training.data import Batch
from matchanything_tools.training.geometry import Targets, jacobian

FOCUS = 1.5  # exponent of the focal loss
WINDOW_LIMIT = 8.9  # px: a bilinear target still fits into the window
LARGEST_ZOOM = 6.0  # patches under a stronger local scale teach nothing


def cell_loss(logits: Tensor, forward: Targets, backward: Targets) -> Tensor:
    """Focal cross-entropy over rows for covisible cells of view 0 and over columns for those of view 1.

    logits [B, L, L]. Every covisible cell counts, mutual or not: under zoom one cell has several partners.
    """
    row = logits.gather(2, forward.cells[..., None])[..., 0] - logits.logsumexp(2)
    column = logits.gather(1, backward.cells[:, None])[:, 0] - logits.logsumexp(1)
    return _focal(row, forward.valid) + _focal(column, backward.valid)


def _focal(log_probability: Tensor, valid: Tensor) -> Tensor:
    loss = -((1 - log_probability.exp()).clamp(min=0) ** FOCUS) * log_probability
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def matchable_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy of covisibility over all cells that show the photograph; logits [2B, h, w]."""
    truth = torch.cat((batch.forward.valid, batch.backward.valid)).float()
    return F.binary_cross_entropy_with_logits(
        logits.float().flatten(1), truth, weight=batch.inside.flatten(0, 1).float()
    )


@dataclass
class FineSample:
    """M covisible cells of view 0 for each pair, with what the fine stages start from and should say."""

    cells: Tensor  # [B, M] in view 0
    partners: Tensor  # [B, M] in view 1, 40 % of them moved by up to one cell
    window_offset: Tensor  # [B, M, 2] px from the partner's centre to the truth
    points0: Tensor  # [B, M, 2] px
    start: Tensor  # [B, M, 2] px of view 1: the truth with an error
    affine: Tensor  # [B, M, 2, 2]: the true local map with an error
    shift: Tensor  # [B, M, 2] patch steps from start to truth
    valid: Tensor  # [B, M]


@torch.no_grad()
def sample_fine(batch: Batch, count: int, shape: tuple[int, int], centres: Tensor) -> FineSample:
    """Draw `count` cells per pair; centres [L, 2] of the cells of views of (height, width) `shape`."""
    device = batch.images.device
    pairs, columns, rows = len(batch.homographies), shape[1] // CELL, shape[0] // CELL
    chance, cells = (torch.rand(batch.forward.valid.shape, device=device) * batch.forward.valid).topk(count, 1)
    valid = chance > 0
    truth = batch.forward.points.gather(1, cells[..., None].expand(-1, -1, 2))
    truth = torch.where(valid[..., None], truth, torch.zeros_like(truth))
    partner = batch.forward.cells.gather(1, cells)
    moved = torch.randint(-1, 2, (2, pairs, count), device=device) * (torch.rand(pairs, count, device=device) < 0.4)
    x = (partner % columns + moved[0]).clamp(0, columns - 1)
    y = (partner // columns + moved[1]).clamp(0, rows - 1)
    partner = y * columns + x
    points0 = centres[cells]
    true_affine = jacobian(batch.homographies, points0)
    zoom = torch.linalg.matrix_norm(true_affine)
    det = true_affine[..., 0, 0] * true_affine[..., 1, 1] - true_affine[..., 0, 1] * true_affine[..., 1, 0]
    valid = valid & (zoom < LARGEST_ZOOM) & (det.abs() > LARGEST_ZOOM**-2)
    true_affine = torch.where(valid[..., None, None], true_affine, torch.eye(2, device=device))
    error = torch.rand(pairs, count, 1, 1, device=device) * 0.15
    affine = true_affine @ (torch.eye(2, device=device) + error * torch.randn(pairs, count, 2, 2, device=device))
    # from a tenth of a step to more than a step, as the window stage leaves it and as an earlier pass leaves it
    spread = torch.exp(torch.rand(pairs, count, 1, device=device) * 2.7 - 2.3)
    shift = (torch.randn(pairs, count, 2, device=device) * spread).clamp(-MAX_SHIFT, MAX_SHIFT)
    _, step1 = steps(affine)
    start = truth - torch.einsum("bmij,bmj->bmi", step1, shift)
    return FineSample(cells, partner, truth - centres[partner], points0, start, affine, shift, valid)


def fine_losses(
    window: WindowRefiner, patch: PatchRefiner, features: Features, sample: FineSample
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Cross-entropy and Laplace likelihood of the window stage, then of the patch stage; and figures to report.

    Runs in fp32: sub-pixel places do not survive bf16.
    """
    pairs, count = sample.cells.shape
    with torch.autocast(sample.points0.device.type, enabled=False):
        index = torch.arange(pairs, device=sample.cells.device)[:, None].expand(-1, count).reshape(-1)
        queries = features.queries[:pairs].float().flatten(1, 2)[index, sample.cells.reshape(-1)]
        offset, log_scale, logits = window(queries, features.keys[pairs:].float(), index, sample.partners.reshape(-1))
        truth, valid = sample.window_offset.reshape(-1, 2), sample.valid.reshape(-1)
        covered = valid & (truth.abs().amax(1) < WINDOW_LIMIT)
        window_ce = _place_loss(logits, truth, window.grid, 2.0, covered)
        window_nll = _laplace(offset, log_scale, truth, valid, 30.0)
        error = (offset - truth).norm(dim=1).detach()

        shift, patch_scale, patch_logits = patch(
            features.detail[:pairs], features.detail[pairs:], sample.points0, sample.start, sample.affine
        )
        patch_ce = _place_loss(patch_logits.flatten(0, 1), sample.shift.reshape(-1, 2), patch.grid, 1.0, valid)
        patch_nll = _laplace(
            shift.flatten(0, 1), patch_scale.flatten(), sample.shift.reshape(-1, 2), valid, 2.0 * MAX_SHIFT
        )
        patch_error = (shift - sample.shift).norm(dim=2).flatten().detach()
    figures = {
        "window_px": _mean(error, covered),
        "window_within_1px": _mean((error < 1).float(), covered),
        "patch_steps": _mean(patch_error, valid),
        "patch_within_0.25": _mean((patch_error < 0.25).float(), valid),
    }
    return window_ce, window_nll, patch_ce, patch_nll, figures


def _place_loss(logits: Tensor, truth: Tensor, grid: Tensor, spacing: float, valid: Tensor) -> Tensor:
    """Cross-entropy against the bilinear weights of truth [N, 2] on the grid [K, 2]."""
    distance = (truth[:, None] - grid).abs() / spacing
    target = (1 - distance).clamp(min=0).prod(2)
    return _mean(-(target * logits.log_softmax(-1)).sum(1), valid)


def _laplace(value: Tensor, log_scale: Tensor, truth: Tensor, valid: Tensor, limit: float) -> Tensor:
    residual = (value - truth).abs().sum(1).clamp(max=limit)
    return _mean(residual * torch.exp(-log_scale) + 2 * log_scale, valid)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def match_quality(logits: Tensor, matchable: Tensor, batch: Batch, centres: Tensor) -> dict[str, Tensor]:
    """Precision and recall of mutual matches with a score above 0.1, and how many a pair of strangers gets."""
    pairs = len(logits)
    chance = matchable.float().flatten(1).sigmoid()
    confidence = torch.exp(2 * logits - logits.logsumexp(2, True) - logits.logsumexp(1, True))
    best, partner = confidence.max(2)
    cells = torch.arange(logits.shape[1], device=logits.device)
    mutual = confidence.argmax(1).gather(1, partner) == cells
    kept = mutual & (best * chance[:pairs] * chance[pairs:].gather(1, partner) > 0.1)
    near = (centres[partner] - batch.forward.points).abs().amax(-1) < CELL + 0.1
    good = kept & near & batch.forward.valid
    positive = ~batch.negative[:, None]
    findable = batch.forward.valid & (batch.backward.cells.gather(1, batch.forward.cells) == cells)
    return {
        "precision": good.sum() / (kept & positive).sum().clamp(min=1),
        "recall": good.sum() / findable.sum().clamp(min=1),
        "strangers": (kept & ~positive).sum() / batch.negative.sum().clamp(min=1),
    }


def logits_of(features: Features) -> Tensor:
    """Dual softmax logits [B, L, L] of stacked features."""
    pairs = len(features.descriptors) // 2
    with torch.autocast(features.descriptors.device.type, enabled=False):
        return similarity(features.descriptors[:pairs], features.descriptors[pairs:])
