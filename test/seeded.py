"""Seeded random checkpoints with the keys and shapes of the published ones: what tests use in their place.

Every tensor has its own generator, PCG64 seeded with sha256("SEED:KEY"): a checkpoint depends on its key list
(data/keys) and the seed, and on nothing else. Scales are such that activations stay finite and informative through the
whole depth. The golden results in data/golden were computed by the original code from the checkpoints of seed 0.

    python test/seeded.py eloftr --out eloftr.ckpt
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
KEYS = Path(__file__).parent / "data" / "keys"

# target -> published as a Lightning checkpoint {"state_dict": ...}? The others are raw dictionaries.
TARGETS = {
    "roma": True,
    "eloftr": True,
    "dinov2": False,
    "dedode_detector_L": False,
    "dedode_detector_B": False,
    "dedode_descriptor_B": False,
    "dedode_descriptor_G": False,
    "aliked-t16": False,
    "aliked-n16": False,
    "aliked-n16rot": False,
    "aliked-n32": False,
}
# digest() of seed 0, where a golden result depends on it.
DIGESTS = {
    "roma": "004eb38e2cff7f5ce064eec56f1911b662e744427ac6ddb782eaf5249366cade",
    "dinov2": "22a48ba8d0a83eff2f4c35b0f1e7fa5d032dd6638c545fb9726143a6bb7e18b0",
    "eloftr": "5e34b28f27a9d5a2a717c1b99194cf4e6ddd2258058b2c0d38093a0bf7dab5bc",
    "dedode_detector_L": "a8d8ed8d4806674d748a0533a55abb363bc5b956e0c573b35efe8db514fa4b9c",
    "dedode_descriptor_B": "4dd61d6d996409ca15c985e82a71f04a57596490085b704953f3dd03801ee82f",
    "dedode_descriptor_G": "33871e9dc62d0c53c178c915e2dedf413463d3425ef89fc56c009bee7f752624",
}

# Weight std = gain / sqrt(fan_in); the first match wins, everything else gets sqrt(2) (He).
GAINS = (
    (r"rbr_dense\.conv\.weight$", 0.96),  # RepVGG: three branches are summed
    (r"rbr_1x1\.conv\.weight$", 0.68),
    (r"layer1_outconv2\.3\.weight$", 2.1),
    (r"([qkv]_proj|merge|aggregate)\.weight$", 1.0),
    (r"(cnn|encoder|vgg)\.layers\.\d+\.weight$", 1.7),  # VGG-19: zero-sum filters lose scale
    (r"qkv\.weight$", 1.5),  # attention that does select
    (r"attn\.proj\.weight$|offset_conv", 0.5),
    (r"embedding_decoder\.to_out\.weight$", 0.5),  # anchor logits: std about 1 over 4096 classes
    (r"gps\.16\.pos_conv\.weight$", 0.7),  # then times 8 pi inside a cosine
    (r"conv_refiner\.16\.out_conv\.weight$", 0.7),
    (r"conv_refiner\.(2|1)\.out_conv\.weight$", 3.0),
    (r"(mlp\.fc2|block1\.0|hidden_blocks\.\d+\.0|out_conv|proj\.\d+\.0|agg_weights)(\.weight)?$", 1.0),
)
# Mean of the norms' scales and of LayerScale; everything else gets 1.
SCALES = (
    (r"rbr_identity\.weight$", 0.78),
    (r"loftr_coarse\..*norm2\.weight$", 0.25),  # damps the residual messages
    (r"ls[12]\.gamma$", 0.2),
)
# Plain N(0, scale), by the end of the key.
OFFSETS = {"running_mean": 0.1, "pos_embed": 0.3, "cls_token": 0.02, "mask_token": 0.02, "bias": 0.05}


def tensor(key: str, shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """One tensor of the checkpoint."""
    if dtype == "int64":  # num_batches_tracked
        return np.zeros(shape, np.int64)
    entropy = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(entropy, "little")))
    if key.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    noise = rng.standard_normal(shape, dtype=np.float32)
    for suffix, scale in OFFSETS.items():
        if key.endswith(suffix):
            return (scale * noise).astype(np.float32)
    if len(shape) == 1:
        return (_first(SCALES, key, 1.0) * (1.0 + 0.1 * noise)).astype(np.float32)
    fan_in = math.prod(shape[:2] if key.endswith("agg_weights") else shape[1:])  # agg_weights: [positions, in, out]
    if shape[1] >= 16 or "patch_embed" in key:  # zero-sum filters: what all positions share does not build up
        axes = tuple(range(1, len(shape)))  # mean in float64: the same bits on every machine
        noise -= noise.mean(axis=axes, dtype=np.float64, keepdims=True).astype(np.float32)
    return (_first(GAINS, key, math.sqrt(2.0)) / math.sqrt(fan_in) * noise).astype(np.float32)


def weights(target: str, seed: int = 0) -> dict[str, Array]:
    """The checkpoint of a target of TARGETS as arrays, by the published keys."""
    entries: dict[str, tuple[list[int], str]] = json.loads((KEYS / f"{target}.json").read_text())
    arrays = {key: tensor(key, tuple(shape), dtype, seed) for key, (shape, dtype) in entries.items()}
    if seed == 0 and target in DIGESTS:
        assert digest(arrays) == DIGESTS[target], f"{target}: not the checkpoint that the golden results came from"
    return arrays


def digest(arrays: dict[str, Array]) -> str:
    """sha256 over names and bytes, in key order: proves that two machines drew the same checkpoint."""
    sha = hashlib.sha256()
    for key in sorted(arrays):
        sha.update(key.encode() + np.ascontiguousarray(arrays[key]).tobytes())
    return sha.hexdigest()


def save(target: str, out: Path, seed: int = 0) -> Path:
    """Write the checkpoint in the layout in which the original is published; returns `out`."""
    import torch

    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in weights(target, seed).items()}
    torch.save({"state_dict": tensors} if TARGETS[target] else tensors, out)
    return out


@functools.cache
def state(target: str, seed: int = 0) -> dict[str, object]:
    """The checkpoint as a dictionary of tensors, prefixes taken off, kept for the next test: do not write to it."""
    import torch

    from matchanything_tools.checkpoints import strip_prefixes

    return dict(strip_prefixes({key: torch.from_numpy(np.array(v)) for key, v in weights(target, seed).items()}))


def _first(table: tuple[tuple[str, float], ...], key: str, default: float) -> float:
    return next((value for pattern, value in table if re.search(pattern, key)), default)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    save(args.target, args.out, args.seed)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
