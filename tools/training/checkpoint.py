"""Checkpoints of a training run: whole or not at all, in parts small enough to be sent anywhere."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from matchanything_ros.errors import UserError

PART_BYTES = 15 << 20


def save_checkpoint(out: Path, state: dict[str, Any]) -> Path:
    """Write OUT/checkpoint-STEP/part-NN and then remove older ones; a kill at any moment leaves a whole checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    folder = out / f"checkpoint-{state['step']:08d}"
    temporary = out / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    count = -(-len(data) // PART_BYTES)
    for k in range(count):
        (temporary / f"part-{k:02d}-of-{count:02d}").write_bytes(data[k * PART_BYTES : (k + 1) * PART_BYTES])
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    for other in out.glob("checkpoint-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def load_checkpoint(out: Path) -> dict[str, Any] | None:
    """The newest checkpoint in OUT, on the CPU; None where there is none."""
    folders = sorted(out.glob("checkpoint-*"))
    if not folders:
        return None
    parts = sorted(folders[-1].glob("part-*"))
    if not parts or len(parts) != int(parts[-1].name.rpartition("-")[2]):
        raise UserError(f"{folders[-1]} lacks parts ({len(parts)} found): copy all of them, or remove the folder.")
    data = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{folders[-1]} is damaged: copy its parts again, or remove the folder to start anew."
        ) from error


def save_weights(path: Path, network: torch.nn.Module) -> None:
    """The network's weights and statistics in fp16 (what is exported), written whole or not at all."""
    state = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in network.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(state, temporary)
    os.replace(temporary, path)
