"""Output folders and files that are written whole or not at all."""

import errno
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.parser_messages import cut

_UNFINISHED = ".unfinished-"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def make_folder(folder: Path) -> None:
    """Make a folder for the output, or raise ``ArgumentError``, also if no file can be written there."""
    if folder.resolve() == folder.resolve().parent:
        raise bad_argument("output", "a folder in another one", str(folder))
    what = "made"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        what = "written to"
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise bad_argument("output", f"a folder that can be {what} ({error.strerror})", cut(str(folder))) from error


@contextmanager
def locked(folder: Path, option: str = "`output`", beside: bool = False, seconds: float = 0.0) -> Iterator[None]:
    """Keep other commands out of an output folder that exists, and remove what a killed one was writing there.

    The operating system frees the lock when this program ends, whatever ends it.

    Args:
        folder: Output folder.
        option: Option that chooses another folder, for the error.
        beside: Place of the lock: beside the folder instead of in it.
        seconds: Time to wait for another command that has the folder.

    Raises:
        ArgumentError: If another command has the folder.
    """
    place = f"{folder.parent / f'.{folder.name}'}" if beside else f"{folder}{os.sep}"
    owner = Path(f"{place}.owner")

    def refusal() -> str:
        who = f" ({owner.read_text(encoding='utf-8')})" if owner.is_file() else ""
        return (
            f"Another command is at work in {str(folder)!r}{who}. Wait until it has ended, or choose another {option}."
        )

    with held(f"{place}.lock", seconds, refusal):
        owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        remove_unfinished(folder)
        yield
        owner.unlink(missing_ok=True)


@contextmanager
def held(path: str, seconds: float, refusal: Callable[[], str]) -> Iterator[None]:
    """Hold the lock of a file until the block ends. A file system without locks has none, and a line says so.

    Args:
        path: Path of the file.
        seconds: Time to wait for another program that holds it.
        refusal: Text of the error if the other program holds it longer.

    Raises:
        ArgumentError: If another program holds the lock.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise ArgumentError(refusal()) from None
    except (NotImplementedError, OSError) as error:
        # filelock raises NotImplementedError for ENOSYS. Others, such as a lock of another user, are real errors.
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        folder = os.path.dirname(path)
        print(f"The file system of {folder!r} has no locks. Run one command at a time there.", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def remove_unfinished(folder: Path) -> None:
    """Remove the files that a killed command was writing in a folder, which it has locked."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside ``path``. It takes the place of ``path`` if the block ends without an error.

    The new file has a name of its own, so that two programs can write the same file, and the suffix of ``path``. An
    ``OSError`` that names no file, such as that of a full disk, gets the name of ``path``.
    """
    descriptor, name = tempfile.mkstemp(prefix=f"{_UNFINISHED}{path.stem[:50]}-", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    try:
        # A file of `mkstemp` is for its owner alone.
        os.chmod(name, 0o666 & ~_umask())
        yield Path(name)
        os.replace(name, path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, name):
            error.filename = str(path)
        raise
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def set_aside(path: Path) -> Path | None:
    """Rename a file, if there is one, to a name of the folder ``earlier`` beside it that no file has.

    Return its new path, or None if there is no file.
    """
    if not path.exists():
        return None
    folder = path.parent / "earlier"
    folder.mkdir(exist_ok=True)
    names = (folder / f"{path.stem}-{number}{path.suffix}" for number in count(1))
    return path.rename(next(name for name in names if not name.exists()))


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8: all of it, or nothing if the program ends before."""
    with replaced(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
