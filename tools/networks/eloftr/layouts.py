"""Keys of EfficientLoFTR as Hugging Face transformers stores it -> the published keys."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

BRANCHES = {"conv1.conv": "rbr_dense.conv", "conv1.norm": "rbr_dense.bn", "conv2.conv": "rbr_1x1.conv"} | {
    "conv2.norm": "rbr_1x1.bn",
    "identity": "rbr_identity",
}
ATTENTION = {
    "aggregation.q_aggregation": "aggregate",
    "aggregation.norm": "norm1",
    "attention.q_proj": "q_proj",
    "attention.k_proj": "k_proj",
    "attention.v_proj": "v_proj",
    "attention.o_proj": "merge",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "mlp.layer_norm": "norm2",
}
PYRAMID = {"out_conv1": "outconv", "out_conv2": "outconv2.0", "batch_norm": "outconv2.1", "out_conv3": "outconv2.3"}

STAGE = re.compile(r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.(.+)\.(\w+)")
LAYER = re.compile(r"local_feature_transformer\.layers\.(\d+)\.(self|cross)_attention\.(.+)\.(\w+)")
REFINE = re.compile(r"refinement_layer\.out_conv_layers\.(\d+)\.(.+)\.(\w+)")


def published_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of a Hugging Face checkpoint; one in the published layout comes back unchanged, and keys that
    belong to neither keep their names (the strict loader then reports them)."""
    return {_published(key): value for key, value in state.items()}


def _published(key: str) -> str:
    name = key.removeprefix("efficientloftr.")
    if match := STAGE.fullmatch(name):
        stage, block, branch, leaf = match.groups()
        where = "layer0" if stage == "0" else f"layer{stage}.{block}"
        return f"backbone.{where}.{BRANCHES.get(branch, branch)}.{leaf}"
    if match := LAYER.fullmatch(name):
        layer, kind, part, leaf = match.groups()
        return f"loftr_coarse.layers.{2 * int(layer) + (kind == 'cross')}.{ATTENTION.get(part, part)}.{leaf}"
    if match := REFINE.fullmatch(name):
        level, part, leaf = match.groups()
        return f"fine_preprocess.layer{2 - int(level)}_{PYRAMID.get(part, part)}.{leaf}"
    return "fine_preprocess.layer3_outconv.weight" if name == "refinement_layer.out_conv.weight" else key
