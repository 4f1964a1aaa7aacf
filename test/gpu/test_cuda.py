"""The worker, copies and kernels on a real GPU with real pycuda; only the network is a stand-in (stand_in.py)."""

from __future__ import annotations

import ctypes
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu.stand_in import STEP, check, open_stand_in, pictures

from matchanything_ros.bundle import InputSpec, Preprocess
from matchanything_ros.engines.cuda import CudaWorker
from matchanything_ros.engines.cuda_errors import CudaFailure
from matchanything_ros.engines.gpu_preprocess import GpuPreprocessor
from matchanything_ros.preprocess import prepare

Report = Callable[[str], None]


def current_context() -> int | None:
    """The context that is current in this thread."""
    context = ctypes.c_void_p()
    ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context))
    return context.value


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


def test_too_little_memory_is_a_sentence_and_not_the_end(drv: Any, tmp_path: Path, report: Report) -> None:
    engine = open_stand_in(tmp_path)
    with pytest.raises(CudaFailure, match="not enough free memory") as caught:
        engine._worker.call(lambda: engine._worker.device_memory(1 << 44), "asking for 16 TiB")
    assert not caught.value.sticky
    check(engine, pictures(1, (60, 80, 3), (90, 50)))
    engine.close()
    report(str(caught.value))
