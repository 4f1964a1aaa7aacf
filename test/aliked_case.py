"""ALIKED with its published weights, for test_aliked.py and test_aliked_export.py."""

from __future__ import annotations

from pathlib import Path

from matchanything_tools.checkpoints import load_strict, read_checkpoint
from matchanything_tools.networks.aliked import VARIANTS, Aliked, FeatureReader
from matchanything_tools.networks.aliked.features import WholeFeatures

WEIGHTS = Path(__file__).parent / "data" / "weights"


def network(
    variant: str, keypoints: int, threshold: float | None = None, features: FeatureReader = WholeFeatures
) -> Aliked:
    path = WEIGHTS / f"aliked-{variant}.pth"
    aliked = Aliked(VARIANTS[variant], keypoints, threshold, features=features).eval()
    load_strict(aliked, read_checkpoint(path), what="ALIKED", path=path)
    aliked.fuse()
    return aliked
