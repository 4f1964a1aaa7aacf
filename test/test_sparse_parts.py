"""Top-K, matching, sampling: equal to what they stand for, computed the plain way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from matchanything_tools.networks.attention import add_function_bodies
from matchanything_tools.networks.maxima import largest
from matchanything_tools.networks.mutual import match
from matchanything_tools.networks.sampling import DeformableConv3x3, sample
from matchanything_tools.networks.stripes import PairedConv, StripedConv, striped
from matchanything_tools.networks.topk import topk, topk_blocks
from matchanything_tools.networks.upsampling import upsampled_sum


def distinct(count: int, seed: int = 0) -> torch.Tensor:
    """Values [1, count], no two equal, of both signs."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(count)).float()[None] - count / 2


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 90), st.integers(1, 20), st.integers(0, 9))
def test_topk_is_topk(count: int, k: int, limit: int, block: int, seed: int) -> None:
    """In passes and over blocks, whatever the sizes; what is missing is padding, never a value taken twice."""
    values = distinct(count, seed)
    wanted = values.sort(dim=1, descending=True)
    found, index = topk_blocks(values, k, block=block, limit=limit)
    have = min(k, count)
    assert torch.equal(found[:, :have], wanted.values[:, :have])
    assert torch.equal(index[:, :have], wanted.indices[:, :have])
    assert (found[:, have:] < -1e19).all() and (index[:, have:] == 0).all()
    if k <= count:
        found, index = topk(values, k, limit=limit)
        assert torch.equal(found, wanted.values[:, :k]) and torch.equal(index, wanted.indices[:, :k])


@pytest.mark.parametrize("shape", [(3, 5), (2, 70, 131), (65, 4096), (1, 1, 1)])
def test_largest_is_the_maximum(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) - 9
    for axis in (-1, -2):
        assert torch.equal(largest(x, axis), x.amax(dim=axis, keepdim=True))


@pytest.mark.parametrize("align_corners", [True, False])
def test_upsampled_sum_is_interpolation(align_corners: bool) -> None:
    maps = [torch.randn(2, 3, 12, 20), torch.randn(2, 3, 6, 5), torch.randn(2, 3, 3, 2)]
    wanted = sum(F.interpolate(x, (24, 40), mode="bilinear", align_corners=align_corners) for x in maps)
    assert torch.allclose(upsampled_sum(maps, (24, 40), align_corners=align_corners), wanted, atol=1e-5)


