"""A contender of `bench` in a process of its own, as a robot would run it.

Measured on an H200: a second session of ONNX Runtime, or PyTorch, in the same process slows every kernel of a CUDA
graph by 0.35 us (Kestrel 2.00 -> 2.15 ms), and PyTorch loads NVIDIA's libraries before TF32 can be forbidden to them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any, cast

from matchanything_ros.bundle import Bundle
from matchanything_ros.engines.parity import Parity, check_run
from matchanything_ros.errors import UserError
from matchanything_ros.preprocess import Image
from matchanything_tools import machine
from matchanything_tools.contenders import Opener, Times, measure

Memory = dict[str, float | None]


class Apart:
    """A contender that was opened and warmed up in a process of its own, and waits there for its turns.

    name: the contender's; memory: the MiB that opening took at its peak on the host, and that it holds on the device.
    Raises UserError where opening does, and whenever the process has died.
    """

    def __init__(self, bundle: Bundle, opener: Opener, images: tuple[Image, Image], warm_up: int) -> None:
        self.bundle = bundle
        self.name = bundle.onnx.stem
        spawn = multiprocessing.get_context("spawn")  # a fork would share the parent's libraries
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, opener, images, warm_up))
        self._process.start()
        theirs.close()
        try:
            self.name, self.memory = cast(tuple[str, Memory], self._answer())
        except BaseException:
            self.close()
            raise

    def measure(self, runs: int) -> list[Times]:
        """Milliseconds by stage of so many pairs, one after the other."""
        return cast(list[Times], self._ask(runs))

    def against_golden(self) -> Parity:
        """The comparison with the golden result. (To be asked last: another image size may take memory.)"""
        return cast(Parity, self._ask("golden"))

    def close(self) -> None:
        self._connection.close()  # serve ends at the end of the pipe
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, request: int | str) -> Any:
        with contextlib.suppress(OSError):  # it died: the answer says so
            self._connection.send(request)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise UserError(
                f"The process that measured {self.name} died (exit code {self._process.exitcode}): out of memory?"
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def serve(connection: Connection, opener: Opener, images: tuple[Image, Image], warm_up: int) -> None:
    """The process: open, warm up, then answer until the other end of the pipe is closed. Errors are answers, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    try:
        before, host = machine.device_memory_used(), machine.HostMemory()
        with contextlib.closing(opener()) as contender:
            for _ in range(warm_up):
                measure(contender, *images)
            after = machine.device_memory_used()
            device = None if before is None or after is None else (after - before) / 2**20
            connection.send((contender.name, {"device_mib": device, "host_peak_mib": host.peak() / 2**20}))
            while True:
                request = connection.recv()
                if request == "golden":
                    connection.send(check_run(contender.bundle, lambda inputs: contender.run(inputs)[0]))
                else:
                    connection.send([measure(contender, *images) for _ in range(request)])
    except EOFError:
        pass
    except UserError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))
