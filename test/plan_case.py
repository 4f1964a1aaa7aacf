"""A plan and its manifest, of a GPU and a TensorRT that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_bundle import SIZE

from matchanything_ros.bundle import Bundle, sha256_of
from matchanything_ros.engines.device import Device
from matchanything_ros.engines.flavour import Flavour
from matchanything_ros.engines.plan import (
    PlanManifest,
    manifest_path,
    plan_path,
)

ORIN = Device("Orin", "8.7", "12.6", "540.4.0")
TRT = Flavour("tensorrt", "10.3.0", None)
GOOD = {"passed": True, "summary": "100% of 12 matches found again, median 0.000 px"}


def write_plan(bundle: Bundle, tag: str = "orin", content: bytes = b"plan", **changes: Any) -> Path:
    plan = plan_path(bundle, tag)
    plan.write_bytes(content)
    made = PlanManifest(
        bundle=bundle.manifest.name,
        onnx_sha256=bundle.manifest.onnx_sha256,
        data_sha256=None,
        plan_sha256=sha256_of(plan),
        flavour="tensorrt",
        version="10.3.0",
        gpu="Orin",
        compute_capabilities=("8.7",),
        cuda="12.6",
        driver="540.4.0",
        precision="fp32",
        profile={f"image{i}": (SIZE, SIZE, SIZE) for i in (0, 1)},
        build_seconds=1.0,
        size=len(content),
        device_memory=1000,
        parity=GOOD,
    )
    manifest_path(plan).write_text(made.replaced(**changes).to_json())
    return plan
