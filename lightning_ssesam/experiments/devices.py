"""Which GPU a training takes, where several trainings share a machine."""

import getpass
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from filelock import FileLock, Timeout


@contextmanager
def free_gpu() -> Iterator[int | None]:
    """Hold a GPU that no other training of this user holds until the block ends; the least shared one if all are held.

    Yields its number, or None if there is no GPU. The system frees what a killed process held.
    """
    if not (gpus := torch.cuda.device_count()):
        yield None
        return
    folder = Path(tempfile.gettempdir(), f"lightning-ssesam-{getpass.getuser()}")
    folder.mkdir(exist_ok=True)
    for place in count():
        for gpu in range(gpus):
            lock = FileLock(folder / f"gpu-{_name_of(gpu)}-{place}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield gpu
                return
            finally:
                lock.release()


def _name_of(gpu: int) -> str:
    """Return the name of a GPU on this machine, whatever this process sees of the others."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[gpu].strip() if gpu < len(visible) else ""
    return "".join(filter(str.isalnum, name)) or str(gpu)
