"""MatchAnything-ELoFTR: equal to the original on its golden results, and every reformulation equal to what it replaces.

Golden results: the original code in fp32 on seeded weights (see seeded.py), two images of one scene. `conditioning` of
those runs: relative noise of 1e-6 on the input moves confidences by up to 1.0e-4 and keypoints by up to 3e-5 px.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import seeded
import torch
from torch.nn import functional as F

from matchanything_ros.bundle import InputSpec
from matchanything_ros.errors import UserError
from matchanything_ros.preprocess import prepare
from matchanything_tools.checkpoints import load_strict
from matchanything_tools.networks.eloftr import coarse, fine, grid, network, preprocessing, transformer
from matchanything_tools.networks.eloftr.backbone import RepVGG, RepVGGBlock
from matchanything_tools.networks.eloftr.fixed import Fixed
from matchanything_tools.networks.eloftr.layouts import published_keys
from matchanything_tools.networks.eloftr.network import EfficientLoFTR, Published
from matchanything_tools.networks.eloftr.upsampling import Double, double

GOLDEN = Path(__file__).parent / "data" / "golden"


def published() -> Published:
    module = Published()
    load_strict(module, seeded.state("eloftr"), what="MatchAnything-ELoFTR", path=Path("seeded"))  # type: ignore[arg-type]
    return module


def gray(name: str) -> list[torch.Tensor]:
    """The golden image pair as network inputs [1, 1, H, W]."""
    files = [GOLDEN / f"{name}_gray{index}.png" for index in (0, 1)]
    return [torch.from_numpy(cv2.imread(str(file), 0).astype(np.float32) / 255)[None, None] for file in files]


def check_matches(name: str, outputs: list[np.ndarray]) -> None:
    """The bounds of parity with the original: set of coarse matches, keypoints and scores."""
    golden = np.load(GOLDEN / f"{name}.npz")
    keypoints0, keypoints1, scores = outputs
    assert (np.diff(scores) <= 0).all()
    kept = scores > 0.01  # the threshold of the golden run
    # Cells from keypoints: stage 1 leaves keypoints0 within its cell and keypoints1 within 2 px of its cell.
    found = {
        tuple(pair): row
        for row, pair in enumerate(
            np.concatenate([np.floor(keypoints0[kept] / 8 + 0.5), np.floor(keypoints1[kept] / 8 + 0.5)], 1).tolist()
        )
    }
    expected = np.concatenate([golden["mkpts0_f"], golden["mkpts1_f"]], 1)
    pairs = [tuple(row) for row in np.floor(expected / 8 + 0.5).tolist()]
    common = [(index, found[pair]) for index, pair in enumerate(pairs) if pair in found]
    assert len(common) >= 0.995 * len(pairs) and kept.sum() <= 1.005 * len(pairs) + 1
    theirs, ours = (list(side) for side in zip(*common, strict=True))
    error = np.abs(np.concatenate([keypoints0, keypoints1], 1)[ours] - expected[theirs]).max(1)
    assert error.mean() < 0.02
    assert (error < 0.1).mean() >= 0.99
    assert np.abs(scores[ours] - golden["mconf"][theirs]).max() < 1e-3


@pytest.mark.parametrize("name", ["eloftr_640x480_mask", pytest.param("eloftr_832", marks=pytest.mark.full)])
def test_golden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = gray(name)
    height, width = images[0].shape[2:]
    net = EfficientLoFTR(published(), 1024, size=(height, width), square="mask" in name).eval()
    seen: list[torch.Tensor] = []
    confidences = coarse.confidences

    def recorded(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every = torch.arange(len(given[0]))
        seen.extend([*given[:2], *confidences(*given[:2], every, every)])
        return confidences(*given)

    monkeypatch.setattr(coarse, "confidences", recorded)
    with torch.inference_mode():
        check_matches(name, [value.numpy() for value in net(*images)])
    golden = np.load(GOLDEN / f"{name}.npz")
    rows, columns = height // 32, width // 32
    cell = torch.arange(height * width // 64).reshape(1, 1, height // 8, width // 8)
    order = grid.to_blocks(cell, rows, columns).flatten().argsort()  # to lines
    maps = torch.stack([x[order].T.reshape(256, height // 8, width // 8) for x in seen[:2]])
    ours, theirs = maps.numpy()[:, ::32, ::4, ::4], golden["coarse_c32"]
    assert not theirs[:, :, ours.shape[2] :].any()  # padding
    assert np.abs(ours - theirs[:, :, : ours.shape[2]]).max() < 1e-3  # conditioning: 2.2e-4, of values of rms 3
    conf = (seen[2] + seen[3].T).exp()[order][:, order].numpy()
    index = golden["conf_top_ij"]
    valid = (index < conf.shape[0]).all(1)  # the maps have one width, so that rows of padding are numbered last
    assert valid.sum() > 1000
    index = index[valid]
    error = np.abs(conf[index[:, 0], index[:, 1]] - golden["conf_top_value"][valid])
    assert error.max() < 1e-4


def test_demo_preprocessing() -> None:
    """Colour images become, bit for bit, what the demo's own preprocessing makes of them."""
    preprocess = preprocessing("demo", dynamic=False)
    spec = InputSpec("image0", 0, *[(480, 640)] * 3)
    for index, expected in enumerate(gray("eloftr_640x480_mask")):
        image = cv2.cvtColor(cv2.imread(str(GOLDEN / f"coffee_{index}.png")), cv2.COLOR_BGR2RGB)
        assert np.array_equal(prepare(image, preprocess, spec)[0], expected.numpy())


