"""Errors of CUDA as sentences: what happened, whether the context is lost, what to do."""

from __future__ import annotations

import re

from matchanything_ros.errors import UserError

# Errors after which every call in the context fails, however harmless.
_STICKY = re.compile(
    r"illegal (memory access|address|instruction)|misaligned address|invalid address space|invalid (program counter|pc)"
    r"|hardware stack|unspecified launch failure|launch (failed|timed? ?out|timeout)|device-side assert|ECC"
    r"|mapping of buffer object failed|unknown error|contained|MPS",
    re.I,
)
_LOST = re.compile(
    r"no device|invalid device|system not ready|device (is )?(lost|unavailable)|not permitted|NVLink", re.I
)


class CudaFailure(UserError):
    """CUDA failed. sticky: CUDA answers no call of this process any more; only a new process can use it.

    (So says NVIDIA's documentation of these errors; releasing the primary context and retaining it again was tried.)
    """

    def __init__(self, message: str, sticky: bool = False) -> None:
        super().__init__(message)
        self.sticky = sticky


def explain(error: Exception, doing: str) -> CudaFailure:
    """An exception of pycuda as a sentence: what happened while `doing`, and what to do."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if type(error).__name__ == "MemoryError" or "out of memory" in text.lower():
        return CudaFailure(
            f"The GPU has not enough free memory while {doing}: close other programs that use it, "
            "or build a plan with a smaller --max."
        )
    if _STICKY.search(text):
        return CudaFailure(
            f"The GPU failed while {doing} ({text}), and CUDA cannot be used in this process any more: "
            "start the program again, or go on with the backend onnxruntime-cpu.",
            sticky=True,
        )
    if _LOST.search(text):
        return CudaFailure(
            f"The GPU does not answer while {doing} ({text}): check it with nvidia-smi or tegrastats, "
            "then start the program again.",
            sticky=True,
        )
    return CudaFailure(
        f"CUDA failed while {doing} ({text}): if it stays, configure the node again, or start the program again."
    )


def is_cuda_error(error: BaseException) -> bool:
    """Whether pycuda raised this. Its exceptions have names of their own, MemoryError and RuntimeError among them."""
    return type(error).__module__.startswith("pycuda")
