"""From two sets of descriptors to matches, best first, inside the graph.

Three criteria, all of them mutual: a match is the best partner in both directions.

- dual_softmax: probability that each is the other's partner: softmax over rows times softmax over columns (Rocco et
  al. 2018);
- mutual: mutual nearest neighbours;
- ratio: mutual, and the distance to the best is at most `ratio` times that to the second best (Lowe 2004).
"""

from __future__ import annotations

import torch
from torch import Tensor

from matchanything_tools.networks.maxima import largest
from matchanything_tools.networks.topk import topk

CRITERIA = ("dual_softmax", "mutual", "ratio")


def match(
    descriptors0: Tensor,
    descriptors1: Tensor,
    valid0: Tensor,
    valid1: Tensor,
    *,
    criterion: str = "dual_softmax",
    inverse_temperature: float = 20.0,
    ratio: float = 0.9,
    max_matches: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Match two sets of descriptors.

    Args:
        descriptors0, descriptors1: [K0, D], [K1, D], of unit length.
        valid0, valid1: [K0], [K1] bool; False marks padding, which never matches.
        criterion: see above.
        inverse_temperature: factor on the cosine before the softmax, up to 40.
        ratio: largest ratio of the distances, for "ratio".
        max_matches: fixed length of the result, at most K0.

    Returns:
        index0, index1 [max_matches] int64, scores [max_matches] float32, best first, 0 for padding.
        Scores are the probability (dual_softmax) or the cosine. A least score is not part of the graph: whoever runs
        it drops what is below the manifest's threshold, which can then be changed at run time.
    """
    if criterion == "dual_softmax":
        partner, scores = _dual_softmax(descriptors0, descriptors1, valid0, valid1, inverse_temperature)
    else:
        cosine = descriptors0.float() @ descriptors1.float().transpose(0, 1)
        similarity = torch.where(valid0[:, None] & valid1[None, :], cosine, torch.full_like(cosine, -2.0))
        partner, scores = _mutual(similarity)
        scores = scores.clamp(min=0)
        if criterion == "ratio":
            distance = (2 - 2 * torch.topk(similarity, 2, dim=1).values).clamp(min=0).sqrt()
            scores = torch.where(distance[:, 0] <= ratio * distance[:, 1], scores, torch.zeros_like(scores))
    scores, index0 = topk(scores, max_matches)
    return index0, partner.index_select(0, index0), scores


def _dual_softmax(
    descriptors0: Tensor, descriptors1: Tensor, valid0: Tensor, valid1: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    """Partners and probabilities [K0] of mutual matches, by square roots: few passes over the matrix of all pairs."""
    logits = (descriptors0.float() * inverse_temperature) @ descriptors1.float().transpose(0, 1)
    # No search for a maximum: a logit is at most the inverse temperature, and e^20 is no large number. Sums are
    # products with vectors, for which ONNX Runtime has faster kernels than for reductions; padding has no weight.
    exponential = torch.exp(logits)
    weight0, weight1 = valid0.to(logits.dtype), valid1.to(logits.dtype)
    rows = (exponential @ weight1.unsqueeze(1)).clamp(min=1e-30).sqrt()
    columns = (weight0.unsqueeze(0) @ exponential).clamp(min=1e-30).sqrt()
    # (e / sum of the row) (e / sum of the column) is the square of this
    partner, root = _mutual(exponential * (weight0.unsqueeze(1) / rows) * (weight1.unsqueeze(0) / columns))
    return partner, root * root


def _mutual(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """The best columns [K0] of the rows, and their similarity, or 0 if another row is better for them."""
    partner = similarity.argmax(dim=1)  # 9 us for 2000 x 2000 on an H200, where maxima and comparisons took 58
    best = similarity.gather(1, partner.unsqueeze(1)).squeeze(1)
    others = largest(similarity, -2).squeeze(0).index_select(0, partner)
    return partner, torch.where(best >= others, best, torch.zeros_like(best))
