"""The two checkpoints of RoMa, in every layout they were published in, into a network."""

from __future__ import annotations

from pathlib import Path

import torch

from matchanything_ros.errors import UserError
from matchanything_tools.checkpoints import State, load_strict, read_checkpoint, strip_prefixes
from matchanything_tools.networks.dinov2 import read_dinov2
from matchanything_tools.networks.roma.network import Roma

WHAT, WHAT_DINOV2 = "MatchAnything-RoMa", "DINOv2 ViT-L/14"


def load(weights: Path, dinov2: Path, finest: int = 1) -> Roma:
    """RoMa in eval mode. finest: see Roma. Raises UserError unless every parameter is there, and no other."""
    with torch.device("meta"):  # random initialisation of 420 million parameters takes longer than reading them
        network = Roma(finest)
    network.to_empty(device="cpu").eval()
    load_strict(network.published, read_roma(weights), what=WHAT, path=weights)
    load_strict(network.dinov2, read_dinov2(dinov2), what=WHAT_DINOV2, path=dinov2)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def read_roma(path: Path) -> State:
    """State dict of MatchAnything-RoMa, RoMa outdoor or indoor, GIM-RoMa or MINIMA-RoMa."""
    state = read_checkpoint(path)
    if any(key.startswith("teacher.") for key in state):  # GIM keeps the network that taught it beside its own
        state = strip_prefixes({key: value for key, value in state.items() if not key.startswith("teacher.")})
    if other := _other_roma(state):
        raise UserError(f"{path} is {other}, another architecture: give the checkpoint of {WHAT} (603 tensors).")
    return state


def _other_roma(state: State) -> str | None:
    first = {key.split(".")[0] for key in state}
    if {"coarse_matcher", "fine_matcher"} <= first:
        return "tiny RoMa"
    if {"refiners", "refiner_features"} <= first:
        return "RoMa v2"
    return None
