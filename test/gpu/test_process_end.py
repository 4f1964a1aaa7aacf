"""However a process with an open engine ends, it ends cleanly: on a real GPU with real pycuda."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import matchanything_ros

Report = Callable[[str], None]


# How a process with an open engine ends. %s is what it does at the end.
CHILD = textwrap.dedent(
    """
    import os, signal, sys, time
    from pathlib import Path
    import numpy as np
    from gpu.stand_in import open_stand_in
    engine = open_stand_in(Path(sys.argv[1]))
    image = np.zeros((48, 64, 3), np.uint8)
    engine.run_images((image, image))
    %s
    """
)
LOOP = "print('ready', flush=True)\nwhile True: engine.run_images((image, image))"
LOST = """
from matchanything_ros.engines.cuda_errors import CudaFailure
def bad():
    kernel = engine._preprocessor._rows
    kernel.prepared_async_call((1, 1), (32, 8, 1), engine._worker.stream, 64, 8, 8, 3, 0, 64, 64, 1, 8, 64)
    engine._worker.stream.synchronize()
try:
    engine._worker.call(bad, 'writing where nothing is')
    sys.exit('no error')
except CudaFailure as failure:
    assert failure.sticky, failure
    print(failure)
engine.close()
try:
    again = open_stand_in(Path(sys.argv[1]))
    again.run_images((image, image))
    again.close()
    print('a new engine works')
except CudaFailure as failure:
    assert failure.sticky, failure
    print('a new engine:', failure)
"""


@pytest.mark.parametrize(
    ("end", "send", "codes"),
    [
        ("engine.close()", None, {0}),
        ("pass", None, {0}),
        ("sys.exit(3)", None, {3}),
        ("raise RuntimeError('on purpose')", None, {1}),
        (LOOP, signal.SIGINT, {1, 130, -signal.SIGINT}),
        (LOOP, signal.SIGTERM, {-signal.SIGTERM}),
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n" + LOOP, signal.SIGTERM, {0}),
        (LOST, None, {0}),
    ],
    ids=[
        "closed",
        "left open",
        "sys.exit",
        "exception",
        "SIGINT",
        "SIGTERM",
        "SIGTERM handled",
        "lost context",
    ],
)
def test_the_process_ends_cleanly(
    drv: Any, tmp_path: Path, report: Report, end: str, send: signal.Signals | None, codes: set[int]
) -> None:
    """No abort by pycuda about contexts that are still active, whatever ends the process."""
    folders = [str(Path(__file__).parents[1]), str(Path(matchanything_ros.__file__ or "").parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD % end, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    if send is not None:
        assert child.stdout is not None and child.stdout.readline() == "ready\n", child.communicate()[1]
        time.sleep(0.5)
        child.send_signal(send)
    out, err = child.communicate(timeout=60)
    assert child.returncode in codes, (child.returncode, err)
    assert "PyCUDA ERROR" not in err and (end == LOST or "PyCUDA WARNING" not in err), err
    report(
        f"exit status {child.returncode}" + ("; " + " ".join(out.split()) if out.strip() not in ("", "ready") else "")
    )
