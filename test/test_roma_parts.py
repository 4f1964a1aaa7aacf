"""Parts of RoMa on cases worked out by hand: colours, where certainty is zero, and the head in half precision."""

from __future__ import annotations

import math

import pytest
import torch

from matchanything_tools.networks.roma import RomaMatcher
from matchanything_tools.networks.roma.network import Roma
from matchanything_tools.networks.roma.refiner import _Head


def test_no_certainty_where_the_target_is_outside() -> None:
    inside, outside = [(0.0, 0.0), (1.0, -1.0)], [(1.01, 0.0), (-1.01, 0.0), (0.0, 1.01), (0.0, -1.01)]
    flow = torch.tensor(inside + outside).T.reshape(1, 2, 1, 6).repeat(2, 1, 1, 1)
    low = torch.tensor([-2.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 1, 1, 6)  # half of a negative one is taken away
    same, certainty = Roma.finish(low, flow, torch.zeros(2, 1, 1, 6))
    assert torch.equal(same, flow)
    assert certainty[0, 0, 0].tolist() == pytest.approx([1 / (1 + math.exp(-1))] * 2 + [0] * 4)
    assert certainty[1, 0, 0].tolist() == pytest.approx([0.5] * 2 + [0] * 4)


class Recorder(torch.nn.Module):
    """In place of the network: keeps what it is given."""

    finest = 1

    def forward(self, *batches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches = batches
        return torch.zeros(2, 2, 32, 32), torch.full((2, 1, 32, 32), 0.5)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("normalize", [False, True])
def test_colours_reach_the_network_as_its_weights_know_them(normalize: bool, passes: int) -> None:
    network = Recorder()
    images = torch.rand(2 * passes, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    RomaMatcher(network, 4, dense=False, normalize=normalize)(*images)  # type: ignore[arg-type]
    given = images[:, 0]
    if normalize:  # ImageNet's red, green and blue
        channels = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
        given = torch.stack([(given[:, i] - mean) / std for i, (mean, std) in enumerate(channels)], 1)
    expected = (given,) if passes == 1 else (given[2:], given[:2])  # the network takes the coarse pass first
    assert len(network.batches) == passes
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(network.batches, expected, strict=True))


def test_head_in_half_precision_is_as_exact_as_in_single() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 1408, generator=generator) / 1408**0.5
    x = torch.randn(1, 1408, 12, 20, generator=generator).half()
    exact = torch.einsum("oc,nchw->nohw", weight.double(), x.double())
    # Weights of twice 11 bits, and sums of 1408 products: fp32 errs by 2^-21.
    limit = 2**-19 * exact.abs().max()
    plain = torch.einsum("oc,nchw->nohw", weight.half().float(), x.float()).half()
    assert (plain - exact).abs().max() > 50 * limit
    result = _Head(weight).split()(x)
    assert result.dtype == torch.float32 and result.shape == (1, 6, 12, 20)
    assert (result - exact).abs().max() < limit
    assert (_Head(weight)(x.float()) - exact).abs().max() < limit
