"""RoMa equals the original, stage by stage, on the golden pair; so do its parts on cases worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import roma_case
import torch
import torch.nn.functional as F

from matchanything_tools.networks.dinov2 import TABLE, position_table
from matchanything_tools.networks.roma import correlation
from matchanything_tools.networks.roma.correlation import local_correlation
from matchanything_tools.networks.roma.embedding_decoder import ANCHORS, decode_anchors
from matchanything_tools.networks.roma.gaussian_process import NOISE, kernel, unit
from matchanything_tools.networks.roma.network import Roma, symmetric_warp
from matchanything_tools.networks.roma.solve import solve_spd

# A correct float32 implementation that sums in another order differs by about as much as the conditioning says:
# its figures are those of one draw of the noise, hence some room.
ROOM = 5


def check_against_golden(roma: Roma, case: str, coarse: int, upsample: int) -> None:
    wanted, conditioning = roma_case.golden(case)
    steps = roma_case.STEPS[case.removesuffix("_outside")]
    found: dict[str, torch.Tensor] = {}
    grid = (coarse // 14, coarse // 14)

    def keep_posterior(_: Any, __: Any, posterior: torch.Tensor) -> None:
        found["gp"] = posterior.transpose(1, 2).unflatten(2, grid)

    def keep_logits(_: Any, __: Any, result: tuple[torch.Tensor, torch.Tensor]) -> None:
        found["argmax"] = result[0].argmax(2).unflatten(1, grid)

    hooks = [
        roma.decoder.gps["16"].register_forward_hook(keep_posterior),
        roma.decoder.embedding_decoder.register_forward_hook(keep_logits),
    ]
    first, second = roma_case.batch(coarse), roma_case.batch(upsample)
    with torch.inference_mode():
        states = [(0, *state) for state in roma.first_pass(first)]
        start = states[-1]
        states += [(1, *state) for state in roma.second_pass(second, start[2], start[3], first.shape[2:])]
        flow, certainty = roma.finish(states[0][3], *states[-1][2:])
        warp, cert = symmetric_warp(flow, certainty)
    for hook in hooks:
        hook.remove()

    if "gp_c8" in wanted:
        channels = 512 // wanted["gp_c8"].shape[1]
        difference = np.abs(found["gp"].numpy()[:, ::channels] - wanted["gp_c8"]).max()
        assert difference < ROOM * conditioning["gp_rel"] * np.abs(wanted["gp_c8"]).max()
        # The two best anchors are 1.4e-4 apart at least, ten times the noise: no other may win.
        assert np.array_equal(found["argmax"].numpy(), wanted["cls_argmax"])
    for number, stride, stage_flow, stage_certainty in states:
        name = f"pass{number}_s{stride}"
        if f"{name}_flow" not in wanted:
            continue
        step, noise = steps[stride], conditioning[f"p{number}s{stride}"]
        for value, kind, tolerance in ((stage_flow, "flow", noise[0]), (stage_certainty, "cert", noise[1])):
            difference = np.abs(value.numpy()[..., ::step, ::step] - wanted[f"{name}_{kind}"]).max()
            assert difference < ROOM * tolerance, f"{name}_{kind}: {difference}"
    assert np.abs(warp[0].permute(1, 2, 0).numpy()[::4, ::4] - wanted["warp"]).max() < ROOM * 1.1e-6
    assert np.abs(cert[0, 0].numpy()[::4, ::4] - wanted["certainty"]).max() < ROOM * conditioning["cert_abs"][-1]
    assert float((cert == 0).float().mean()) == pytest.approx(float(wanted["stats_zero_fraction"]), abs=1e-4)


def test_every_stage_equals_the_original() -> None:
    check_against_golden(roma_case.network(), "small", 224, 320)


def test_flow_that_leaves_the_image_equals_the_original() -> None:
    """Also the network made ready for export: norms folded, widths padded, tables baked."""
    override = {"decoder.conv_refiner.16.out_conv.bias": [20.0, 0.0, 0.0]}
    roma = roma_case.network(override=override).bake(224, 224)
    check_against_golden(roma, "small_outside", 224, 320)


@pytest.mark.full
def test_real_size_equals_the_original() -> None:
    check_against_golden(roma_case.network().bake(560, 560), "560_864", 560, 864)


@pytest.mark.parametrize("structure", ["constant image", "two textures", "white noise"])
def test_solve_is_as_exact_as_lapack(structure: str) -> None:
    """In float32, measured against float64, from the best to the worst conditioned matrix that images can give."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(2, 1000, 64, generator=generator)
    if structure == "constant image":  # one eigenvalue of 1000, the others at the noise of 0.1
        y = y[:, :1] + 1e-3 * y
    elif structure == "two textures":
        y = y[:, :2].repeat_interleave(500, 1) + 0.1 * y
    targets = torch.cos(8 * torch.randn(1, 1000, 32, generator=generator))
    matrix = kernel(unit(y), unit(y)) + NOISE * torch.eye(1000)
    exact = torch.linalg.solve(matrix.double(), targets.double().expand(2, -1, -1))

    def error(solution: torch.Tensor) -> float:
        return float((solution - exact).abs().max() / exact.abs().max())

    lapack = error(torch.linalg.solve(matrix, targets.expand(2, -1, -1)))
    # Both are random rounding errors times the condition number: a factor says whether ours loses digits of its own.
    assert error(solve_spd(matrix, targets, NOISE, 1.0 + NOISE, block=250)) < 4 * lapack


