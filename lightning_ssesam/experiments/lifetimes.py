"""Processes that end with the one that started them, and signals that end a command in order."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

# Waits until the worker (its parent process) or the worker's parent is gone. The standard input is a pipe that only
# the latter holds open. Then it kills its process group: the worker, all that the worker has started, and itself.
_GUARD = """
import os, select, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
while os.getppid() == int(sys.argv[1]) and not select.select([0], [], [], 1)[0]:
    pass
os.killpg(0, signal.SIGKILL)
"""

# From Linux's sys/prctl.h.
_PR_SET_PDEATHSIG = 1

_forks_are_bound = False


class Terminated(SystemExit):
    """A signal ends the program. Its exit status is 128 plus the number of the signal, as in a shell.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def interruption(error: BaseException) -> BaseException:
    """Return what ends the program after an interrupt, with the exit status of the signal that was its cause."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    if isinstance(error, SIGTERMException):
        return Terminated(signal.SIGTERM)
    # Lightning turns a KeyboardInterrupt into a SystemExit.
    return error if isinstance(error, Terminated) else KeyboardInterrupt()


def end_with_parent(lifeline: int | None = None) -> None:
    """Make this process of a pool, and all that it starts, end with the process that started it.

    It becomes the leader of a process group. A second process, the guard, waits for the end of the parent and kills the
    group. A thread in this process could not do so, because a call into C++ may keep Python's lock for hours. On Linux
    the system kills this process and its forks, too, which works if the guard was killed.

    Args:
        lifeline: Descriptor of a pipe of which only the parent has the other end. By default it is that by which
            ``multiprocessing`` knows the parent.
    """
    # Ctrl-C reaches every process of a terminal. The first process handles it, and the others ignore it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    lifeline = parent.sentinel if lifeline is None and parent is not None else lifeline
    if os.name == "posix" and lifeline is not None:
        os.setpgid(0, 0)
        command = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid())]
        end_with_parent.guard = subprocess.Popen(  # type: ignore[attr-defined]
            command, stdin=lifeline, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _bind_to_parent()


@contextmanager
def bound_processes(number: int, begin: Callable[..., None], *args: Any) -> Iterator[Executor]:
    """Yield a pool of processes that end with this one. They are killed if an exception is raised.

    Args:
        number: Number of processes.
        begin: Function that each process calls first.
        *args: Arguments of this function.
    """
    from loky import ProcessPoolExecutor

    lifeline, held = multiprocessing.get_context("spawn").Pipe(duplex=False)
    with lifeline, held:
        executor: Executor = ProcessPoolExecutor(number, initializer=_begin_bound, initargs=(lifeline, begin, *args))
        try:
            yield executor
        except BaseException:
            executor.shutdown(kill_workers=True)  # type: ignore[call-arg]
            raise
        executor.shutdown()


def _begin_bound(lifeline: Connection, begin: Callable[..., None], *args: Any) -> None:
    end_with_parent(lifeline.fileno())
    begin(*args)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Raise :class:`Terminated` at SIGTERM and SIGHUP, and bind the processes that are forked to this one.

    A signal that was ignored (``nohup``) or handled before stays so.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names if signal.getsignal(getattr(signal, name)) == signal.SIG_DFL]
    # Python allows handlers of signals in its first thread alone.
    numbers = numbers if threading.current_thread() is threading.main_thread() else []
    for number in numbers:
        signal.signal(number, _terminate)
    try:
        with bound_forks():
            yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    # A second signal must not cut off what the first has begun.
    signal.signal(number, signal.SIG_IGN)
    raise Terminated(number)


@contextmanager
def bound_forks() -> Iterator[None]:
    """Let Linux kill processes that are forked meanwhile, such as a loader's, when this one ends by any signal."""
    global _forks_are_bound
    _register_fork_hook()
    before, _forks_are_bound = _forks_are_bound, True
    try:
        yield
    finally:
        _forks_are_bound = before


def _bind_to_parent() -> None:
    """Let Linux kill this process when the one that started it ends, and so on for what it forks from now on.

    The system looks at the thread that started it. That of a pool waits for the pool.
    """
    global _forks_are_bound
    _register_fork_hook()
    _forks_are_bound = True
    if (prctl := _prctl()) is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@cache
def _prctl() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    import ctypes

    function: Callable[..., int] = ctypes.CDLL(None).prctl
    return function


@cache
def _register_fork_hook() -> None:
    if (prctl := _prctl()) is None:
        return

    def bind() -> None:
        if _forks_are_bound:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) == _terminate:
                    signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=bind)
