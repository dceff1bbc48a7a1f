"""The journal of a search: opened, and mended after a command that was killed."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.errors import ArgumentError

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
# JournalOperation.CREATE_STUDY in optuna/storages/journal/_storage.py, a private class.
_CREATE_STUDY = 0
# Seconds after which a lock is one that a killed process has left. A line is written in milliseconds.
_GRACE = 30.0


def open_storage(folder: Path) -> "optuna.storages.BaseStorage":
    """Return Optuna's storage in a folder that this program has locked.

    A lock of Optuna's, and a last line that is not complete, are what a killed command has left. Both are removed, and
    a line says so.

    Raises:
        ArgumentError: If the journal cannot be read.
    """
    from optuna.storages.journal import JournalFileOpenLock

    path = folder / JOURNAL
    _remove_locks(path)
    _mend(path)
    return _read(path, JournalFileOpenLock(str(path)))


def join_journal(path: Path) -> "optuna.storages.BaseStorage":
    """Return Optuna's storage in a journal that other processes may read and write at the same time.

    Raises:
        ArgumentError: If the journal cannot be read or written.
    """
    lock = JournalLock(path)
    try:
        with _held(lock):
            _mend(path)
            # Optuna would make the file without a lock.
            path.touch()
    except OSError as error:
        raise bad_argument("storage", f"a journal that can be written ({error.strerror})", f"journal:{path}") from error
    return _read(path, lock)


def _read(path: Path, lock: object) -> "optuna.storages.BaseStorage":
    import optuna
    from optuna.storages.journal import JournalFileBackend

    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]
        for name in optuna.get_all_study_names(storage):
            len(optuna.load_study(study_name=name, storage=storage).trials)
    except Exception as error:
        # Optuna raises whatever its replay meets: KeyError, TypeError, AssertionError, OSError.
        _refuse(path, f"Optuna cannot read it: {type(error).__name__}: {error}", error)
    return storage


class JournalLock:
    """The lock of a journal that several processes write: a file that only one of them can make, also on NFS from 3 on.

    It is that of Optuna's ``JournalFileOpenLock``. What a killed process has left does not stop the others: they remove
    its lock, which Optuna 4.0 does not, and mend the line that it has not written to its end.

    Args:
        path: Path of the journal.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Path(f"{path}.lock")

    def acquire(self) -> bool:
        """Wait until no other process has the lock, and take it. Return True."""
        seen, since, pause = self._stamp(), time.monotonic(), 0.001
        while not self._take():
            now, found = time.monotonic(), self._stamp()
            if found != seen:
                seen, since = found, now
            elif found is not None and now - since > _GRACE:
                self.release()
                continue
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        try:
            if self._is_cut():
                _mend(self._path)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Let another process take the lock."""
        with suppress(FileNotFoundError):
            self._lock.unlink()

    def _take(self) -> bool:
        try:
            os.close(os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def _stamp(self) -> tuple[int, int] | None:
        """Return what tells one lock from another, or None if there is none."""
        try:
            found = self._lock.stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino

    def _is_cut(self) -> bool:
        """Return whether the last line has no end."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) == 0:
                    return False
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except FileNotFoundError:
            return False


@contextmanager
def _held(lock: JournalLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_locks(path: Path) -> None:
    # Optuna renames a lock before it removes it.
    if found := sorted(path.parent.glob(f"{path.name}.lock*")):
        for lock in found:
            lock.unlink(missing_ok=True)
        print(f"Removed {found[0]}: the command that held this lock has ended.")


def _mend(path: Path) -> None:
    """Drop the last line if it is not complete. Refuse a journal with another bad line."""
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        _refuse(path, error.strerror or str(error), error)
    wrong = [number for number, line in enumerate(lines) if _operation(line) is None]
    if wrong and wrong[0] < len(lines) - 1:
        _refuse(path, f"line {wrong[0] + 1} of {len(lines)} is damaged")
    if len(lines) > 1 and _operation(lines[0]) != _CREATE_STUDY:
        # Optuna would skip all that belongs to a study that it does not know.
        _refuse(path, "its beginning is missing")
    if wrong:
        os.truncate(path, sum(map(len, lines[:-1])))
        print(f"Dropped the last line of {path}: it was cut off while it was written.")
    elif lines and not lines[-1].endswith(b"\n"):
        # Only the end of the line is missing.
        with path.open("ab") as file:
            file.write(b"\n")


def _operation(line: bytes) -> int | None:
    """Return the number of the operation that a line of the journal holds, or None if it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    number = entry.get("op_code") if isinstance(entry, dict) else None
    return number if isinstance(number, int) else None


def _refuse(path: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    reason = " ".join(reason.split())
    raise ArgumentError(
        f"The search in {str(path)!r} cannot go on ({reason}). Put back a copy of this file, or move it away: the"
        " search then begins anew."
    ) from cause
