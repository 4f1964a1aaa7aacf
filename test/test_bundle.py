"""A bundle that is wrong in any way is refused with one sentence that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from matchanything_ros.bundle import SCHEMA, InputSpec, Manifest, Preprocess, WeightsInfo, load_bundle, sha256_of
from matchanything_ros.errors import UserError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A manifest with stand-in files: loading compares hashes and never parses the network itself."""
    onnx = tmp_path / "net.onnx"
    onnx.write_bytes(b"network")
    onnx.with_name("net.onnx.data").write_bytes(b"weights")
    size = (480, 640)
    manifest = Manifest(
        name="net",
        family="net",
        variant="a",
        precision="fp32",
        weights=(WeightsInfo("net.pth", "0" * 64, "BSD-3-Clause"),),
        inputs=(InputSpec("image0", 0, size, size, size), InputSpec("image1", 1, size, size, size)),
        preprocess=Preprocess(),
        outputs=("keypoints0", "keypoints1", "scores"),
        max_matches=100,
        score_threshold=0.1,
        onnx_sha256=sha256_of(onnx),
        data_sha256=sha256_of(onnx.with_name("net.onnx.data")),
    )
    onnx.with_suffix(".json").write_text(manifest.to_json())
    return onnx


def edit(onnx: Path, **changes: object) -> None:
    path = onnx.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_written_is_read(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    assert loaded.manifest.to_json() == bundle.with_suffix(".json").read_text()
    assert loaded.manifest.input("image1").opt == (480, 640)
    assert loaded.manifest.fixed and not loaded.manifest.dense
    assert load_bundle(bundle.with_suffix(".json")).onnx == bundle


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda onnx: onnx.write_bytes(b"netw"), "truncated or replaced"),
        (lambda onnx: onnx.unlink(), "is missing"),
        (lambda onnx: onnx.with_suffix(".json").unlink(), "has no manifest"),
        (lambda onnx: onnx.with_name("net.onnx.data").unlink(), "weights net.onnx.data"),
        (lambda onnx: onnx.with_name("net.onnx.data").write_bytes(b""), "truncated or replaced"),
        (lambda onnx: onnx.with_suffix(".json").write_text('{"schema": 1,'), "cannot be read"),
        (lambda onnx: onnx.with_suffix(".json").write_text("[]"), "not a bundle manifest"),
        (lambda onnx: edit(onnx, schema=SCHEMA + 1), "update matchanything_ros"),
        (lambda onnx: edit(onnx, from_the_future=1), "damaged"),
        (lambda onnx: edit(onnx, precision="int3"), "int3"),
        (lambda onnx: edit(onnx, outputs=["scores"]), "keypoints0"),
        (lambda onnx: edit(onnx, preprocess={"resize": "melt"}), "melt"),
    ],
)
def test_damage_is_one_sentence(bundle: Path, damage: object, sentence: str) -> None:
    damage(bundle)  # type: ignore[operator]
    with pytest.raises(UserError, match=sentence) as caught:
        load_bundle(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.onnx", "no-such-bundle", "."])
def test_a_name_that_leads_nowhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        load_bundle(name)
