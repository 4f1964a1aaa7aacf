"""A bundle and the checkpoints it came from -> the PyTorch network again, in any precision."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from matchanything_ros.bundle import Bundle
from matchanything_ros.errors import UserError
from matchanything_tools.checkpoints import sha256
from matchanything_tools.export import Exportable, network
from matchanything_tools.export import add_arguments as add_export_arguments


def rebuild(bundle: Bundle, weights: Sequence[Path], precision: str = "fp32") -> Exportable:
    """Build the network that `bundle` was exported from, with the flags that its manifest records.

    weights: the same checkpoint files, in any order; they are recognised by their hashes. Raises UserError when one is
    missing or another one, or when the manifest does not tell how the bundle was exported.
    """
    manifest = bundle.manifest
    files = _files(bundle, weights)
    words = shlex.split(str(manifest.exporter.get("command", "")))
    if words[:2] != ["matchanything", "export"]:
        raise UserError(f"The manifest of {bundle.onnx} does not record its export: export it again.")
    # Files of one name (det/model.pth, desc/model.pth) stand in the manifest in the order of their flags.
    words = [str(files[word].pop(0)) if files.get(word) else word for word in words[2:]]
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_export_arguments(parser)
    try:
        args, _ = parser.parse_known_args([*words, "--precision", precision, "--out", "unused.onnx"])
    except (argparse.ArgumentError, SystemExit) as error:
        raise UserError(f"{bundle.onnx} was exported by a version with other flags: export it again.") from error
    return network(args.family).exportable(args)


def _files(bundle: Bundle, weights: Sequence[Path]) -> dict[str, list[Path]]:
    """File name in the manifest -> the files given for it, in the manifest's order."""
    given = {}
    for path in weights:
        if not path.is_file():
            raise UserError(f"The checkpoint {path} does not exist: check the path.")
        given[sha256(path)] = path
    found: dict[str, list[Path]] = {}
    for entry in bundle.manifest.weights:
        if entry.sha256 not in given:
            raise UserError(
                f"{bundle.onnx.name} was exported from {entry.name} (sha256 {entry.sha256[:12]}...), which is not "
                f"among the --weights {', '.join(path.name for path in weights)}: give that file."
            )
        found.setdefault(entry.name, []).append(given[entry.sha256])
    return found
