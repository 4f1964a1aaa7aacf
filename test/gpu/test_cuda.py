"""The worker, copies and kernels on a real GPU with real pycuda; only the network is a stand-in (stand_in.py)."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gpu.stand_in import expected, open_stand_in

import matchanything_ros
from matchanything_ros.bundle import InputSpec, Preprocess
from matchanything_ros.engines.cuda import CudaWorker
from matchanything_ros.engines.cuda_errors import CudaFailure
from matchanything_ros.engines.gpu_preprocess import GpuPreprocessor
from matchanything_ros.preprocess import prepare

Report = Callable[[str], None]
STEP = 1.001 / 255


def current_context() -> int | None:
    """The context that is current in this thread."""
    context = ctypes.c_void_p()
    ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context))
    return context.value


def pictures(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return [rng.integers(0, 256, shape, np.uint8) for shape in shapes]


def check(engine: Any, images: list[np.ndarray]) -> None:
    outputs, _, _ = engine.run_images((images[0], images[1]))
    specs, preprocess = engine.bundle.manifest.inputs, engine.bundle.manifest.preprocess
    wanted = expected({spec.name: prepare(images[spec.image], preprocess, spec)[0] for spec in specs})
    for name, value in wanted.items():
        np.testing.assert_allclose(outputs[name], value, atol=STEP)


def free_memory() -> int:
    """Free bytes on the device."""
    worker = CudaWorker()
    try:
        return int(worker.call(lambda: worker.drv.mem_get_info()[0], "asking"))
    finally:
        worker.close()


def resident() -> float:
    """Resident host memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def test_the_context_belongs_to_the_worker_alone(drv: Any, tmp_path: Path, report: Report) -> None:
    assert current_context() is None
    engine = open_stand_in(tmp_path)
    failures: list[BaseException] = []

    def use(seed: int) -> None:
        try:
            for step in range(50):
                check(engine, pictures(seed * 100 + step, (60, 80, 3), (90, 50)))
                assert current_context() is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join()
    assert current_context() is None
    report("4 threads x 50 frames, opened here, closed elsewhere; no context in any other thread")


