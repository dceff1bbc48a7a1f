"""Where the trials of a search are: in its output folder, or in a storage that several processes share."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.experiments.files import locked
from lightning_ssesam.experiments.search_database import Database
from lightning_ssesam.experiments.search_storage import JOURNAL, join_journal, open_storage

if TYPE_CHECKING:
    import optuna

_EXPECTED = (
    "journal:PATH, a path that ends in .log, or the URL of a database, such as postgresql://USER@HOST/NAME,"
    " mysql+pymysql://USER@HOST/NAME or sqlite:///PATH"
)
# Seconds to wait for a command that has the output folder for itself, and for others that write what they have found.
_BEGIN, _WRITE = 10.0, 600.0


class Place:
    """The place of the trials of a search.

    Args:
        output: Output folder.
        storage: Storage that processes share: ``journal:PATH``, a path that ends in ``.log``, or the URL of a database.
            Without one, the trials are in a journal in the output folder, which this command has for itself.

    Attributes:
        is_shared: Whether other processes may make trials of the same search.
        option: Option that chooses another place.
        name: Name of the place, without a password.

    Raises:
        ArgumentError: If the storage is none of these, its driver is missing, or it cannot be reached.
    """

    def __init__(self, output: Path, storage: str | None) -> None:
        self.output, self.is_shared, self._database = output, storage is not None, None
        self.name, self.option, self._journal = str(output), "output", output / JOURNAL
        if storage is None:
            return
        self.option = "storage"
        if not isinstance(storage, str) or not storage.strip():
            raise bad_argument("storage", _EXPECTED, storage)
        if (path := _path_of_journal(storage)) is not None:
            self.name, self._journal = f"journal:{path}", path
        else:
            self._database = Database(storage, _EXPECTED)
            self.name, path = self._database.name, self._database.path
            self._database.check()
        if path is not None and not (path.parent.is_dir() or path.parent.resolve() == output.resolve()):
            # A shared disk that is not mounted must not become a folder of this machine.
            raise bad_argument("storage", "a file in a folder that exists", self.name)

    @contextmanager
    def opened(self) -> Iterator["optuna.storages.BaseStorage"]:
        """Yield Optuna's storage.

        Raises:
            ArgumentError: If another command has the output folder for itself, the storage cannot be read, or it is
                lost later.
        """
        if not self.is_shared:
            with locked(self.output):
                yield open_storage(self.output)
            return
        with locked(self.output, seconds=_BEGIN):
            pass
        if self._database is not None:
            with self._database.errors_named():
                yield self._database.open()
            return
        # The journal may be that of a search that has its folder for itself.
        if (self._journal.parent / ".lock").exists():
            with locked(self._journal.parent, "`storage`", seconds=_BEGIN):
                pass
        yield join_journal(self._journal)

    def written(self) -> AbstractContextManager[None]:
        """Return a block in which no other process writes to the output folder."""
        return locked(self.output, seconds=_WRITE) if self.is_shared else nullcontext()

    def claimed(self) -> AbstractContextManager[None]:
        """Return a block in which no other process takes a trial, unless the storage itself sees to that."""
        return nullcontext() if self._database is None else self._database.claiming()


def _path_of_journal(storage: str) -> Path | None:
    """Return the path of a journal, or None if the storage is none."""
    kind, colon, path = storage.partition(":")
    if kind == "journal" and colon:
        if not path.strip("/ "):
            raise bad_argument("storage", _EXPECTED, storage)
        return Path(path.removeprefix("//")).expanduser()
    return Path(storage).expanduser() if storage.endswith(".log") and "://" not in storage else None
