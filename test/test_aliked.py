"""ALIKED: its stages written out by hand, its recorded results, the exported graph, and the bundle in the package.

The implementation was compared with the original's results for all four published networks (keypoints within 1e-4 px,
cosine of descriptors above 0.999999) on images that may not be shipped. What is recorded in data/golden/aliked.npz is
this implementation's result then, on an image that may.
"""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import seeded
import torch
import torch.nn.functional as F

from matchanything_ros import cli
from matchanything_ros.bundle import InputSpec, load_bundle
from matchanything_ros.engines import open_engine
from matchanything_ros.errors import UserError
from matchanything_ros.matcher import Matcher
from matchanything_ros.preprocess import prepare
from matchanything_tools.checkpoints import load_strict, read_checkpoint
from matchanything_tools.networks.aliked import VARIANTS, Aliked, FeatureReader
from matchanything_tools.networks.aliked.detection import LEAST, detect, refine, select, suppress
from matchanything_tools.networks.aliked.features import ReadFeatures, WholeFeatures, Window, upsample
from matchanything_tools.networks.aliked.padding import PaddingConv, pad_edges
from matchanything_tools.networks.sampling import sample
from matchanything_tools.networks.sparse_pair import SparsePair, dynamic_shapes

DATA = Path(__file__).parent / "data"
WEIGHTS = DATA / "weights"
NAME = "aliked-n16"  # the bundle in the package


def image() -> torch.Tensor:
    """301 x 385 of the coffee cup: neither side a multiple of 32."""
    pixels = cv2.imread(str(DATA / "golden" / "coffee_0.png"))[100:401, 150:535, ::-1]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def network(
    variant: str, keypoints: int, threshold: float | None = None, features: FeatureReader = WholeFeatures
) -> Aliked:
    path = WEIGHTS / f"aliked-{variant}.pth"
    aliked = Aliked(VARIANTS[variant], keypoints, threshold, features=features).eval()
    load_strict(aliked, read_checkpoint(path), what="ALIKED", path=path)
    aliked.fuse()
    return aliked


@pytest.mark.parametrize("features", [WholeFeatures, ReadFeatures])
@pytest.mark.parametrize("variant", ["t16", "n16"])
def test_recorded_result(variant: str, features: FeatureReader) -> None:
    """Tolerances: ten times what 1e-6 of noise on the input changed (keypoints 8e-5 px, scores 3e-5)."""
    golden = np.load(DATA / "golden" / "aliked.npz")
    wanted = golden[f"{variant}_keypoints"]
    with torch.inference_mode():
        keypoints, scores, descriptors = (x[0].numpy() for x in network(variant, 300, 0.2, features)(image()))
    valid = scores > 0
    assert valid.sum() == len(wanted) and not valid[len(wanted) :].any()
    distance = np.linalg.norm(keypoints[valid][:, None] - wanted, axis=2)
    nearest = distance.argmin(axis=0)
    assert distance.min(axis=0).max() < 1e-3
    assert np.abs(scores[nearest] - golden[f"{variant}_scores"]).max() < 3e-4
    cosine = (descriptors[nearest[::4]] * golden[f"{variant}_descriptors"]).sum(axis=1)
    # A patch starts at the rounded-down coordinate: one keypoint in a hundred may fall on the other side.
    assert np.mean(cosine > 0.9999) >= 0.99


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_loads_strictly(variant: str) -> None:
    aliked = Aliked(VARIANTS[variant], 50).eval()
    state = dict(seeded.state(f"aliked-{variant}"))
    assert len(state) == 76
    load_strict(aliked, state, what="ALIKED", path=Path("seeded"))
    aliked.fuse()
    with torch.inference_mode():
        keypoints, scores, descriptors = aliked(torch.rand(2, 3, 64, 96))
    assert keypoints.shape == (2, 50, 2) and descriptors.shape == (2, 50, VARIANTS[variant].dim)
    assert torch.isfinite(descriptors).all() and (scores >= 0).all()
    state.pop("score_head.0.weight")
    with pytest.raises(UserError, match=r"score_head\.0\.weight"):
        load_strict(Aliked(VARIANTS[variant], 50), state, what="ALIKED", path=Path("seeded"))


