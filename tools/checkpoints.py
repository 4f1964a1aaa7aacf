"""A checkpoint file, in whatever layout it was published -> a state dict that fits its network to the last key.

Understood: raw state dicts, Lightning checkpoints and other wrappers ({"state_dict": ...}, {"model": ...}), a prefix
that all keys share ("matcher.", "module.", "matcher.model.", ...), and safetensors, whatever the file is called.
Pickles are read with weights_only=True: a file that contains code is refused, not run.
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from matchanything_ros.bundle import sha256_of
from matchanything_ros.errors import UserError
from matchanything_tools.fingerprints import guess_family

State = dict[str, torch.Tensor]

WRAPPERS = ("state_dict", "model", "model_state_dict", "network", "net", "weights")
SHOWN = 4  # keys of each kind in a message
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # weights as they are stored


def read_checkpoint(path: Path) -> State:
    """Read the tensors of a checkpoint on the CPU, unwrapped, without the prefix that all of its keys share.

    Raises UserError when the file is missing, a Git LFS pointer, truncated, no checkpoint, or contains code.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the checkpoint file in it.")
    if not path.is_file():
        raise UserError(f"The checkpoint {path} does not exist: check the path.")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' where it came from.")
    if len(head) < 16:
        raise UserError(f"{path} is empty or truncated ({path.stat().st_size} bytes): download it again.")
    if head[:64].lstrip()[:1] == b"<":
        raise UserError(f"{path} is a web page, not a checkpoint: download the file itself.")
    # A zip or a pickle; a safetensors file begins with its header's length and {.
    pickled = head.startswith((b"PK", b"\x80"))
    safe = head[8:9] == b"{" or (path.suffix == ".safetensors" and not pickled)
    content = _safetensors(path) if safe else _pickled(path)
    return strip_prefixes(_unwrap(content, path))


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> State:
    """Take off what stands before the first dot of every key, as long as all keys share it: none of the networks here
    has a single part, so it is the name under which somebody kept the network."""
    state = dict(state)
    while len({key.partition(".")[0] for key in state}) == 1 and all("." in key for key in state):
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def load_strict(module: torch.nn.Module, state: Mapping[str, torch.Tensor], *, what: str, path: Path) -> None:
    """Load a state dict of which every key must be used, none missing, shapes equal and values finite.

    what: the model as the user knows it, such as "MatchAnything-ELoFTR". Raises one UserError otherwise, which lists
    (shortened) what does not fit and says which published model the file looks like.
    """
    own = module.state_dict()
    # Counters of batch norms are scalars, but some files (and PyTorch before 0.4) hold them as one-element vectors.
    state = {k: v.reshape(()) if k in own and own[k].ndim == 0 and v.numel() == 1 else v for k, v in state.items()}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        counts = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        found = "; ".join(f"{len(keys)} {kind}: {_shortened(keys)}" for kind, keys in counts if keys)
        guess = guess_family(state)
        other = guess and not set(what.split()) <= set(guess.split())  # "ALIKED n16" is in "ALIKED n16 or n16rot"
        advice = (
            f"it looks like {guess}: give the checkpoint of {what}" if other else "give the file as it was published"
        )
        raise UserError(f"{path} is not the checkpoint of {what} ({len(own)} keys): {found}. Instead, {advice}.")
    odd = [key for key in own if own[key].is_floating_point() and not _plain(state[key])]
    if odd:
        raise UserError(
            f"{path} stores {_shortened(odd)} quantised, sparse or without values ({_kind(state[odd[0]])}): give the "
            "file as it was published, in floating point."
        )
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    if bad:
        raise UserError(f"{path} has values that are not finite in {_shortened(bad)}: download it again.")
    module.load_state_dict(dict(state), strict=True)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of the file: the hash that manifests carry."""
    return sha256_of(Path(path))


def _shortened(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def _plain(value: torch.Tensor) -> bool:
    """Whether these are numbers in memory, one for each element."""
    return value.layout == torch.strided and value.dtype in NUMBERS and not value.is_meta


def _kind(value: torch.Tensor) -> str:
    words = (value.dtype, *((value.layout,) if value.layout != torch.strided else ()), *(("meta",) * value.is_meta))
    return ", ".join(str(word).removeprefix("torch.") for word in words)


def _safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole .safetensors file ({_first_line(error)}): download it again.") from error


def _pickled(path: Path) -> object:
    try:
        with warnings.catch_warnings(), path.open("rb") as file:  # by a path, torch would judge it by its name
            warnings.simplefilter("ignore")  # of what is then refused with one sentence
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise UserError(
                f"{path} contains code or objects besides tensors and is not opened ({_culprit(error)}): get a file "
                "with the state dict only, or .safetensors."
            ) from error
        raise UserError(f"{path} is not a PyTorch checkpoint, or it is truncated: download it again.") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError, struct.error) as error:
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program: give a file with the network's state dict.") from error
        raise UserError(f"{path} is truncated or not a PyTorch checkpoint: download it again.") from error


def _unwrap(content: object, path: Path) -> State:
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds no state dict ({type(content).__name__}): give the file with the network's weights."
        )
    tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if tensors and len(tensors) == len(content):
        return tensors
    for name in (*WRAPPERS, *_only_state(content)):
        inner = content.get(name)
        if isinstance(inner, Mapping):
            return _unwrap(inner, path)
    others = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if tensors:
        raise UserError(
            f"{path} holds {len(tensors)} tensors and, beside them, {_shortened(others)}: give a file of tensors only."
        )
    found = f"a dictionary of {_shortened(others)}" if others else "an empty dictionary"
    raise UserError(f"{path} holds no state dict ({found}): give the file with the network's weights.")


def _only_state(content: Mapping[object, object]) -> list[object]:
    """The key of the one dictionary of tensors in `content`, under whatever name; [] if there is none, or a choice."""
    found = [
        key
        for key, value in content.items()
        if isinstance(value, Mapping) and value and all(isinstance(entry, torch.Tensor) for entry in value.values())
    ]
    return found if len(found) == 1 else []


def _culprit(error: Exception) -> str:
    """The name that the safe unpickler refused, out of PyTorch's long message."""
    words = str(error).replace("\n", " ").split("GLOBAL ")
    return words[1].split()[0].rstrip(".") if len(words) > 1 else "a pickled object"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
