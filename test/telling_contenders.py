"""Contenders for test_bench_process.py, in a module that another process can import."""

from __future__ import annotations

import os
import sys
from typing import Any

from matchanything_ros.bundle import Bundle
from matchanything_ros.errors import UserError
from matchanything_tools.contenders import BundleContender


class Telling(BundleContender):
    """Its name tells where it runs, and whether PyTorch is loaded there."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "onnxruntime-cpu")
        self.name = f"{os.getpid()} {'torch' in sys.modules}"


class Dying(Telling):
    def run(self, inputs: Any) -> Any:
        os._exit(3)


def refuse() -> BundleContender:
    raise UserError("Not this one.")


def stumble() -> BundleContender:
    raise KeyError("a mistake")
