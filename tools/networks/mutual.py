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
        inverse_temperature: factor on the cosine before the softmax.
        ratio: largest ratio of the distances, for "ratio".
        max_matches: fixed length of the result, at most K0.

    Returns:
        index0, index1 [max_matches] int64, scores [max_matches] float32, best first, 0 for padding.
        Scores are the probability (dual_softmax) or the cosine. A least score is not part of the graph: whoever runs
        it drops what is below the manifest's threshold, which can then be changed at run time.
    """
    cosine = descriptors0.float() @ descriptors1.float().transpose(0, 1)
    both = valid0[:, None] & valid1[None, :]
    if criterion == "dual_softmax":
        # A cosine is at most 1, so the largest exponent is 0: no search for the maximum is needed.
        exponential = torch.exp(inverse_temperature * (cosine - 1)) * both.to(cosine.dtype)
        rows = exponential.sum(dim=1, keepdim=True).clamp(min=1e-30)
        columns = exponential.sum(dim=0, keepdim=True).clamp(min=1e-30)
        similarity = (exponential / rows) * (exponential / columns)
    else:
        similarity = torch.where(both, cosine, torch.full_like(cosine, -2.0))
    candidates = 2 if criterion == "ratio" else 1
    best, partners = torch.topk(similarity, candidates, dim=1)
    scores, partner = best[:, 0], partners[:, 0]
    # Best in the other direction too: compared by value, which needs one reduction and no second search for the place.
    keep = (scores >= largest(similarity, -2)[0, partner]) & (scores > 0)
    if criterion == "ratio":
        distance = (2 - 2 * best).clamp(min=0).sqrt()
        keep = keep & (distance[:, 0] <= ratio * distance[:, 1])
    scores, index0 = topk(torch.where(keep, scores, torch.zeros_like(scores)), max_matches)
    return index0, partner[index0], scores
