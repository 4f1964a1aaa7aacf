"""What tests of several files share."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tensorrt_machine import Machine

from matchanything_ros.bundle import Bundle

if TYPE_CHECKING:
    from matchanything_tools.export import Exportable
    from matchanything_tools.training.data import Photographs


@pytest.fixture(scope="session")
def shallow_roma(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A RoMa of every operator and little depth, fp16, with dense outputs: see roma_case."""
    torch = pytest.importorskip("torch", reason="torch makes the test's network")
    import roma_case

    from matchanything_tools.export import export
    from matchanything_tools.networks.roma import correlation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correlation, "BAND_BYTES", 300_000)  # several bands, as maps of the real size have
        return export(roma_case.shallow_item(torch.float16), tmp_path_factory.mktemp("shallow") / "roma.onnx")


@pytest.fixture(scope="session")
def small_dedode(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """DeDoDe B+B for 64x96, fp16, 200 keypoints, beside its seeded checkpoints detector_B.pth and descriptor_B.pth."""
    pytest.importorskip("torch", reason="torch makes the test's network")
    import seeded

    from matchanything_ros import cli
    from matchanything_ros.bundle import load_bundle

    folder = tmp_path_factory.mktemp("dedode")
    words = ["export", "dedode", "--size", "64x96", "--keypoints", "200", "--precision", "fp16"]
    for flag, part in (("--weights", "detector_B"), ("--descriptor", "descriptor_B")):
        words += [flag, str(seeded.save(f"dedode_{part}", folder / f"{part}.pth"))]
    out = folder / "dedode.onnx"
    assert cli.main([*words, "--out", str(out)]) == 0
    return load_bundle(out)


@pytest.fixture(scope="session")
def small_eloftr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exportable, Bundle]:
    """ELoFTR for 224x256, fp32, 200 matches, its weights in a file beside the graph as those of larger networks are."""
    pytest.importorskip("torch", reason="torch makes the test's network")
    import seeded

    from matchanything_tools.export import export, network

    folder = tmp_path_factory.mktemp("eloftr")
    args: dict[str, object] = dict.fromkeys(("min", "opt", "max", "score_threshold", "pipeline"))
    args |= {"weights": seeded.save("eloftr", folder / "eloftr.ckpt"), "licence": "none: random"}
    args |= {"size": (224, 256), "precision": "fp32", "max_matches": 200}
    item = network("eloftr").exportable(argparse.Namespace(**args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matchanything_tools.export.EXTERNAL_DATA_OVER", 1 << 20)
        return item, export(item, folder / "small.onnx")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    """Ten images of soft random structure to train with, two of them a registered couple."""
    pytest.importorskip("torch", reason="training needs torch")
    import cv2
    import numpy as np

    from matchanything_tools.training.data import load_photographs

    folder = tmp_path_factory.mktemp("images")
    (folder / "train").mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for k in range(10):
        levels = [
            cv2.resize(rng.uniform(0, 255, (n, n, 3)), (160, 120), interpolation=cv2.INTER_CUBIC) for n in (4, 12, 40)
        ]
        cv2.imwrite(str(folder / "train" / f"{k}.jpg"), np.clip(np.mean(levels, 0), 0, 255).astype(np.uint8))
        entries.append({"file": f"{k}.jpg", "repo": f"r{k % 3}", "registered_with": ["1.jpg"] if k == 0 else []})
    (folder / "train.json").write_text(json.dumps({"images": entries}), encoding="utf-8")
    return load_photographs(folder, "cpu")


@pytest.fixture(params=[False, True], ids=["fixed", "dynamic"])
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Machine:
    """Doubles of a GPU, pycuda and TensorRT, and a bundle with a plan."""
    return Machine(tmp_path, dynamic=request.param)


@pytest.fixture
def nothing_wrong_in_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A WrongCall in a thread or a destructor fails the test as well."""
    found: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    monkeypatch.setattr("sys.unraisablehook", found.append)
    yield
    assert found == [], [getattr(entry, "exc_value", entry) for entry in found]
