"""What fails in CUDA or TensorRT is one sentence, and leaves nothing behind: with doubles. No GPU, no TensorRT."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pycuda_double import PycudaDouble
from tensorrt_double import plan_bytes
from tensorrt_machine import Machine, assert_same, inputs_of
from tiny_bundle import MATCHES, SIZE

from matchanything_ros.engines.cuda import CudaWorker
from matchanything_ros.engines.cuda_errors import CudaFailure, explain
from matchanything_ros.errors import UserError

pytestmark = pytest.mark.usefixtures("nothing_wrong_in_threads")


def test_a_passing_error_is_a_sentence_and_the_next_frame_works(machine: Machine) -> None:
    engine = machine.open()
    machine.cuda.fail["synchronize"] = machine.cuda.LogicError("cuStreamSynchronize failed: invalid argument")
    with pytest.raises(CudaFailure, match="if it stays, configure the node again") as caught:
        engine.run(inputs_of(SIZE))
    assert not caught.value.sticky
    inputs = inputs_of(SIZE)
    assert_same(engine.run(inputs), inputs)
    engine.close()
    assert machine.cuda.retained == 0 and machine.cuda.memory == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            "cuStreamSynchronize failed: an illegal memory access was encountered",
            "cannot be used in this process any more",
        ),
        ("cuStreamSynchronize failed: unspecified launch failure", "cannot be used in this process any more"),
        ("cuStreamSynchronize failed: no device", "does not answer"),
    ],
)
def test_a_lost_context_is_a_sentence_each_time_and_is_left(tmp_path: Path, error: str, sentence: str) -> None:
    machine = Machine(tmp_path)
    engine = machine.open()
    machine.cuda.lost = machine.cuda.LogicError(error)
    with pytest.raises(CudaFailure, match=sentence + ".*start the program again") as caught:
        engine.run(inputs_of(SIZE))
    assert caught.value.sticky and "\n" not in str(caught.value)
    machine.cuda.calls.clear()
    with pytest.raises(CudaFailure, match=sentence):
        engine.run(inputs_of(SIZE))
    assert machine.cuda.calls == [], "nothing is tried any more"
    inputs = inputs_of(SIZE)
    image = weakref.ref(inputs["image0"])
    with suppress(CudaFailure):
        engine.run(inputs)
    del inputs
    gc.collect()
    assert image() is None, "what failed keeps no images"
    engine.close()
    assert machine.cuda.retained == 0 and machine.cuda.calls[-2:] == ["pop", "detach"]
    with pytest.raises(CudaFailure, match=sentence):
        machine.open()
    assert machine.cuda.retained == 0


@pytest.mark.parametrize(
    "failing", ["init", "retain_primary_context", "push", "Stream", "mem_alloc", "pagelocked_empty"]
)
def test_out_of_memory_while_opening_leaves_nothing(tmp_path: Path, failing: str) -> None:
    machine = Machine(tmp_path)
    machine.cuda.fail[failing] = machine.cuda.MemoryError(f"{failing} failed: out of memory")
    with pytest.raises(CudaFailure, match="not enough free memory"):
        machine.open()
    assert machine.cuda.retained == 0 and machine.cuda.memory == [] and machine.trt.alive == []
    machine.open().close()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("deserialize_cuda_engine", r"cannot load tiny.gpu.plan \(the reason\): run 'matchanything build"),
        ("create_execution_context", r"no room to run tiny.gpu.plan \(the reason\): close other programs"),
    ],
)
def test_a_plan_that_cannot_be_opened_is_one_sentence(tmp_path: Path, call: str, sentence: str) -> None:
    machine = Machine(tmp_path)
    machine.trt.fail[call] = "the reason\nand its details"
    with pytest.raises(UserError, match=sentence):
        machine.open()
    assert machine.cuda.retained == 0 and machine.trt.alive == []


def test_a_refused_execution_is_one_sentence_and_the_next_works(machine: Machine) -> None:
    engine = machine.open()
    machine.trt.fail["execute_async_v3"] = "the reason"
    with pytest.raises(UserError, match=r"refuses to run tiny.gpu.plan \(the reason\)"):
        engine.run(inputs_of(SIZE))
    inputs = inputs_of(SIZE)
    assert_same(engine.run(inputs), inputs)
    engine.close()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "HALF"}, "not float32"),
        ({"outputs": {"keypoints0": (MATCHES, 2)}}, "other inputs or outputs"),
        ({"outputs": {"keypoints0": (-1, 2), "keypoints1": (3, 2), "scores": (3,)}}, ""),
    ],
)
def test_a_plan_of_another_network_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    machine = Machine(tmp_path)
    shapes = ((1, 3, *SIZE),) * 3
    outputs = {"keypoints0": (MATCHES, 2), "keypoints1": (MATCHES, 2), "scores": (MATCHES,)}
    content = {"inputs": {"image0": shapes, "image1": shapes}, "outputs": outputs, **change}
    machine.plan.write_bytes(plan_bytes(**content))
    if not sentence:  # a side of image0, thus bounded
        machine.open().close()
        return
    with pytest.raises(UserError, match=sentence):
        machine.open()
    assert machine.cuda.retained == 0


def test_worker_refuses_what_comes_after_its_end_and_keeps_foreign_errors() -> None:
    cuda = PycudaDouble()
    worker = CudaWorker(drv=cuda)
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0, "dividing")
    assert worker.call(lambda: worker.call(lambda: 5, "inside"), "outside") == 5  # in its own thread it just runs
    worker.close()
    with pytest.raises(RuntimeError, match="closed"):
        worker.call(lambda: 5, "late")


def test_explanations_never_have_two_lines() -> None:
    error = PycudaDouble.LogicError("cuFoo failed: odd\nsecond line")
    assert "\n" not in str(explain(error, "testing")) and "odd" in str(explain(error, "testing"))
