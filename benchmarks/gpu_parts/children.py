"""Processes that write to files, have time limits, and end when their parent does."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

PR_SET_PDEATHSIG = 1


class Child:
    """A process in a session of its own, whose output goes to a file.

    Args:
        command: Program and arguments.
        log: File for the output, which is appended.
        folder: Working directory.
        env: Environment.
    """

    def __init__(self, command: Sequence[str], log: Path, folder: Path, env: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            # A session is a group of processes, so that `kill` reaches those that the child has started, too.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=env,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def kill(self) -> None:
        """End the process and its group, also if it has ended. Lightning catches SIGTERM, so it takes SIGKILL."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Children:
    """Starts processes. Those that are left end with the ``with`` block, and at SIGTERM, SIGINT or SIGHUP.

    Args:
        logs: Folder of the files that the outputs go to.
        folder: Working directory.
        env: Environment.
    """

    def __init__(self, logs: Path, folder: Path, env: Mapping[str, str]) -> None:
        self.logs, self.folder, self.env = logs, folder, env
        self.all: list[Child] = []

    def start(self, name: str, command: Sequence[str]) -> Child:
        """Start a process whose output goes to ``name.txt``."""
        child = Child(command, self.logs / f"{name}.txt", self.folder, self.env)
        self.all.append(child)
        return child

    def run(self, name: str, command: Sequence[str], until: float) -> tuple[int | None, str]:
        """Run a process to its end, or to a time.

        Returns:
            Its exit status, None if it was ended; and what became of it, in words.
        """
        start, child, status = time.time(), self.start(name, command), None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = child.process.wait(max(0.0, until - start))
        child.kill()
        end = "ended at its time limit" if status is None else "done" if status == 0 else f"failed (status {status})"
        return status, f"{end} after {time.time() - start:.0f} s"

    def __enter__(self) -> "Children":
        self._handlers = {n: signal.signal(n, _leave) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        for child in self.all:
            child.kill()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
