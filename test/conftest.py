"""What tests of several parts share and is dear to make."""

from __future__ import annotations

import pytest

from matchanything_ros.bundle import Bundle


@pytest.fixture(scope="session")
def shallow_roma(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A RoMa of every operator and little depth, fp16, with dense outputs: see roma_case."""
    torch = pytest.importorskip("torch", reason="torch makes the test's network")
    import roma_case

    from matchanything_tools.export import export

    return export(roma_case.shallow_item(torch.float16), tmp_path_factory.mktemp("shallow") / "roma.onnx")