def test_started_and_stopped_200_times(drv: Any, tmp_path: Path, report: Report) -> None:
    images = pictures(1, (480, 640, 3), (480, 640, 3))
    for _ in range(5):  # what CUDA keeps for ever
        engine = open_stand_in(tmp_path)
        engine.run_images((images[0], images[1]))
        engine.close()
    device, host, threads, files = free_memory(), resident(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    start = time.perf_counter()
    for _ in range(200):
        engine = open_stand_in(tmp_path)
        engine.run_images((images[0], images[1]))
        engine.close()
    seconds = time.perf_counter() - start
    lost, grown = device - free_memory(), resident() - host
    report(f"200 in {seconds:.1f} s; device memory lost {lost / 2**20:.1f} MiB, host memory grown {grown:.1f} MiB")
    assert lost < 2 << 20 and grown < 20
    assert threading.active_count() == threads and len(os.listdir("/proc/self/fd")) <= files + 2


def test_ten_thousand_frames(drv: Any, tmp_path: Path, report: Report) -> None:
    engine = open_stand_in(tmp_path, dynamic=True)
    sequence = [pictures(seed, (480, 640, 3), (512, 640)) for seed in range(8)]
    for images in sequence:
        check(engine, images)
    device, host = engine._worker.call(lambda: drv.mem_get_info()[0], "asking"), resident()
    start, on_gpu = time.perf_counter(), []
    for frame in range(10_000):
        images = sequence[frame % 8]
        _, _, milliseconds = engine.run_images((images[0], images[1]))
        on_gpu.append(milliseconds)
        if frame % 500 == 0:
            check(engine, images)
    seconds = time.perf_counter() - start
    lost = device - engine._worker.call(lambda: drv.mem_get_info()[0], "asking")
    grown = resident() - host
    engine.close()
    start = time.perf_counter()
    for frame in range(100):
        for spec in engine.bundle.manifest.inputs:
            prepare(sequence[frame % 8][spec.image], engine.bundle.manifest.preprocess, spec)
    on_cpu = 10 * (time.perf_counter() - start)
    report(
        f"{seconds / 10:.3f} ms a frame in all, of these upload and kernels {np.median(on_gpu):.3f} ms (CPU path: "
        f"{on_cpu:.3f} ms); device memory lost {lost / 2**20:.1f} MiB, host memory grown {grown:.1f} MiB"
    )
    assert lost == 0 and grown < 20


def test_kernels_equal_the_cpu_within_one_step(drv: Any, report: Report) -> None:
    """Every interpolation, colour and gray, smaller and larger, padded and stretched."""
    worst, count, worst_float = 0.0, 0, 0.0
    worker = CudaWorker()
    try:
        gpu = worker.call(lambda: GpuPreprocessor(worker), "loading the kernels")
        for interpolation in ("area", "linear", "bicubic", "bicubic_antialias", "lanczos"):
            for target in ((240, 320), (480, 640), (864, 864)):
                for settings in (
                    {},
                    {"channels": "gray"},
                    {"channels": "gray", "gray": "pil_l"},
                    {"channels": "gray", "gray": "pil_l_first"},
                    {"resize": "fit"},
                    {"long_side_limit": 300},
                ):
                    if settings.get("gray") == "pil_l_first" and interpolation not in ("bicubic_antialias", "lanczos"):
                        continue
                    preprocess = Preprocess(interpolation=interpolation, **settings)  # type: ignore[arg-type]
                    spec = InputSpec("image0", 0, target, target, target)
                    for image in pictures(count, (376, 1241, 3), (1080, 1920), (97, 131, 3)):
                        wanted = prepare(image, preprocess, spec)[0]
                        given = worker.call(lambda i=image, p=preprocess, s=spec: _run(worker, gpu, i, p, s), "running")
                        off = float(np.abs(wanted - given).max())
                        worst, count = max(worst, off), count + 1
                        if "gray" not in settings:
                            worst_float = max(worst_float, off)
    finally:
        worker.close()
    report(f"{count} cases, difference at most {worst * 255:.4f}/255 (without truncation {worst_float * 255:.4f}/255)")
    assert worst <= STEP and worst_float < 1e-4


def _run(worker: CudaWorker, gpu: GpuPreprocessor, image: np.ndarray, preprocess: Preprocess, spec: InputSpec) -> Any:
    channels = 3 if preprocess.channels == "rgb" else 1
    size, _ = gpu.size(image, preprocess, spec)
    out = worker.device_memory(4 * channels * size[0] * size[1])
    worker.drv.memset_d8(out, 255, 4 * channels * size[0] * size[1])
    gpu.upload(0, image)
    gpu.fill(image, preprocess, spec, out)
    worker.stream.synchronize()
    result = np.empty((1, channels, *size), np.float32)
    worker.drv.memcpy_dtoh(result, out)
    worker.free(out)
    return result


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


def test_too_little_memory_is_a_sentence_and_not_the_end(drv: Any, tmp_path: Path, report: Report) -> None:
    engine = open_stand_in(tmp_path)
    with pytest.raises(CudaFailure, match="not enough free memory") as caught:
        engine._worker.call(lambda: engine._worker.device_memory(1 << 44), "asking for 16 TiB")
    assert not caught.value.sticky
    check(engine, pictures(1, (60, 80, 3), (90, 50)))
    engine.close()
    report(str(caught.value))


def test_onnx_runtime_on_cuda_in_the_same_process(drv: Any, tmp_path: Path, report: Report) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    weight = np.random.Generator(np.random.PCG64(1)).random((8, 3, 3, 3), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "conv",
        [helper.make_tensor_value_info("x", float32, [1, 3, 48, 64])],
        [helper.make_tensor_value_info("y", float32, [1, 8, 48, 64])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    x = np.random.Generator(np.random.PCG64(2)).random((1, 3, 48, 64), np.float32)
    wanted = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]

    def session() -> Any:
        made = ort.InferenceSession(model, providers=["CUDAExecutionProvider"])
        assert made.get_providers()[0] == "CUDAExecutionProvider"
        return made

    def compare(which: Any) -> None:
        np.testing.assert_allclose(which.run(None, {"x": x})[0], wanted, atol=5e-2)  # TF32 is on by default there

    before = session()
    compare(before)
    engine = open_stand_in(tmp_path)
    beside = session()
    stop = threading.Event()
    failures: list[BaseException] = []

    def keep_running() -> None:
        try:
            while not stop.is_set():
                compare(beside)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=keep_running)
    thread.start()
    for seed in range(200):
        check(engine, pictures(seed, (60, 80, 3), (90, 50)))
    stop.set()
    thread.join()
    engine.close()
    for which in (before, beside, session()):
        compare(which)  # closing the engine took nothing away
    engine = open_stand_in(tmp_path)
    check(engine, pictures(1, (60, 80, 3), (90, 50)))
    engine.close()
    assert failures == []
    report(f"onnxruntime {ort.__version__} before, beside and after the engine, all results right")
