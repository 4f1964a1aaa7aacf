"""The TensorRT engine against doubles of TensorRT and pycuda that refuse wrong calls. No GPU, no TensorRT."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_double
from pycuda_double import PycudaDouble, WrongCall, compiled_kernels
from tensorrt_double import TensorRTDouble, plan_bytes
from tensorrt_machine import Machine
from tiny_bundle import LARGEST, MATCHES, SIZE, SMALLEST, expected

from matchanything_ros.engines.cuda import CudaWorker
from matchanything_ros.engines.cuda_errors import CudaFailure, explain
from matchanything_ros.engines.parity import check_parity
from matchanything_ros.errors import UserError
from matchanything_ros.preprocess import prepare


@pytest.fixture(params=[False, True], ids=["fixed", "dynamic"])
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Machine:
    return Machine(tmp_path, dynamic=request.param)


@pytest.fixture(autouse=True)
def nothing_wrong_in_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A WrongCall in a thread or a destructor fails the test as well."""
    found: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    monkeypatch.setattr("sys.unraisablehook", found.append)
    yield
    assert found == [], [getattr(entry, "exc_value", entry) for entry in found]


def inputs_of(size: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return {name: rng.random((1, 3, *size), np.float32) for name in ("image0", "image1")}


def assert_same(outputs: dict[str, np.ndarray], inputs: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    for name, wanted in expected(inputs["image0"], inputs["image1"]).items():
        np.testing.assert_allclose(outputs[name], wanted, atol=tolerance)


def test_results_are_those_of_this_frame_and_stay(machine: Machine) -> None:
    engine = machine.open()
    first_inputs, second_inputs = inputs_of(SIZE, 1), inputs_of(SIZE, 2)
    first, second = engine.run(first_inputs), engine.run(second_inputs)
    assert_same(first, first_inputs)
    assert_same(second, second_inputs)
    engine.close()
    assert_same(second, second_inputs)  # not a view of memory that is gone


def test_everything_is_given_back_in_order(machine: Machine) -> None:
    engine = machine.open()
    engine.run(inputs_of(SIZE))
    engine.close()
    engine.close()
    assert machine.cuda.retained == 0 and machine.cuda.memory == [] and machine.cuda.page_locked == []
    assert machine.trt.alive == []
    assert machine.cuda.calls[-2:] == ["pop", "detach"]
    with pytest.raises(RuntimeError, match="closed"):
        engine.run(inputs_of(SIZE))


def test_no_allocation_per_frame_and_one_synchronisation(machine: Machine) -> None:
    engine = machine.open()
    engine.run(inputs_of(SIZE))
    machine.cuda.calls.clear()
    engine.run(inputs_of(SIZE))
    assert "mem_alloc" not in machine.cuda.calls and "pagelocked_empty" not in machine.cuda.calls
    assert machine.cuda.calls.count("synchronize") == 1 and machine.cuda.calls[-1] == "synchronize"
    engine.close()


def test_dynamic_sizes_within_the_profile_without_new_memory(tmp_path: Path) -> None:
    machine = Machine(tmp_path, dynamic=True)
    engine = machine.open()
    machine.cuda.calls.clear()
    for size in (SMALLEST, LARGEST, SIZE, (64, 48)):
        inputs = inputs_of(size)
        assert_same(engine.run(inputs), inputs)
    assert "mem_alloc" not in machine.cuda.calls
    with pytest.raises(
        UserError, match=r"takes no image0 of 112x128 \(up to 96x128\): run 'matchanything build .*--max"
    ):
        engine.run(inputs_of((112, 128)))
    assert_same(engine.run(inputs), inputs)  # a refused frame costs nothing
    engine.close()


def test_called_from_many_threads(machine: Machine) -> None:
    engine = machine.open()
    failures: list[BaseException] = []

    def use(seed: int) -> None:
        try:
            for step in range(20):
                inputs = inputs_of(SIZE, 100 * seed + step)
                assert_same(engine.run(inputs), inputs)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    closing = threading.Thread(target=engine.close)  # not the thread that opened it
    closing.start()
    closing.join()
    assert machine.cuda.retained == 0


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


def test_parity_through_the_engine(machine: Machine) -> None:
    engine = machine.open()
    result = check_parity(engine)
    assert result.passed and result.expected == MATCHES and result.found == result.real == 1.0
    engine.close()


@pytest.mark.skipif(compiled_kernels() is None, reason="no C++ compiler to run the kernels on the CPU")
class TestImages:
    def test_images_give_what_prepared_arrays_give(self, machine: Machine) -> None:
        engine = machine.open()
        assert engine.takes_images and engine.fallback is None
        rng = np.random.Generator(np.random.PCG64(5))
        for shapes in (((60, 80, 3), (33, 71)), ((200, 150), (64, 48, 3)), ((40, 40, 3), (300, 310, 3))):
            images = tuple(rng.integers(0, 256, shape, np.uint8) for shape in shapes)
            outputs, back, milliseconds = engine.run_images((images[0], images[1]))
            inputs = {}
            for spec in machine.bundle.manifest.inputs:
                inputs[spec.name], wanted = prepare(images[spec.image], machine.bundle.manifest.preprocess, spec)
                assert back[spec.name] == wanted
            assert_same(outputs, inputs, 2e-3)
            assert milliseconds > 0
        engine.close()
        assert machine.cuda.memory == [] and machine.cuda.page_locked == []

    def test_one_upload_an_image_and_no_allocation_when_sizes_stay(self, machine: Machine) -> None:
        engine = machine.open()
        image = np.zeros((60, 80, 3), np.uint8)
        engine.run_images((image, image))
        machine.cuda.calls.clear()
        engine.run_images((image, image))
        assert machine.cuda.calls.count("memcpy_htod_async") == 2 and machine.cuda.calls.count("kernel") == 4
        assert not {"mem_alloc", "pagelocked_empty", "free", "memcpy_htod"} & set(machine.cuda.calls)
        engine.close()

    def test_images_of_ever_new_sizes_do_not_fill_the_device(self, machine: Machine) -> None:
        engine = machine.open()
        counts = []
        for side in range(100, 40, -1):  # shrinking: the buffers of the images stay
            image = np.zeros((side, side, 3), np.uint8)
            engine.run_images((image, image))
            counts.append(len(machine.cuda.memory))
        assert max(counts) <= counts[0] + 64 and max(counts[30:]) == max(counts[:30])
        engine.close()

    def test_views_of_images_are_taken_as_they_are(self, machine: Machine) -> None:
        engine = machine.open()
        image = np.random.Generator(np.random.PCG64(6)).integers(0, 256, (120, 160, 3), np.uint8)
        flipped, copied = image[::-2, ::2], image[::-2, ::2].copy()
        first = engine.run_images((flipped, flipped))[0]
        second = engine.run_images((copied, copied))[0]
        np.testing.assert_array_equal(first["keypoints1"], second["keypoints1"])
        engine.close()


def test_without_kernels_the_network_still_runs(machine: Machine) -> None:
    machine.cuda.fail["module_from_buffer"] = machine.cuda.LogicError(
        "cuModuleLoadDataEx failed: unsupported PTX version"
    )
    engine = machine.open()
    assert not engine.takes_images and "unsupported PTX" in str(engine.fallback)
    inputs = inputs_of(SIZE)
    assert_same(engine.run(inputs), inputs)
    engine.close()


def test_worker_refuses_what_comes_after_its_end_and_keeps_foreign_errors() -> None:
    cuda = PycudaDouble()
    worker = CudaWorker(drv=cuda)
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0, "dividing")
    assert worker.call(lambda: worker.call(lambda: 5, "inside"), "outside") == 5  # in its own thread it just runs
    worker.close()
    with pytest.raises(RuntimeError, match="closed"):
        worker.call(lambda: 5, "late")


def test_the_double_refuses_what_it_says() -> None:
    """A double that lets everything pass proves nothing."""
    cuda = PycudaDouble()
    wrong: list[Callable[[], Any]] = [
        lambda: cuda.mem_alloc(4),
        lambda: cuda.Device(0),
        lambda: cuda.Context.pop(),
    ]
    for call in wrong:
        with pytest.raises(WrongCall):
            call()
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    memory, stream = cuda.mem_alloc(8), cuda.Stream()
    with pytest.raises(WrongCall, match="page-locked"):
        cuda.memcpy_htod_async(memory, np.zeros(8, np.uint8), stream)
    with pytest.raises(WrongCall, match="allocation of 8"):
        cuda.memcpy_htod_async(memory, cuda.pagelocked_empty((9,), np.uint8), stream)
    with pytest.raises(WrongCall, match="still pushed"):
        context.detach()
    shapes = {"image0": ((1, 3, 4, 4), (1, 3, 4, 4), (1, 3, 8, 8))}
    trt = TensorRTDouble(lambda *_: None, cuda.check)
    engine = trt.Runtime(trt.ILogger()).deserialize_cuda_engine(plan_bytes(shapes, {"out": (2,)}))
    assert engine is not None
    run = engine.create_execution_context()
    assert run is not None
    with pytest.raises(WrongCall, match="unknown tensor"):
        run.set_tensor_address("image7", 0)
    with pytest.raises(WrongCall, match="without an address"):
        run.execute_async_v3(stream.handle)
    for name in ("image0", "out"):
        run.set_tensor_address(name, int(memory))
    with pytest.raises(WrongCall, match="without a shape"):
        run.execute_async_v3(stream.handle)
    del run, engine
    cuda.Context.pop()


def test_tensorrt_double_is_like_the_real_one() -> None:
    """Every method and property of the double exists under the same name in TensorRT's own module."""
    real = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    for name, double in vars(tensorrt_double.RECORDED).items():
        members = {member for member in vars(double) if not member.startswith("_")}
        assert members <= set(dir(getattr(real, name))), name
    assert {"num_io_tensors", "device_memory_size_v2"} <= set(dir(real.ICudaEngine))
    assert real.TensorIOMode.INPUT.name == "INPUT" and real.DataType.FLOAT.name == "FLOAT"


def test_explanations_never_have_two_lines() -> None:
    error = PycudaDouble.LogicError("cuFoo failed: odd\nsecond line")
    assert "\n" not in str(explain(error, "testing")) and "odd" in str(explain(error, "testing"))
