"""A database that holds a search: its address, whose password nobody is shown, and what can be wrong with it."""

import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.files import held

if TYPE_CHECKING:
    import optuna
    from sqlalchemy.engine import URL

# For addresses that name no driver: the modules that will do, by SQLAlchemy's names for them.
_DRIVERS = {
    "postgresql": {"psycopg": "psycopg", "psycopg2": "psycopg2"},
    "mysql": {"pymysql": "pymysql", "mysqldb": "MySQLdb"},
}
# What to install for a module that is missing, if it has another name.
_PACKAGES = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
# Seconds to wait for an answer, and for others that write an SQLite file or claim a trial in it.
_ANSWER, _TURN = 10, 60
_ATTEMPTS = 5


class Database:
    """A database by its URL, as SQLAlchemy reads it. PostgreSQL and MySQL may be named without a driver.

    Args:
        text: URL of the database.
        expected: What the argument ``storage`` must be, for errors.

    Attributes:
        name: URL without the password and without options.
        path: Path of the file of an SQLite database, else None.

    Raises:
        ArgumentError: If the URL is none, its driver is missing, or it is a database in memory.
    """

    def __init__(self, text: str, expected: str) -> None:
        import sqlalchemy.exc

        self._secrets = _secrets_of(text)
        try:
            url = sqlalchemy.engine.make_url(text)
        except (sqlalchemy.exc.ArgumentError, ValueError):
            raise bad_argument("storage", expected, got_text=repr(_without_secrets(text))) from None
        if "@" in (url.host or ""):
            raise bad_argument("storage", "a URL with %40 for each @ of the password", got_text="another one")
        self._url = _with_driver(url)
        self.name = self._hidden(url.set(query={}).render_as_string())
        self.path = None
        self._options: dict[str, Any] = {"pool_pre_ping": True}
        backend = url.get_backend_name()
        if backend == "sqlite":
            if url.database in (None, "", ":memory:"):
                raise bad_argument("storage", "a database that other processes can reach", self.name)
            self.path = Path(str(url.database))
            self._options["connect_args"] = {"timeout": _TURN}
        elif backend in ("postgresql", "mysql", "mariadb") and "connect_timeout" not in url.query:
            self._options["connect_args"] = {"connect_timeout": _ANSWER}
        self._check_driver(expected)

    def _check_driver(self, expected: str) -> None:
        import sqlalchemy.exc

        try:
            sqlalchemy.create_engine(self._url)
        except ImportError as error:
            module = (error.name or self._url.get_driver_name()).partition(".")[0]
            package = _PACKAGES.get(module, module)
            raise bad_argument(
                "storage", f"a database whose driver is installed (pip install '{package}')", self.name
            ) from None
        except (sqlalchemy.exc.ArgumentError, TypeError):
            raise bad_argument("storage", expected, self.name) from None

    def check(self) -> None:
        """Raise ``ArgumentError`` if the database gives no answer. SQLite's file is not made."""
        import sqlalchemy.exc

        if self.path is not None:
            return
        engine = sqlalchemy.create_engine(self._url, **self._options)
        try:
            engine.connect().close()
        except sqlalchemy.exc.SQLAlchemyError as error:
            expected = f"a database that can be reached ({self._reason(error)})"
            raise bad_argument("storage", expected, self.name) from None
        finally:
            engine.dispose()

    def open(self) -> "optuna.storages.BaseStorage":
        """Return Optuna's storage in the database. Its tables are made if there are none.

        Raises:
            ArgumentError: If the tables cannot be made or read.
        """
        import optuna
        import sqlalchemy.exc

        # Optuna fills in what stands in braces.
        address = self._url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return optuna.storages.RDBStorage(address, engine_kwargs=self._options)
            except sqlalchemy.exc.SQLAlchemyError as error:
                # Another process may be making the tables at this moment.
                if attempt == _ATTEMPTS:
                    expected = f"a database in which tables can be made ({self._reason(error)})"
                    raise bad_argument("storage", expected, self.name) from None
                time.sleep(0.2 * attempt)
            except RuntimeError as error:
                # The tables are those of another version of Optuna.
                raise bad_argument("storage", f"another database ({self._reason(error)})", self.name) from None
        raise AssertionError

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Turn errors of the database into an ``ArgumentError`` of one line, without a password."""
        import optuna
        import sqlalchemy.exc

        try:
            yield
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
            raise ArgumentError(
                f"The storage {self.name!r} has failed ({self._reason(cause or error)}). Finished trials are kept, and"
                " the same command goes on."
            ) from None

    def claiming(self) -> AbstractContextManager[None]:
        """Return a block in which no other process takes a trial. A database server sees to that itself."""
        if self.path is None:
            return nullcontext()
        path = f"{self.path}.lock"
        return held(path, _TURN, lambda: f"Another process has held {path!r} for {_TURN} seconds.")

    def _reason(self, error: BaseException) -> str:
        """Return on one line what a driver says about an error, without secrets."""
        return self._hidden(" ".join(str(getattr(error, "orig", None) or error).split()).rstrip("."))

    def _hidden(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _with_driver(url: "URL") -> "URL":
    """Return an address that names a driver which is installed, if there is one."""
    name = {"postgres": "postgresql"}.get(url.drivername, url.drivername)
    drivers = _DRIVERS.get(name, {})
    if not drivers:
        return url
    found = (driver for driver, module in drivers.items() if find_spec(module) is not None)
    return url.set(drivername=f"{name}+{next(found, next(iter(drivers)))}")


def _secrets_of(text: str) -> list[str]:
    """Return what of an address must not be shown, longest first: the password, quoted or not, and what may be one."""
    login = re.sub(r"^[^:/]*:/+", "", text).rpartition("@")[0]
    password = login.partition(":")[2]
    options = re.findall(r"[?&\s][^=&\s]*(?:pass|secret|token|key)[^=&\s]*=([^&\s]*)", f" {text}", re.IGNORECASE)
    found = {form for secret in (password, *options) for form in (secret, unquote(secret)) if form}
    return sorted(found, key=len, reverse=True)


def _without_secrets(text: str) -> str:
    """Return what cannot be read as an address, without all that may be a password."""
    for secret in _secrets_of(text):
        text = text.replace(secret, "***")
    return text[:100]
