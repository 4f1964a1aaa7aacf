"""The command `matchanything`: finds the subcommand, imports only that, and turns errors into one sentence."""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

from matchanything_ros.errors import UserError


class Subcommand(Protocol):
    """What the module of a subcommand offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


@dataclass(frozen=True)
class Entry:
    module: str
    help: str


# Imported only when called: the offline ones (matchanything_tools) need torch, which a robot does not have.
COMMANDS = {
    "match": Entry("matchanything_ros.match_files", "match two image files"),
    "replay": Entry("matchanything_ros.replay", "match the image pairs of a recorded bag, with a report"),
    "doctor": Entry("matchanything_ros.doctor", "what this machine has, and what is missing for what"),
    "inspect": Entry("matchanything_tools.inspect", "what a checkpoint, a bundle or a plan is"),
    "export": Entry("matchanything_tools.export", "a published checkpoint -> a bundle (ONNX and manifest)"),
    "build": Entry("matchanything_tools.build", "a bundle -> a TensorRT plan for this machine"),
    "validate": Entry("matchanything_tools.validate", "compare a bundle with the network it came from"),
    "bench": Entry("matchanything_tools.bench", "speed and memory by stage, as ratios"),
    "evaluate": Entry("matchanything_tools.evaluate", "accuracy on image pairs with ground truth"),
    "train": Entry("matchanything_tools.training.loop", "train the open cross-modal matcher"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Returns 0: done, 1: failed with one sentence on stderr, 2: wrong usage, 143: terminated."""
    with _terminable():
        return _main(argv)


def _main(argv: list[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    parser = argparse.ArgumentParser(
        prog="matchanything", description="Correspondences between two images of the same place."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in words if word in COMMANDS), None)
    module: Subcommand | None = None
    try:
        for name, entry in COMMANDS.items():
            sub = commands.add_parser(name, help=entry.help, description=entry.help[0].upper() + entry.help[1:] + ".")
            if name == chosen:
                module = _load(entry)
                module.add_arguments(sub)
        args = parser.parse_args(words)
        args.debug = debug
        assert module is not None
        return module.run(args)
    except UserError as error:
        if debug:
            raise
        print(f"matchanything: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("matchanything: interrupted.", file=sys.stderr)
        return 1
    except SystemExit as stop:  # argparse: 0 after --help, 2 for wrong usage
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:  # whoever read our output has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit fails once more
        return 0
    except (OSError, MemoryError) as error:
        if debug:
            raise
        reason = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space is left on the disk: make room, or write elsewhere"
        print(f"matchanything: {reason} (use --debug to see where).", file=sys.stderr)
        return 1


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM (docker stop, systemd, timeout) end a command as Ctrl-C does: what is half-written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _load(entry: Entry) -> Subcommand:
    package = entry.module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"This needs the offline tools: pip install '.[tools]' in a clone of matchanything_ros (no {package} here)."
        )
    try:
        return cast(Subcommand, importlib.import_module(entry.module))
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("matchanything_ros", "matchanything_tools", ""):
            raise
        raise UserError(
            f"This needs {missing}: pip install '.[tools]' in a clone of matchanything_ros, on the offline machine."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