def score_map(height: int = 41, width: int = 53) -> torch.Tensor:
    noise = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 3, 1, 1)


def test_suppression_and_selection_by_hand() -> None:
    """The best pixel suppresses its 5x5 surroundings, then the best of what is left, in three rounds; 2 px border."""
    scores = score_map()
    found = suppress(scores)[0, 0].numpy()
    values = scores[0, 0].numpy()
    kept = np.zeros(values.shape, bool)
    for _ in range(3):
        near = cv2.dilate(kept.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        rest = np.where(near, 0, values)
        highest = cv2.dilate(rest, np.ones((5, 5), np.uint8))
        kept |= (rest == highest) & ~near
    kept[:2], kept[-2:], kept[:, :2], kept[:, -2:] = False, False, False, False
    assert np.array_equal(found, np.where(kept, values, 0)) and kept.sum() > 50

    rows, columns = np.nonzero(kept)
    order = np.argsort(-values[rows, columns])
    best, pixels = select(suppress(scores), 40)
    assert np.array_equal(best[0].numpy(), values[rows, columns][order[:40]])
    assert np.array_equal(pixels[0].numpy(), (rows * values.shape[1] + columns)[order[:40]])
    best, _ = select(suppress(scores), 500)  # more than there are maxima, and than there are blocks
    assert (best[0] > 0).sum() == kept.sum() and (best[0, kept.sum() :] == 0).all()


def test_selection_by_logits_in_half_precision() -> None:
    """The same pixels as by scores, in any order; LEAST where there are no more maxima or blocks."""
    logits = (score_map() * 8 - 4).half()
    maxima = suppress(torch.sigmoid(logits.float()))
    for k in (40, 500):
        best, pixels = select(maxima, k)
        ranks, found = select(maxima, k, ordered=False, ranks=logits)
        assert set(found[ranks > LEAST].tolist()) == set(pixels[best > 0].tolist())
        assert torch.equal(logits.flatten()[found[ranks > LEAST]], ranks[ranks > LEAST])


@pytest.mark.parametrize(("height", "width"), [(50, 70), (64, 33), (64, 96)])
def test_first_convolution_pads(height: int, width: int) -> None:
    """One Gather into stripes, against padding and a convolution."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 4, 3, padding=1)
    image = torch.rand(2, 3, height, width)
    with torch.inference_mode():
        wanted = convolution(pad_edges(image))
        assert wanted.shape[2] % 32 == wanted.shape[3] % 32 == 0
        assert torch.allclose(PaddingConv(convolution, 8, planes=True)(image), wanted, atol=1e-6)


def test_threshold_falls_back_to_the_mean() -> None:
    scores = score_map()
    _, values = detect(scores, 200, threshold=0.7)
    peaks, _ = select(suppress(scores), 200)
    assert (values > 0).sum() == (peaks > 0.7).sum() > 5
    _, values = detect(scores, 200, threshold=0.999)
    assert (values > 0).sum() == (peaks > scores.mean()).sum() > 50


def test_subpixel_by_hand() -> None:
    scores = score_map()
    found = refine(scores, torch.tensor([[7 * 53 + 10, 38 * 53 + 50]]))[0].numpy()
    for (x, y), position in zip(((10, 7), (50, 38)), found, strict=True):
        window = scores[0, 0, y - 2 : y + 3, x - 2 : x + 3].numpy().astype(float)
        weight = np.exp((window - window.max()) / 0.1)
        rows, columns = np.mgrid[-2:3, -2:3]
        wanted = (x + (weight * columns).sum() / weight.sum(), y + (weight * rows).sum() / weight.sum())
        assert np.allclose(position, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("reader", "dtype"), [(WholeFeatures, torch.float32), (ReadFeatures, torch.float32), (ReadFeatures, torch.float16)]
)
def test_features_are_zero_outside_of_the_image(reader: FeatureReader, dtype: torch.dtype) -> None:
    """All ways to read the map, at whole pixels and between them, against the padded map written out."""
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3  # four times the relative precision of fp16
    torch.manual_seed(0)
    groups = [torch.randn(1, 2, 32 // s, 64 // s) for s in (1, 2, 8, 32)]
    whole = F.normalize(torch.cat([upsample(group, groups[0].shape[2:]) for group in groups], dim=1), dim=1)
    whole[:, :, :3], whole[:, :, 30:], whole[:, :, :, :5], whole[:, :, :, 60:] = 0, 0, 0, 0
    features = reader(
        [group.to(dtype) for group in groups], Window(torch.tensor([5.0, 3.0]), torch.tensor([59.0, 29.0]))
    )
    pixels = torch.tensor([[[5, 3], [4, 3], [59, 29], [60, 29], [59, 30], [20, 10], [-1, 5], [64, 31], [70, 40]]])
    found = features.at(pixels.float().unsqueeze(2))[0, :, 0].float()
    for number, (x, y) in enumerate(pixels[0].tolist()):
        wanted = whole[0, :, y, x] if 0 <= x < 64 and 0 <= y < 32 else torch.zeros(8)
        assert torch.allclose(found[number], wanted, atol=tolerance)
    positions = torch.tensor([[[20.25, 10.5], [4.5, 15.0], [59.75, 29.75], [30.0, 2.25], [-3.0, 50.0]]])
    found = features.between(positions.unsqueeze(2)).float().permute(0, 3, 1, 2)
    assert torch.allclose(found, sample(whole, positions.unsqueeze(2)), atol=tolerance)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged bundle, exported again with the command that its manifest notes."""
    out = tmp_path_factory.mktemp("aliked") / "aliked-n16.onnx"
    words = load_bundle(NAME).manifest.exporter["command"].split()[1:]
    words[words.index("--weights") + 1] = str(WEIGHTS / "aliked-n16.pth")
    assert cli.main([*words, "--out", str(out)]) == 0
    return out


def test_packaged_bundle_is_what_the_code_exports(exported: Path) -> None:
    """The same function: equal matches on a golden pair and on images of other, odd sizes."""
    shipped, made = load_bundle(NAME), load_bundle(exported)
    assert shipped.manifest.weights == made.manifest.weights and shipped.manifest.inputs == made.manifest.inputs
    assert shipped.manifest.preprocess == made.manifest.preprocess
    engines = [open_engine(bundle, "onnxruntime-cpu") for bundle in (shipped, made)]
    coffee = [cv2.imread(str(DATA / "golden" / f"coffee_{i}.png"))[..., ::-1].copy() for i in (0, 1)]
    golden = np.load(shipped.golden)
    for pair in ((golden["image0"], golden["image1"]), (coffee[0][:301, :385], coffee[1][:333, :270])):
        inputs = {
            spec.name: prepare(pair[spec.image], shipped.manifest.preprocess, spec)[0]
            for spec in shipped.manifest.inputs
        }
        one, other = (as_matches(engine.run(inputs)) for engine in engines)
        assert len(one) > 50
        # Equal but for matches whose score is near zero or whose keypoint is the last that is taken.
        common = one.keys() & other.keys()
        assert len(common) >= 0.99 * max(len(one), len(other))
        assert max(abs(one[key] - other[key]) for key in common) < 1e-3
    assert "/" not in shipped.manifest.exporter["command"]


def as_matches(outputs: dict[str, np.ndarray]) -> dict[tuple[float, ...], float]:
    """Coordinates to a hundredth of a pixel -> score."""
    rows = np.concatenate((outputs["keypoints0"], outputs["keypoints1"]), axis=1).round(2)
    return {tuple(row): float(s) for row, s in zip(rows.tolist(), outputs["scores"], strict=True) if s > 0}


def test_onnx_equals_pytorch_network() -> None:
    """The shipped bundle against the golden result that the PyTorch network gave when it was exported."""
    bundle = load_bundle(NAME)
    golden = np.load(bundle.golden)
    inputs = {
        spec.name: prepare(golden[spec.name], bundle.manifest.preprocess, spec)[0] for spec in bundle.manifest.inputs
    }
    found = as_matches(open_engine(bundle, "onnxruntime-cpu").run(inputs))
    wanted = as_matches({key: golden[key] for key in ("keypoints0", "keypoints1", "scores")})
    common = found.keys() & wanted.keys()
    assert len(common) >= 0.99 * max(len(found), len(wanted)) and len(wanted) > 500
    assert max(abs(found[key] - wanted[key]) for key in common) < 1e-3


def test_matcher_finds_the_true_matches() -> None:
    """Through the whole robot side: original pixels of both images, related by the known homography."""
    truth = np.load(DATA / "golden" / "coffee_homography.npz")
    matrix = truth[truth.files[0]]
    images = [cv2.imread(str(DATA / "golden" / f"coffee_{i}.png"))[..., ::-1].copy() for i in (0, 1)]
    with Matcher(NAME, backend="onnxruntime-cpu") as matcher:
        matches = matcher.match(*images)
        nothing = matcher.match(np.zeros((100, 120, 3), np.uint8), images[1])
    mapped = cv2.perspectiveTransform(matches.keypoints0[None], matrix)[0]
    error = np.linalg.norm(mapped - matches.keypoints1, axis=1)
    assert len(matches) > 200
    assert np.median(error) < 1.5  # pixels of images that were shrunk by up to 1.4
    assert np.mean(error < 5) > 0.9
    assert len(nothing) == 0


@pytest.mark.tensorrt
def test_tensorrt_builds_the_bundle() -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    from matchanything_tools.make_plan import build_engine

    built = build_engine(load_bundle(NAME), target="sm_86")
    assert built.profile["image0"][2] == (640, 640)


@pytest.mark.tensorrt
def test_fixed_fp16(tmp_path: Path) -> None:
    """A small t16 in half precision: still the same matches, and TensorRT accepts it."""
    out = tmp_path / "t16.onnx"
    words = f"export aliked --variant t16 --weights {WEIGHTS / 'aliked-t16.pth'} --size 192x256 --keypoints 300".split()
    assert cli.main([*words, "--precision", "fp16", "--out", str(out)]) == 0
    bundle = load_bundle(out)
    images = [cv2.imread(str(DATA / "golden" / f"coffee_{i}.png"))[..., ::-1] for i in (0, 1)]
    pair = [np.ascontiguousarray(cv2.resize(x, (256, 192), interpolation=cv2.INTER_AREA)) for x in images]
    with Matcher(bundle, backend="onnxruntime-cpu", as_exported=True) as matcher:
        half = matcher.match(*pair)
    tensors = torch.cat([torch.from_numpy(x).permute(2, 0, 1)[None].float() / 255 for x in pair])
    with torch.inference_mode():
        keypoints, scores, _ = network("t16", 300)(tensors)
    for number, found in enumerate((half.keypoints0, half.keypoints1)):
        wanted = keypoints[number][scores[number] > 0].numpy()
        distance = np.linalg.norm(found[:, None] - wanted, axis=2).min(axis=1)
        assert len(found) > 50 and np.mean(distance < 1) >= 0.97
    rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    from matchanything_tools.make_plan import build_engine

    assert rtx and memoryview(build_engine(bundle, target="sm_86").data).nbytes > 1000


@pytest.mark.full
def test_five_thousand_keypoints(tmp_path: Path) -> None:
    """More than one TopK of TensorRT may take: the matches of fewer keypoints are among those of all."""
    found = {}
    for count in (500, 5000):
        out = tmp_path / f"{count}.onnx"
        words = f"export aliked --variant t16 --weights {WEIGHTS / 'aliked-t16.pth'} --size 320x416 --keypoints {count}"
        assert cli.main([*words.split(), "--matching", "mutual", "--out", str(out)]) == 0
        bundle = load_bundle(out)
        golden = np.load(bundle.golden)
        inputs = {s.name: prepare(golden[s.name], bundle.manifest.preprocess, s)[0] for s in bundle.manifest.inputs}
        found[count] = as_matches(open_engine(bundle, "onnxruntime-cpu").run(inputs))
    assert len(found[500]) > 100 and len(found[5000]) > 2 * len(found[500])
    # With more to choose from, a keypoint may find a better partner.
    assert len(found[500].keys() & found[5000].keys()) > 0.7 * len(found[500])
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    from matchanything_tools.make_plan import build_engine

    assert memoryview(build_engine(bundle, target="sm_86").data).nbytes > 1000


@pytest.mark.full
def test_deform_conv_is_the_same_network(tmp_path: Path) -> None:
    out = tmp_path / "t16.onnx"
    words = f"export aliked --variant t16 --weights {WEIGHTS / 'aliked-t16.pth'} --size 192x256 --keypoints 300"
    assert cli.main([*words.split(), "--deform-conv", "--out", str(out)]) == 0
    bundle = load_bundle(out)
    assert b"DeformConv" in out.read_bytes()
    golden = np.load(bundle.golden)  # of the PyTorch network, which samples
    inputs = {s.name: prepare(golden[s.name], bundle.manifest.preprocess, s)[0] for s in bundle.manifest.inputs}
    found = as_matches(open_engine(bundle, "onnxruntime-cpu").run(inputs))
    wanted = as_matches({key: golden[key] for key in ("keypoints0", "keypoints1", "scores")})
    assert len(wanted) > 50 and len(found.keys() & wanted.keys()) >= 0.99 * len(wanted)


def test_narrow_range_of_dynamic_sizes_can_be_traced() -> None:
    """torch.export fails on a range with fewer than two multiples of what the network divides by."""
    specs = tuple(InputSpec(f"image{i}", i, (64, 64), (96, 96), (128, 128)) for i in (0, 1))
    network = Aliked(VARIANTS["t16"], 32).eval()
    network.fuse()
    pair = SparsePair(network, "mutual", 32, one_batch=False)
    example = tuple(torch.rand(1, 3, 96, 96) for _ in specs)
    with torch.inference_mode():
        traced = torch.export.export(
            pair, example, dynamic_shapes=dynamic_shapes(specs), prefer_deferred_runtime_asserts_over_guards=True
        )
    assert len(traced.range_constraints) == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--keypoints 6000", "choose 1 to 5000"),
        ("--keypoints 100 --max-matches 200", "choose 1 to --keypoints"),
        ("--size 16x64", "at least 32 pixels"),
        ("--detection-threshold 3", "0 to 1"),
        ("--min 32x32 --opt 64x64 --max 128x128", "at least 33 pixels"),
        ("--variant t16", "is ALIKED n16 or n16rot, not t16: add --variant n16"),
        ("--min 64x64 --opt 480x640 --max 480x320", "must not decrease"),
    ],
)
def test_bad_wishes_get_one_sentence(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"export aliked --weights {WEIGHTS / 'aliked-n16.pth'} --out {tmp_path / 'x.onnx'}"
    assert cli.main(f"{base} {words}".split()) == 1
    told = capsys.readouterr().err
    assert re.search(sentence, told) and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_of_no_known_network_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"one.weight": torch.zeros(3), "two.weight": torch.zeros(3)}, tmp_path / "other.pth")
    assert cli.main(f"export aliked --weights {tmp_path / 'other.pth'} --out {tmp_path / 'x.onnx'}".split()) == 1
    assert "is not the checkpoint of ALIKED n16" in capsys.readouterr().err