@pytest.mark.parametrize("bands", [1, 3])
def test_local_correlation_is_what_sampling_gives(bands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition: sample the other image at every offset. The flow leaves the image on all sides."""
    generator = torch.Generator().manual_seed(2)
    height, width, radius = 12, 15, 2
    monkeypatch.setattr(correlation, "BAND_BYTES", height * width * 184 * 4 // bands)  # 180 cells, 184 in memory
    features = torch.randn(2, height, width, 16, generator=generator)
    flow = 1.6 * torch.randn(2, 2, height, width, generator=generator)
    flow[0, 0, 0, :2] = torch.tensor([1e9, -1e9])
    x, y = features.permute(0, 3, 1, 2), features.flip(0).permute(0, 3, 1, 2)
    expected = []
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            offset = torch.tensor([2 * dx / width, 2 * dy / height]).view(1, 2, 1, 1)
            sampled = F.grid_sample(y, (flow + offset).permute(0, 2, 3, 1), align_corners=False)
            expected.append((x * sampled).sum(1))
    found = local_correlation(features, flow, radius)
    assert found.shape == (2, height, width, 25)
    assert float((found - torch.stack(expected, 3)).abs().max()) < 1e-4  # positions are rounded differently


def test_anchor_decoding_keeps_the_wrap_and_the_double_count() -> None:
    def centre(index: int) -> torch.Tensor:
        return torch.tensor([2 * (index % ANCHORS) + 1, 2 * (index // ANCHORS) + 1]) / ANCHORS - 1

    logits = torch.full((1, 2, ANCHORS**2), -1e4)
    best, before = 5 * ANCHORS, 5 * ANCHORS - 1  # first column of row 5; before it stands the END of row 4
    logits[0, 0, best], logits[0, 0, before] = 1.0, 1.0
    logits[0, 1, 0], logits[0, 1, 1] = 1.0, 1.0  # -1 and -64 are clamped to 0: three times anchor 0, once anchor 1
    flow = decode_anchors(logits)
    assert torch.allclose(flow[0, 0], (centre(best) + centre(before)) / 2, atol=1e-6)
    assert torch.allclose(flow[0, 1], (3 * centre(0) + centre(1)) / 4, atol=1e-6)


def test_position_table_steps_by_the_given_scale() -> None:
    """Cubic convolution (a = -0.75) worked out at step 37/40.1 along one axis; with 37/40 it would be 0.3 off."""
    values = torch.randn(TABLE, generator=torch.Generator().manual_seed(3))
    table = torch.zeros(1, TABLE**2 + 1, 1)
    table[0, 1:, 0] = values.repeat_interleave(TABLE)  # varies from row to row only
    found = position_table(table, 40, 30)[0, 1:, 0].reshape(40, 30)
    for row in range(40):
        position = (row + 0.5) * TABLE / 40.1 - 0.5
        taps = np.arange(np.floor(position) - 1, np.floor(position) + 3)
        t = np.abs(position - taps)
        near, far = 1.25 * t**3 - 2.25 * t**2 + 1, -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
        weights = np.where(t <= 1, near, far)
        expected = float(weights @ values.numpy()[taps.clip(0, TABLE - 1).astype(int)])
        assert torch.allclose(found[row], torch.tensor(expected), atol=1e-4)
    assert torch.equal(position_table(table, TABLE, TABLE), table)
