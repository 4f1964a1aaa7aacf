"""The TensorRT engine against doubles of TensorRT and pycuda that refuse wrong calls. No GPU, no TensorRT."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from compiled_kernels import compiled_kernels
from tensorrt_machine import Machine, assert_same, inputs_of
from tiny_bundle import LARGEST, MATCHES, SIZE, SMALLEST

from matchanything_ros.engines.parity import check_parity
from matchanything_ros.errors import UserError
from matchanything_ros.matcher import Matcher
from matchanything_ros.preprocess import prepare

pytestmark = pytest.mark.usefixtures("nothing_wrong_in_threads")


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


def test_images_are_brought_to_what_a_narrower_plan_takes(tmp_path: Path) -> None:
    """A plan for landscape images gets upright ones as well, smaller, where the bundle alone would make them larger."""
    machine = Machine(tmp_path, dynamic=True, most=SIZE)
    upright = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (80, 60, 3), np.uint8)
    with Matcher(machine.bundle, "onnxruntime-cpu") as matcher:
        engine = machine.open()
        matcher.engine, wide = engine, matcher.engine
        assert matcher.bundle.manifest.input("image0").max == LARGEST and check_parity(engine).passed
        as_float = upright.astype(np.float32) / np.float32(255)
        here, there = matcher.match(upright, upright), matcher.match(as_float, as_float)  # prepared on the GPU, the CPU
        assert len(here) == len(there) > 3
        np.testing.assert_allclose(here.keypoints1, there.keypoints1, atol=1e-2)
        engine.close()
        wide.close()


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
