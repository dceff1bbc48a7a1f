"""Functions that a CUDA graph replays, on a stream of their own. On a CPU they are called."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import step_cost
import torch

_WARM_UP = 3


def seconds_of(function: Callable[[], Any]) -> float:
    """Return the seconds until all work of a function is done."""
    step_cost.synchronize()
    start = time.perf_counter()
    function()
    step_cost.synchronize()
    return time.perf_counter() - start


class Captured:
    """Captures functions, and replays them on one stream with one pool of memory.

    Args:
        device: Device of the functions.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.functions: dict[Any, Callable[[], Any]] = {}
        self.pool: Any = None

    def on_stream(self) -> AbstractContextManager[Any]:
        """Return a context whose work goes to the stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def add(self, key: Any, function: Callable[[], Any]) -> None:
        """Call a function a few times, then capture it.

        What it allocates in its first calls exists before the capture, and cuDNN has chosen its kernels.
        """
        if self.stream is None:
            self.functions[key] = function
            return
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(_WARM_UP):
                function()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            function()
        self.pool = self.pool or graph.pool()
        self.functions[key] = graph.replay

    def seconds(self, key: Any, number: int) -> float:
        """Make the work of a function so many times. Return the seconds of one."""
        return seconds_of(lambda: [self.replay(key) for _ in range(number)]) / number

    def replay(self, key: Any) -> None:
        """Make the work of a function."""
        with self.on_stream():
            self.functions[key]()