class Function(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.function(x)


def test_topk_of_ten_thousand_exported(tmp_path: Path) -> None:
    """K = 10,000 in ONNX: no TopK above TensorRT's limit, dynamic number of values, also fewer than blocks need."""
    path = tmp_path / "topk.onnx"
    count = torch.export.Dim("count", min=10000, max=500000)
    torch.onnx.export(
        Function(lambda x: topk_blocks(x, 10000, block=8)).eval(),
        (distinct(50000),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes={"x": {1: count}},
        verbose=False,
    ).save(str(path))  # type: ignore[union-attr]
    session = onnxruntime.InferenceSession(str(path))
    for size in (10001, 263169):
        values = distinct(size)
        found, index = session.run(None, {session.get_inputs()[0].name: values.numpy()})
        wanted = values.sort(dim=1, descending=True)
        assert np.array_equal(found, wanted.values[:, :10000].numpy())
        assert np.array_equal(index, wanted.indices[:, :10000].numpy())


def two_sets(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """70 and 90 unit vectors, 50 of which correspond."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(70, 32, generator=generator), torch.randn(90, 32, generator=generator)
    second[20:70] = first[:50] + 0.4 * torch.randn(50, 32, generator=generator)
    return first / first.norm(dim=1, keepdim=True), second / second.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("criterion", ["dual_softmax", "mutual", "ratio"])
def test_match_is_its_definition(criterion: str) -> None:
    first, second = two_sets()
    valid0, valid1 = torch.ones(70, dtype=torch.bool), torch.ones(90, dtype=torch.bool)
    valid0[3], valid1[25] = False, False  # padding: 25 was the partner of 5
    index0, index1, scores = match(first, second, valid0, valid1, criterion=criterion, max_matches=70)

    cosine = (first @ second.T).double()
    cosine[3], cosine[:, 25] = -torch.inf, -torch.inf
    if criterion == "dual_softmax":
        quality = torch.softmax(20 * cosine, dim=0).nan_to_num() * torch.softmax(20 * cosine, dim=1).nan_to_num()
    else:
        quality = cosine
    wanted = {}
    for i in range(70):
        j = int(quality[i].argmax())
        if i == 3 or int(quality[:, j].argmax()) != i or quality[i, j] <= 0:
            continue
        second_best = float(cosine[i].sort(descending=True).values[1])
        if criterion == "ratio" and np.sqrt(2 - 2 * float(cosine[i, j])) > 0.9 * np.sqrt(2 - 2 * second_best):
            continue
        wanted[(i, j)] = float(quality[i, j])
    kept = scores > 0
    found = {(int(i), int(j)): float(s) for i, j, s in zip(index0[kept], index1[kept], scores[kept], strict=True)}
    assert found.keys() == wanted.keys() and len(found) > 40
    assert all(abs(found[pair] - wanted[pair]) < 1e-5 for pair in wanted)
    assert (scores[:-1] >= scores[1:]).all()


def test_no_valid_keypoint_no_match() -> None:
    first, second = two_sets()
    nothing = torch.zeros(70, dtype=torch.bool), torch.zeros(90, dtype=torch.bool)
    for criterion in ("dual_softmax", "mutual", "ratio"):
        scores = match(first, second, *nothing, criterion=criterion, max_matches=10)[2]
        assert scores.tolist() == [0.0] * 10


def bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Sample of [C, H, W], zero outside, written out."""
    value = np.zeros(image.shape[0])
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                value += image[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return value


def test_sample_is_bilinear_with_zeros_outside() -> None:
    image = torch.rand(1, 3, 5, 7, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    points = [(0.0, 0.0), (6.0, 4.0), (2.25, 3.5), (-0.5, 1.0), (6.75, 4.5), (-1.5, 2.0), (3.0, 9.0)]
    found = sample(image, torch.tensor(points)[None, :, None])[0, :, :, 0]
    for number, (x, y) in enumerate(points):
        assert np.allclose(found[:, number].numpy(), bilinear(image[0].numpy(), x, y), atol=1e-5)


def test_deformable_convolution_is_its_definition() -> None:
    """Every output pixel by hand, with offsets that leave the map and are limited to a quarter of its longer side."""
    torch.manual_seed(0)
    convolution = DeformableConv3x3(4, 5).eval()
    convolution.offset_conv.weight.data.mul_(20)
    x = torch.randn(1, 4, 6, 8)
    with torch.inference_mode():
        found = convolution(x)[0].numpy()
        offsets = convolution.offset_conv(x)[0].clamp(-2, 2).numpy()
    assert (np.abs(offsets) == 2).any() and (np.abs(offsets) < 2).any()
    weight = convolution.regular_conv.weight.detach().numpy()
    for row, column in ((0, 0), (2, 3), (5, 7), (3, 0)):
        value = np.zeros(5)
        for tap in range(9):
            dy, dx = offsets[2 * tap, row, column], offsets[2 * tap + 1, row, column]
            at = bilinear(x[0].numpy(), column + tap % 3 - 1 + dx, row + tap // 3 - 1 + dy)
            value += weight[:, :, tap // 3, tap % 3] @ at
        assert np.allclose(found[:, row, column], value, atol=1e-4)


def test_deformable_convolution_exported(tmp_path: Path) -> None:
    """As the operator, which ONNX Runtime has, and as its body, which TensorRT's parser takes: both are the network."""
    torch.manual_seed(0)
    convolution = DeformableConv3x3(4, 5).eval()
    convolution.regular_conv.bias = torch.nn.Parameter(torch.randn(5))  # as after fusing
    convolution.as_operator = True
    x = torch.randn(2, 4, 6, 8)
    program = torch.onnx.export(convolution, (x,), dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    add_function_bodies(program.model)
    program.save(str(tmp_path / "operator.onnx"))
    model = onnx.load(tmp_path / "operator.onnx")
    (node,) = (node for node in model.graph.node if node.op_type == "DeformConv")
    node.domain = model.functions[0].domain = "bodies"  # in which nobody has an operator
    model.opset_import.add(domain="bodies", version=1)
    onnx.save(model, tmp_path / "body.onnx")
    with torch.inference_mode():
        wanted = convolution(x).numpy()
    for name in ("operator", "body"):
        found = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx")).run(None, {"x": x.numpy()})[0]
        assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "kernel", "stride", "width", "planes", "columns"),
    [
        (3, 3, 1, 64, True, 8),
        (3, 3, 1, 54, True, 2),
        (1, 3, 2, 64, True, 8),
        (1, 4, 2, 64, True, 8),
        (16, 3, 1, 64, False, 4),
        (4, 1, 1, 48, False, 16),
    ],
)
def test_stripes_change_no_sum(inputs: int, kernel: int, stride: int, width: int, planes: bool, columns: int) -> None:
    """Also at the borders; the tolerance is a few roundings of sums of 144 products."""
    generator = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(inputs, 12, kernel, stride, (kernel - 1) // 2, bias=inputs != 4)
    for parameter in conv.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(2, inputs, 10, width, generator=generator)
    over_stripes = striped(conv, width, planes=planes)
    assert isinstance(over_stripes, StripedConv) and over_stripes.columns == columns
    assert torch.allclose(over_stripes(x), conv(x), atol=1e-4)
    if stride == 2:
        assert torch.allclose(over_stripes(x, 2, 16), conv(F.pad(x, (0, 16, 0, 2))), atol=1e-4)


def test_pairs_of_columns_change_no_sum() -> None:
    conv = torch.nn.Conv2d(5, 3, 3, 1, 1)
    x = torch.rand(2, 5, 6, 8)
    assert torch.allclose(PairedConv(conv)(x), conv(x), atol=1e-5)
