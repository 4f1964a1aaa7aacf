"""Argument types that several subcommands share. It imports nothing: `build` runs on robots."""

from __future__ import annotations

import argparse


def parse_size(text: str) -> tuple[int, int]:
    """Read HEIGHTxWIDTH, such as 480x640, as (height, width)."""
    try:
        height, width = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, such as 480x640") from None
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' has a side below 1")
    return height, width
