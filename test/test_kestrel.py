"""Kestrel: folding changes nothing, geometry of its stages, export parity, and what the shipped bundle can do."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from matchanything_ros.bundle import BUNDLES, load_bundle, sha256_of
from matchanything_ros.cli import main
from matchanything_ros.homography import Status, estimate_homography
from matchanything_ros.matcher import Matcher
from matchanything_tools.export import Exportable, export, golden_pair
from matchanything_tools.networks.kestrel import load
from matchanything_tools.networks.kestrel.affine import local_affine
from matchanything_tools.networks.kestrel.attending import enlarge
from matchanything_tools.networks.kestrel.blocks import fuse, upsample
from matchanything_tools.networks.kestrel.encoder import Encoder, FixedEncoder
from matchanything_tools.networks.kestrel.matching import KestrelMatcher, confidence_of, dual_softmax
from matchanything_tools.networks.kestrel.model import SHARPNESS, Kestrel, similarity
from matchanything_tools.networks.kestrel.placing import Patch, Window, pixels, units
from matchanything_tools.networks.kestrel.refine import steps

BUNDLE = BUNDLES / "kestrel.onnx"


def small_network(seed: int = 0) -> Kestrel:
    """A narrow Kestrel with batch norm statistics that are not the neutral ones, in eval mode."""
    torch.manual_seed(seed)
    network = Kestrel(widths=(8, 16, 32), layers=1, fine=16)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
    return network.eval()


def test_folding_changes_nothing() -> None:
    network, folded = small_network(), small_network()
    fuse(folded)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = torch.rand(2, 1, 64, 96)
    with torch.inference_mode():
        for a, b in zip(network(images), folded(images), strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(1.0, a.abs().max().item())  # fp32 rounding, folded in fp64


def test_both_ways_of_upsampling_agree() -> None:
    x = torch.rand(1, 3, 5, 7)
    trained = upsample(x, 4, (2, 3))
    with torch.no_grad():
        assert torch.allclose(trained, upsample(x, 4, (2, 3)), atol=1e-6)
        assert torch.allclose(trained.permute(0, 2, 3, 1), upsample(x.permute(0, 2, 3, 1), 4, (1, 2)), atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_enlarging_by_products_is_bilinear(factor: int) -> None:
    x = torch.rand(2, 5, 7, 3)
    expected = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=factor, mode="bilinear", align_corners=False)
    assert torch.allclose(enlarge(x, factor), expected.permute(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("together", [False, True])
def test_the_exported_features_are_the_trained_ones(together: bool) -> None:
    network = fuse(small_network())
    assert isinstance(network, Kestrel)
    images = torch.rand(2, 1, 64, 96)
    with torch.inference_mode():
        expected = network.features(images)
        encoder = FixedEncoder(network) if together else Encoder(network)
        features = encoder([images] if together else list(images.split(1)))
    scales = {"descriptors": (SHARPNESS / network.dim) ** 0.5, "queries": 0.25}  # 16 channels
    for name, value in expected._asdict().items():
        found = torch.cat([getattr(each, name) for each in features])
        if name == "keys":
            found = network.window.key(found.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        value = value * scales.get(name, 1.0)
        assert (found - value).abs().max() <= 1e-5 * max(1.0, value.abs().max().item()), name


def test_the_exported_stages_place_as_the_trained_ones() -> None:
    network, generator = small_network(), torch.Generator().manual_seed(2)
    for layer in (network.window.offset[-1], network.patch.out[-1]):  # start at zero, which would hide them
        nn.init.normal_(layer.weight, std=0.1, generator=generator)
        nn.init.normal_(layer.bias, generator=generator)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    nn.init.normal_(network.window.key.bias, generator=generator)
    queries, fine = rand(70, 16), rand(2, 20, 28, 16)
    partner = torch.arange(70) % 35  # every cell of image 1, those at its edges too
    with torch.inference_mode():
        keys = network.window.key(fine.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        expected, _, _ = network.window(queries, keys, 1, partner)
        found = Window(network.window)(queries / 4, fine.flatten(0, 2), partner, (20, 28), 20 * 28)
        assert torch.allclose(found, expected, atol=1e-4)  # px

        detail0, detail1 = (F.normalize(rand(1, 32, *size)) for size in ((20, 28), (24, 16)))
        points0, points1 = torch.rand(70, 2, generator=generator) * 40, torch.rand(70, 2, generator=generator) * 32
        affine = torch.eye(2) * 1.5 + 0.5 * rand(70, 2, 2)
        expected = points1[None]
        for _ in range(2):
            shift, _, _ = network.patch(detail0, detail1, points0[None], expected, affine[None])
            expected = expected + (steps(affine[None])[1] @ shift[..., None])[..., 0]
        at = (units(points0, detail0), units(points1, detail1))
        areas = torch.linalg.det(affine)[None]
        found = Patch(network.patch)(detail0, detail1, *at, affine.flatten(1).T, areas, rounds=2)
    assert torch.allclose(pixels(found, detail1), expected[0], atol=1e-3)  # px


@pytest.mark.parametrize("sharp", [1.0, 2.7])  # 2.7: logits above 90, whose exponential fp32 cannot hold
@pytest.mark.parametrize("separate", [True, False])
def test_dual_softmax_is_the_textbook_formula(sharp: float, separate: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(1, 4, 8, 32, generator=generator) * sharp for _ in range(2)]
    maps[1][:, 2:] = (maps[0].flip(2) * 0.9 + 0.1 * maps[1])[:, 2:]  # the first two rows have no partners
    chance = [torch.randn(1, 4, 8, generator=generator) for _ in range(2)]
    scaled = [m * (SHARPNESS / 32) ** 0.5 for m in maps]  # as the encoder hands them out
    batches = (scaled, chance) if separate else ([torch.cat(scaled)], [torch.cat(chance)])
    logarithm, partner = dual_softmax(*batches)
    confidence = confidence_of(logarithm)
    logits = similarity(*maps)[0].double()
    expected = logits.softmax(1) * logits.softmax(0)
    expected = expected * chance[0].double().sigmoid().reshape(-1, 1) * chance[1].double().sigmoid().reshape(1, -1)
    best, index = expected.max(1)
    mutual = expected.argmax(0)[index] == torch.arange(32)
    assert mutual.sum() > 8 and (~mutual).sum() > 3 and logits.max() > 90 * (sharp > 1)
    assert torch.equal(confidence > 0, mutual)
    assert torch.equal(partner[mutual], index[mutual])
    # fp32 holds exponentials down to e^-87 of the greatest; below they are subnormal, and 0 once ONNX Runtime ran.
    held = mutual & (logits.max() - logits.gather(1, index[:, None])[:, 0] < 75)
    assert held.sum() > 8
    assert torch.allclose(confidence[held].double(), best[held], rtol=1e-3)


def test_fp16_suffices_for_the_cell_matrix() -> None:
    """Lengths and distances as those of matches of the trained network: half their squares are 38 to 48 and 0 to 9."""
    generator = torch.Generator().manual_seed(3)
    first = F.normalize(torch.randn(128, 192, generator=generator), dim=1)
    away = F.normalize(torch.randn(128, 192, generator=generator), dim=1) * torch.linspace(0, 4.2, 128)[:, None]
    first = first * (2 * torch.linspace(38, 48, 128)[torch.randperm(128, generator=generator)]).sqrt()[:, None]
    maps = [x.reshape(1, 8, 16, 192).half() for x in (first, first + away)]
    chance = [torch.randn(1, 8, 16, generator=generator).half() for _ in range(2)]
    logarithm, partner = dual_softmax(maps, chance)
    exact, exact_partner = dual_softmax([x.float() for x in maps], [x.float() for x in chance])
    good = confidence_of(exact) > 0.05
    assert good.sum() > 80
    assert torch.equal(partner[good], exact_partner[good])
    # Half the logarithm is rounded to 0.004 or so, the smallest exponentials by a few percent.
    assert torch.allclose(confidence_of(logarithm)[good], confidence_of(exact)[good], rtol=0.05)

    blank = [torch.ones_like(x) for x in maps]  # every cell alike: sums far above what is representable
    logarithm, _ = dual_softmax(blank, chance)
    assert not logarithm.isnan().any() and confidence_of(logarithm).max() < 0.01


def test_local_affine_finds_the_map_despite_rounding_to_cells() -> None:
    angle = np.deg2rad(35.0)
    truth = 0.8 * torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=torch.float32)
    x, y = torch.meshgrid(torch.arange(24.0), torch.arange(20.0), indexing="xy")
    targets = (torch.stack((x, y), -1).reshape(-1, 2) @ truth.T + 5).round()
    cells, high = torch.arange(480), torch.tensor([0.7])
    flat, area = local_affine(targets, cells, torch.full((480,), 0.7), (20, 24), cells, high)
    found = flat.T.reshape(20, 24, 2, 2)
    assert torch.allclose(area, torch.linalg.det(found).reshape(1, -1), rtol=1e-3)
    found = found[3:-3, 3:-3]
    # rounding is +-0.5 cells on a lever of sqrt(50) cells: a standard deviation of 0.04 for every entry
    assert (found - truth).abs().max() < 0.16
    assert (found - truth).abs().mean() < 0.04


@pytest.mark.parametrize("fixed", [False, True])
def test_export_equals_pytorch_at_all_its_sizes(tmp_path: Path, fixed: bool) -> None:
    network = small_network()
    fuse(network)
    module = KestrelMatcher(network, max_matches=64, same_size=fixed).eval()
    item = exportable(module, ((64, 96),) * 3 if fixed else ((32, 32), (64, 96), (128, 128)))
    bundle = export(item, tmp_path / "small.onnx")
    import onnxruntime as ort

    session = ort.InferenceSession(str(bundle.onnx), providers=["CPUExecutionProvider"])
    others = (((64, 96), (128, 64)), ((32, 64), (32, 32)))  # than the example's; the second has fewer cells than rows
    for shape0, shape1 in (((64, 96), (64, 96)),) if fixed else others:
        image0, image1 = torch.rand(1, 1, *shape0), torch.rand(1, 1, *shape1)
        with torch.inference_mode():
            expected = module(image0, image1)
        got = session.run(None, {"image0": image0.numpy(), "image1": image1.numpy()})
        valid = expected[2].numpy() > 1e-6
        assert valid.any()
        assert np.allclose(got[2], expected[2].numpy(), atol=1e-5)
        order = {tuple(p): q for p, q in zip(got[0], got[1], strict=True)}
        pairs = zip(expected[0].numpy(), expected[1].numpy(), strict=True)
        distance = [np.abs(order[tuple(p)] - q).max() for p, q in pairs if tuple(p) in order]
        assert np.median(distance) < 1e-2  # px


def exportable(module: KestrelMatcher, sizes: tuple[tuple[int, int], ...]) -> Exportable:
    from matchanything_ros.bundle import InputSpec, Preprocess, WeightsInfo
    from matchanything_tools.networks.sparse_pair import dynamic_shapes

    inputs = tuple(InputSpec(f"image{k}", k, *sizes) for k in (0, 1))
    return Exportable(
        family="kestrel", variant="test", module=module, inputs=inputs,
        preprocess=Preprocess(channels="gray", resize="fit", interpolation="area", divisor=32),
        max_matches=module.max_matches, score_threshold=0.0, weights=(WeightsInfo("none", "0", "none"),),
        dynamic_shapes=dynamic_shapes(inputs, 32),
    )  # fmt: skip


def test_the_bundle_is_small_free_and_half_precision() -> None:
    manifest = load_bundle(BUNDLE).manifest
    assert manifest.precision == "fp16"
    assert manifest.weights[0].licence == "Apache-2.0"
    assert BUNDLE.stat().st_size <= 16e6


def test_the_bundle_matches_across_a_change_of_everything_and_refuses_noise() -> None:
    """One image turned by 90 degrees, inverted and of another gamma; then images that share nothing."""
    image, _ = golden_pair()
    other = np.ascontiguousarray(np.rot90(255 - (255 * (image / 255.0) ** 0.6).astype(np.uint8), k=-1))
    truth = np.array([[0.0, -1.0, image.shape[0] - 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    noise = np.random.default_rng(0).integers(0, 255, image.shape, dtype=np.uint8)
    with Matcher(BUNDLE, backend="onnxruntime-cpu") as matcher:
        matches = matcher.match(image, other)
        strangers = matcher.match(image, noise)
    estimate = estimate_homography(matches.keypoints0, matches.keypoints1, matches.size0, matches.size1)
    assert estimate.status is Status.OK and estimate.matrix is not None
    corners = np.array([[0, 0, 1], [319, 0, 1], [319, 239, 1], [0, 239, 1]], float).T
    found, expected = estimate.matrix @ corners, truth @ corners
    assert np.abs(found[:2] / found[2] - expected[:2]).max() < 1.0  # sub-pixel although a cell is 4 px of these images
    assert len(strangers) < 8


@pytest.mark.full  # half a minute on an idle machine
def test_tensorrt_builds_the_bundle_with_its_range_of_sizes(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    for suffix in (".onnx", ".json", ".golden.npz"):
        shutil.copy(BUNDLE.with_suffix(suffix), tmp_path)
    assert main(["build", str(tmp_path / "kestrel.onnx"), "--target", "sm_86"]) == 0
    assert list(tmp_path.glob("*.plan"))


def test_the_shipped_weights_are_those_of_the_bundle() -> None:
    """Who needs a fixed size or fp32 exports them again: they must be the ones that were measured."""
    manifest = load_bundle(BUNDLE).manifest
    weights = BUNDLE.with_suffix(".pt")
    assert sha256_of(weights) == manifest.weights[0].sha256
    assert 4e6 < sum(p.numel() for p in load(weights).parameters()) < 8e6
