"""Which published model a state dict belongs to, told from one or two of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fingerprint:
    """Shapes by which a model is known. Keys are without the prefixes that checkpoints.py takes off."""

    name: str
    shapes: dict[str, tuple[int, ...]]


# First match wins: models that contain the tensors of another stand before it.
FINGERPRINTS = (
    Fingerprint(
        "MatchAnything-RoMa",
        {"decoder.embedding_decoder.to_out.weight": (4097, 1024), "encoder.cnn.layers.0.weight": (64, 3, 3, 3)},
    ),
    Fingerprint(
        "MatchAnything-ELoFTR",
        {
            "backbone.layer0.rbr_dense.conv.weight": (64, 1, 3, 3),
            "loftr_coarse.layers.0.aggregate.weight": (256, 1, 4, 4),
            "fine_preprocess.layer1_outconv2.3.weight": (64, 128, 3, 3),
        },
    ),
    Fingerprint(
        "EfficientLoFTR in the layout of Hugging Face transformers",
        {"efficientloftr.backbone.stages.0.blocks.0.conv1.conv.weight": (64, 1, 3, 3)},
    ),
    Fingerprint(
        "LoFTR (not EfficientLoFTR)",
        {"backbone.conv1.weight": (128, 1, 7, 7), "loftr_coarse.layers.0.q_proj.weight": (256, 256)},
    ),
    Fingerprint("DeDoDe detector L", {"decoder.layers.2.out_conv.weight": (65, 128, 1, 1)}),
    Fingerprint("DeDoDe detector B", {"decoder.layers.2.out_conv.weight": (33, 64, 1, 1)}),
    Fingerprint(
        "DeDoDe descriptor G",
        {"decoder.layers.2.out_conv.weight": (288, 64, 1, 1), "decoder.layers.8.block1.0.weight": (512, 1024, 1, 1)},
    ),
    Fingerprint("DeDoDe descriptor B", {"decoder.layers.2.out_conv.weight": (288, 64, 1, 1)}),
    Fingerprint("ALIKED t16", {"desc_head.agg_weights": (16, 64, 64)}),
    Fingerprint("ALIKED n16 or n16rot", {"desc_head.agg_weights": (16, 128, 128)}),
    Fingerprint("ALIKED n32", {"desc_head.agg_weights": (32, 128, 128)}),
    *(
        Fingerprint(
            f"DINOv2 ViT-{size}/14", {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, 14, 14)}
        )
        for size, width in (("S", 384), ("B", 768), ("L", 1024), ("g", 1536))
    ),
    Fingerprint("VGG of torchvision", {"features.0.weight": (64, 3, 3, 3), "classifier.0.weight": (4096, 25088)}),
    Fingerprint("SuperPoint", {"conv1a.weight": (64, 1, 3, 3), "convDb.weight": (256, 256, 1, 1)}),
)


def guess_family(state: Mapping[str, torch.Tensor]) -> str | None:
    """The published model that these tensors belong to, or None."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    for known in FINGERPRINTS:
        if all(shapes.get(key) == shape for key, shape in known.shapes.items()):
            return known.name
    return None
