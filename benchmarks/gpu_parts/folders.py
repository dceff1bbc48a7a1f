"""Folders that are thrown away: for what the processes of a call write, and for the images."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

# File systems in memory, where they are usual. Tens of thousands of small files take minutes on some disks.
MEMORY = Path("/dev/shm")
_NAME = ".ssesam_gpu_"
# Bytes that must be free there.
_ROOM = 400 * 2**20


def make_folder(folder: Path) -> None:
    """Make a folder for results.

    Raises:
        SystemExit: If files cannot be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        expected = f"a folder that can be written to ({error.strerror})"
        raise SystemExit(f"Expected argument `--output` to be {expected}, but got {str(folder)!r}.") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder for results, and keep other calls out. The system frees the lock of a process that is killed.

    Raises:
        SystemExit: If another call has the folder, or if files cannot be written there.
    """
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        # A file system without locks has none.
        with contextlib.suppress(NotImplementedError):
            lock.acquire(timeout=0)
    except Timeout:
        ways = "Wait until it has ended, or choose another `--output`"
        raise SystemExit(f"Another call is at work in {str(folder)!r}. {ways}.") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def thrown_away(output: Path, seconds: float = 2.0) -> Iterator[tuple[Path, Path]]:
    """Make a folder for a call in ``output``, and one for its images, in memory if there is room.

    Both are removed at the end. So are those of earlier calls that were killed.

    Args:
        output: Folder for all files of the call.
        seconds: Seconds to wait for the removal, which then goes on by itself.
    """
    for place in (output, MEMORY):
        _remove([path for path in place.glob(f"{_NAME}*") if _is_left_behind(path)], 0.0)
    scratch = output / f"{_NAME}{os.getpid()}"
    images = MEMORY / scratch.name if _has_room(MEMORY) else scratch / "images"
    try:
        for folder in (scratch, images):
            folder.mkdir(parents=True, exist_ok=True)
        yield scratch, images
    finally:
        _remove([images, scratch], seconds)


def _has_room(folder: Path) -> bool:
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > _ROOM


def _is_left_behind(folder: Path) -> bool:
    pid = folder.name.rpartition("_")[2]
    return folder.stat().st_uid == os.getuid() and pid.isdecimal() and not is_alive(int(pid))


def is_alive(pid: int) -> bool:
    """Return whether a process is there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, 0)
        return True
    return False


def _remove(folders: list[Path], seconds: float) -> None:
    if folders:
        process = subprocess.Popen(["rm", "-rf", *map(str, folders)], start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
