"""The packaged weights of Kestrel in today's code: the matcher that was measured, and flags that export it again."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from matchanything_ros.bundle import BUNDLES, load_bundle
from matchanything_tools.export import Exportable, add_arguments, golden_pair, golden_result, network
from matchanything_tools.networks.kestrel import load
from matchanything_tools.networks.kestrel.matching import KestrelMatcher

WEIGHTS = BUNDLES / "kestrel.pt"
FLAGS = ("--licence", "Apache-2.0", "--precision", "fp16")  # of the packaged bundle; all others have their defaults


def exported(*flags: str) -> Exportable:
    """What `matchanything export kestrel` is about to write."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["kestrel", "--weights", str(WEIGHTS), "--out", "kestrel.onnx", *FLAGS, *flags])
    return network("kestrel").exportable(args)


def test_the_packaged_manifest_is_what_the_code_writes() -> None:
    item, manifest = exported(), load_bundle("kestrel").manifest
    assert (item.family, item.variant, item.precision) == (manifest.family, manifest.variant, manifest.precision)
    assert item.inputs == manifest.inputs and item.preprocess == manifest.preprocess
    assert item.max_matches == manifest.max_matches and item.score_threshold == manifest.score_threshold
    assert item.weights == manifest.weights
    assert item.outputs == manifest.outputs and item.stages == manifest.stages
    assert f"{' '.join(FLAGS)} --rounds {item.module.rounds}" in manifest.exporter["command"]
    assert item.module.max_matches == item.max_matches


@pytest.mark.parametrize("size", [(), ("--size", "480x640")], ids=["dynamic", "fixed"])
def test_the_golden_result_is_what_the_code_makes(size: tuple[str, ...]) -> None:
    """The file is of the dynamic form; the other one and other processors differ by fp16's rounding."""
    item = exported(*size)
    assert item.module.same_size == bool(size)
    golden, result = np.load(load_bundle("kestrel").golden), golden_result(item)
    places = {tuple(p): row for row, p in enumerate(result["keypoints0"].tolist())}
    rows = [(k, places[p]) for k, p in enumerate(map(tuple, golden["keypoints0"].tolist())) if p in places]
    assert len(rows) >= 0.98 * item.max_matches  # all but those whose score is about that of the last row
    wanted, found = np.array(rows).T
    distance = np.abs(golden["keypoints1"][wanted] - result["keypoints1"][found]).max(1)
    # The window stage moves by up to 9 px, of which fp16 holds 1/2048; ten such roundings
    assert np.quantile(distance, 0.95) < 10 * 9 / 2048
    # half the logarithm of a score is rounded to 0.004 or so, see test_fp16_suffices_for_the_cell_matrix
    assert np.abs(golden["scores"][wanted] - result["scores"][found]).max() < 4 * 0.004


@pytest.mark.parametrize(("width", "fixed"), [(320, False), (224, True)], ids=["dynamic", "fixed"])
def test_each_stage_places_better_in_an_image_turned_by_90_degrees(width: int, fixed: bool) -> None:
    """The patch stage only does where the local map is the right one, neither its inverse nor none."""
    grey = golden_pair()[0][:224, :width].mean(2, dtype=np.float32) / 255
    image = torch.from_numpy(grey)[None, None]
    turned = torch.rot90(image, -1, (2, 3)).contiguous()  # clockwise: (x, y) goes to (223 - y, x)
    matcher, medians = KestrelMatcher(load(WEIGHTS), max_matches=600, same_size=fixed).eval(), []
    for matcher.rounds in (0, 1, 2):
        with torch.inference_mode():
            points0, points1, scores = matcher(image, turned)
        sure = scores > 0.3
        assert sure.sum() > 300
        truth = torch.stack((223 - points0[:, 1], points0[:, 0]), 1)
        medians.append((points1 - truth).norm(dim=1)[sure].median().item())
    assert medians[0] < 1  # px: the window stage has a key every 2 px
    assert medians[2] < medians[1] < medians[0]
    assert medians[2] < 0.5 * medians[0]
