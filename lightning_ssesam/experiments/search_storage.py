"""The journal of a search: opened, and mended after a command that was killed."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightning_ssesam.errors import ArgumentError

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
# JournalOperation.CREATE_STUDY in optuna/storages/journal/_storage.py, a private class.
_CREATE_STUDY = 0


def open_storage(folder: Path) -> "optuna.storages.BaseStorage":
    """Return Optuna's storage in a folder that this program has locked.

    A lock of Optuna's, and a last line that is not complete, are what a killed command has left. Both are removed, and
    a line says so.

    Raises:
        ArgumentError: If the journal cannot be read.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path = folder / JOURNAL
    _remove_locks(path)
    _mend(path)
    try:
        lock = JournalFileOpenLock(str(path))
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
        for name in optuna.get_all_study_names(storage):
            len(optuna.load_study(study_name=name, storage=storage).trials)
    except Exception as error:
        # Optuna raises whatever its replay meets: KeyError, TypeError, AssertionError, OSError.
        _refuse(path, f"Optuna cannot read it: {type(error).__name__}: {error}", error)
    return storage


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
