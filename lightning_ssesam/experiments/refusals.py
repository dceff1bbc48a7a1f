"""How a command ends when it cannot go on: with one line instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_ssesam.errors import ArgumentError


@contextmanager
def without_traceback() -> Iterator[None]:
    """End the program without a traceback after an interrupt, an ArgumentError or a MisconfigurationException."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except SIGTERMException:
        # Lightning would report success.
        sys.exit(143)
    except MisconfigurationException as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if (argument_error := _find_argument_error(error)) is None:
            raise
        # A process of a DataLoader raises the same type again, with its traceback before the message.
        sys.exit(f"error: {str(argument_error).rpartition('ArgumentError: ')[2].strip()}")


def _find_argument_error(error: BaseException | None) -> ArgumentError | None:
    """Return the ArgumentError that an error is or was raised from. jsonargparse wraps those of classes."""
    while error is not None and not isinstance(error, ArgumentError):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error