def test_every_key_is_used_and_hugging_face_layout_loads() -> None:
    state = seeded.state("eloftr")
    assert len(state) == 447 == len(Published().state_dict())
    # One key of each kind, written as transformers writes it.
    theirs = {
        "efficientloftr.backbone.stages.0.blocks.0.conv1.conv.weight": "backbone.layer0.rbr_dense.conv.weight",
        "efficientloftr.backbone.stages.2.blocks.3.identity.running_var": "backbone.layer2.3.rbr_identity.running_var",
        "efficientloftr.backbone.stages.3.blocks.0.conv2.norm.bias": "backbone.layer3.0.rbr_1x1.bn.bias",
        "efficientloftr.local_feature_transformer.layers.1.cross_attention.attention.o_proj.weight": (
            "loftr_coarse.layers.3.merge.weight"
        ),
        "efficientloftr.local_feature_transformer.layers.3.self_attention.mlp.layer_norm.weight": (
            "loftr_coarse.layers.6.norm2.weight"
        ),
        "efficientloftr.local_feature_transformer.layers.0.self_attention.aggregation.q_aggregation.weight": (
            "loftr_coarse.layers.0.aggregate.weight"
        ),
        "refinement_layer.out_conv.weight": "fine_preprocess.layer3_outconv.weight",
        "refinement_layer.out_conv_layers.0.batch_norm.running_mean": "fine_preprocess.layer2_outconv2.1.running_mean",
        "refinement_layer.out_conv_layers.1.out_conv3.weight": "fine_preprocess.layer1_outconv2.3.weight",
    }
    renamed = published_keys({key: torch.tensor(float(n)) for n, key in enumerate(theirs)})
    assert list(renamed) == list(theirs.values()) and set(renamed) <= set(state)
    assert list(published_keys(state)) == list(state)  # type: ignore[arg-type]


