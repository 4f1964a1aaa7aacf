"""python -m matchanything_tools.training CONFIG ...: as `matchanything train`, for torchrun."""

from __future__ import annotations

import argparse

from matchanything_tools.training import loop

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=loop.__doc__)
    loop.add_arguments(parser)
    raise SystemExit(loop.run(parser.parse_args()))
