"""Contenders of `bench` in processes of their own: nothing shared, no error lost."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from telling_contenders import Dying, Telling, refuse, stumble

from matchanything_ros.bundle import Bundle, load_bundle
from matchanything_ros.errors import UserError
from matchanything_tools.bench_process import Apart

IMAGES = (np.zeros((120, 160), np.uint8),) * 2


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("aliked-n16")


def test_a_bundle_is_measured_alone(bundle: Bundle) -> None:
    apart = Apart(bundle, partial(Telling, bundle), IMAGES, warm_up=1)
    try:
        pid, torch = apart.name.split()
        assert int(pid) != os.getpid() and torch == "False"
        times = apart.measure(2)
        assert len(times) == 2 and all(row["total"] > row["network"] > 0 for row in times)
        assert apart.against_golden().passed
    finally:
        apart.close()
    assert not Path(f"/proc/{pid}").exists()


def test_errors_arrive(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="Not this one"):
        Apart(bundle, refuse, IMAGES, warm_up=1)
    with pytest.raises(RuntimeError, match="KeyError: 'a mistake'"):  # with the place where it happened
        Apart(bundle, stumble, IMAGES, warm_up=1)
    with pytest.raises(UserError, match=r"measured aliked-n16 died \(exit code 3\)"):
        Apart(bundle, partial(Dying, bundle), IMAGES, warm_up=1)