def test_wrong_checkpoints() -> None:
    state = dict(seeded.state("eloftr"))
    state["backbone.layer0.rbr_dense.conv.wait"] = state.pop("backbone.layer0.rbr_dense.conv.weight")
    with pytest.raises(UserError, match=r"1 missing: backbone\.layer0\.rbr_dense\.conv\.weight; 1 unexpected"):
        load_strict(Published(), state, what="MatchAnything-ELoFTR", path=Path("x"))  # type: ignore[arg-type]
    other = seeded.state("aliked-n16")
    with pytest.raises(UserError, match=r"447 missing.*76 unexpected.*looks like ALIKED n16") as caught:
        load_strict(Published(), other, what="MatchAnything-ELoFTR", path=Path("x"))  # type: ignore[arg-type]
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize("striped", [False, True])
def test_fused_backbone_equals_trained_form(striped: bool) -> None:
    backbone = published().backbone.eval()
    image = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        trained = backbone(image, 24, 16)
        backbone.fuse(striped)
        fused = backbone(image, 24, 16)
    assert not any(isinstance(part, RepVGGBlock) for part in backbone.modules()) and isinstance(backbone, RepVGG)
    for before, after in zip(trained, fused, strict=True):
        assert (before - after).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize("size", [(224, 448), (448, 224)])
def test_padding_that_is_left_out_changes_nothing(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A square of zeros around the image is computed only as far as it can be seen."""
    images = [image[:, :, : size[0], : size[1]] for image in gray("eloftr_640x480_mask")]
    results = []
    for seen, margin in ((network.PADDING_SEEN, network.PYRAMID_MARGIN), (10_000, 10_000)):
        monkeypatch.setattr(network, "PADDING_SEEN", seen)
        monkeypatch.setattr(network, "PYRAMID_MARGIN", margin)
        net = EfficientLoFTR(published(), 64, size=size, square=True).eval()
        with torch.inference_mode():
            results.append(torch.cat([value.reshape(64, -1) for value in net(*images)], 1))
    assert (results[0] - results[1]).abs().max() < 1e-4  # sums in another order at most


def test_best_pairs_are_those_of_the_whole_matrix() -> None:
    """Whatever is above 1 / (PARTNERS + 1) is found, best first, where factors sum to at most 1 as softmaxes do."""
    generator = torch.Generator().manual_seed(3)
    cells0, cells1 = (coarse.make_cells(rows, 8, 32, 0, torch.device("cpu")) for rows in (12, 8))
    over1 = torch.softmax(9 * torch.rand(96, 64, generator=generator), 1)
    row = int(cells0.matched[5])
    over1[row] = 0
    over1[row, cells1.matched[4:12]] = torch.linspace(0.11, 0.14, 8)  # many partners
    over0 = 1 - 0.1 * torch.rand(64, 96, generator=generator)
    conf = over1 * over0.T
    inside = conf * cells0.inside[:, None] * cells1.inside
    expected = inside.flatten().sort(descending=True)[0]
    expected = expected[expected > 1 / (coarse.PARTNERS + 1)]
    assert len(expected) > 10 and (conf > expected[-1]).sum() > len(expected)  # some lie in the border
    for count in (1, 13, 120, 700):
        given = over1[cells0.matched].log(), over0[cells1.matched].log()
        scores, found0, found1 = coarse.best_pairs(*given, cells0, cells1, count)
        assert scores.shape == found0.shape == found1.shape == (count,)
        real = min(count, len(expected))
        assert torch.allclose(scores[:real], expected[:real], rtol=1e-5)
        found = scores > 0
        assert torch.allclose(inside[found0[found], found1[found]], scores[found], rtol=1e-5)
        assert len({*zip(found0[found].tolist(), found1[found].tolist(), strict=True)}) == int(found.sum())


def test_cells_are_numbered_by_blocks() -> None:
    cells = coarse.make_cells(8, 12, stride=50, first=1000, device=torch.device("cpu"))
    corner = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(8.0), indexing="xy"), 0) * 8
    assert torch.equal(cells.corner, grid.to_blocks(corner[None], 2, 3).reshape(-1, 2))
    column, row = (cells.corner / 8).T
    inside = (row >= 2) & (row < 6) & (column >= 2) & (column < 10)
    assert torch.equal(cells.inside > 0, inside)
    assert torch.equal(cells.matched.sort()[0], inside.nonzero().flatten())
    assert torch.equal(cells.rank[cells.matched], torch.arange(4 * 8))
    assert cells.rank.min() >= 0 and cells.rank.max() < 4 * 8
    assert torch.equal(cells.window[inside], (1000 + 4 * 50 * row + 4 * column).long()[inside])
    assert cells.window.min() - 50 - 1 >= 1000 and cells.window.max() + 4 * 50 + 4 < 1000 + 32 * 50


def test_windows_equal_those_cut_at_full_resolution() -> None:
    features = torch.rand(1, 64, 32, 48, generator=torch.Generator().manual_seed(4))  # half of 64 x 96
    full = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
    cells = torch.tensor([2 * 12 + 2, 5 * 12 + 9, 3 * 12 + 4])
    refinement = fine.Refinement()
    table = features[0].flatten(1).T
    cut = fine.windows(table, 4 * (cells // 12) * 48 + 4 * (cells % 12), 48)
    for row, cell in enumerate(cells.tolist()):
        y, x = 8 * (cell // 12), 8 * (cell % 12)
        window0 = full[0, :, y : y + 8, x : x + 8].flatten(1).T
        window1 = full[0, :, y - 1 : y + 9, x - 1 : x + 9].flatten(1).T
        assert torch.allclose(refinement.up0 @ cut[row], window0, atol=1e-6)
        assert torch.allclose(refinement.up1 @ cut[row], window1, atol=1e-6)
    assert torch.equal(refinement.up1_inner_first[:64], refinement.up0)


def test_blocks() -> None:
    """Blocks of 4x4 cells there and back, and their sums and maxima, on a map that is wider than high."""
    image = torch.rand(2, 256, 8, 12, generator=torch.Generator().manual_seed(5))
    blocks = grid.to_blocks(image, 2, 3)
    assert torch.equal(grid.from_blocks(blocks, 2, 3), image)
    assert torch.equal(transformer._block_maximum(blocks), F.max_pool2d(image, 4).flatten(2).transpose(1, 2))
    assert torch.equal(blocks[0, 5, 7], image[0, :, 4 + 3, 8 + 1])


def test_upsampling_by_matrix_equals_interpolation() -> None:
    rows, columns = 3, 5
    message = torch.rand(2, 15, 16, generator=torch.Generator().manual_seed(5))
    interpolated = grid.make_grid(rows, columns, 1.0, torch.empty(0))
    size = (32 * rows, 32 * columns)
    by_matrix, *_ = Fixed(size, (False, False), (0, 0), 1.0, torch.float32)()
    assert by_matrix.upsampling is not None and interpolated.upsampling is None
    results = [transformer._upsampled(message, places) for places in (by_matrix, interpolated)]
    assert torch.allclose(*results, atol=1e-6)


def test_doubling_by_matrices_equals_interpolation() -> None:
    image = torch.rand(2, 7, 5, 6, generator=torch.Generator().manual_seed(6))
    padded = F.pad(image, (0, 9, 0, 9))
    doubled = Double(5, 6, (True, True), (2, 0))(image.permute(0, 3, 2, 1))
    assert torch.allclose(doubled, double(padded)[:, :, :14, :12], atol=1e-6)
    assert torch.allclose(Double(5, 6)(image.permute(0, 3, 2, 1)), double(image), atol=1e-6)


def test_positions_are_rescaled_to_training_size() -> None:
    """At twice the training size every second position has the angle of training (tables are rounded to fp16)."""
    plain = grid.make_grid(4, 4, 1.0, torch.empty(0))
    scaled = grid.make_grid(8, 8, 0.5, torch.empty(0))
    odd = torch.arange(64).reshape(8, 8)[1::2, 1::2].flatten()
    assert torch.equal(scaled.cos[odd], plain.cos) and torch.equal(scaled.sin[odd], plain.sin)
