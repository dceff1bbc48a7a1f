"""How a command ends when it cannot go on: with one line instead of a traceback."""

import errno
import pickle
import re
import sys
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn
from urllib.error import URLError

from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_ssesam.errors import ArgumentError, WorkersLostError
from lightning_ssesam.experiments.parser_messages import raised_in_unions
from lightning_ssesam.experiments.sources import PACKAGE, is_foreign_file

_LIMIT = 390
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_LOADS = {
    "torch.serialization",
    "lightning.fabric.utilities.cloud_io",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
}
_LOAD_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, AttributeError, ImportError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)


class Refusal(SystemExit):
    """Ends the program with exit status 2.

    Args:
        message: What is wrong, on one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(f"error: {message}")
        self.code = 2


class Place(NamedTuple):
    """A line of code of a user."""

    file: str
    line: int

    def __str__(self) -> str:
        return f" ({Path(self.file).name}, line {self.line})"


def refuse(message: str) -> NoReturn:
    """Print one line to the error stream and end the program with exit status 2."""
    refusal = Refusal(" ".join(message.split()))
    print(refusal, file=sys.stderr)
    raise refusal


@contextmanager
def without_traceback(options: Sequence[str] = ()) -> Iterator[None]:
    """End the program with one line for a refusal, and without a traceback after an interrupt.

    Refusals are every ArgumentError and MisconfigurationException; files that cannot be read or written, downloads that
    fail and packages that are missing; and whatever the user's code raises before the first training, with its file and
    line. All other errors keep their traceback.

    Args:
        options: Options of the command, for the name of the checkpoint.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except SIGTERMException:
        # Lightning would report success.
        sys.exit(143)
    except SystemExit as error:
        # A class that ends the program would end the command in silence. Refusal and Terminated are other types, and
        # the help ends in argparse.
        place = place_in_user_code(error)
        if type(error) is not SystemExit or place is None or any(map(_trains, _frames(error))):
            raise
        refuse(f"Your code ended the program by sys.exit({str(error.code)[: _LIMIT - 200]}){place}.")
    except Exception as error:
        if (line := _line(error, options)) is None:
            raise
        refuse(line)


def place_in_user_code(error: BaseException) -> Place | None:
    """Return the innermost line of the user's code that an error went through, or None."""
    if isinstance(error, SyntaxError) and error.filename:
        return Place(error.filename, error.lineno or 0)
    places = [Place(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next((place for place in reversed(places) if _is_of_user(place.file)), None)


def _line(error: Exception, options: Sequence[str]) -> str | None:
    """Return what to say about an error instead of its traceback, or None."""
    if (argument_error := find_argument_error(error)) is not None:
        # A process of a DataLoader raises the same type again, with its traceback before the message.
        return str(argument_error).rpartition("ArgumentError: ")[2]
    text = " ".join(str(error).split())
    if isinstance(error, MisconfigurationException | WorkersLostError):
        return text
    text = text if len(text) < _LIMIT - 100 else f"{text[: _LIMIT - 100]}..."
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return f"Cannot write {str(error.filename or 'a file')!r}: {error.strerror}."
    frames = _frames(error)
    modules = {str(frame.f_globals.get("__name__")) for frame in frames}
    is_download = isinstance(error, OSError | RuntimeError) and any("torchvision.datasets" in name for name in modules)
    if isinstance(error, URLError | ConnectionError | TimeoutError) or is_download:
        return f"Cannot download: {text} Check the network, or put the files there yourself."
    place = place_in_user_code(error)
    if place is None and isinstance(error, _LOAD_ERRORS) and any(map(_loads, frames)):
        # An address that needs a package, or a file that Lightning does not find.
        is_told = isinstance(error, OSError | ImportError) or "ckpt_path" in text
        is_told |= isinstance(error, RuntimeError) and "state_dict" in text
        reason = (
            text if is_told else f"it is damaged, or no checkpoint of `lightning-ssesam fit` ({type(error).__name__})"
        )
        return f"Cannot load {_checkpoint(options)}: {reason}"
    if place is None and (reason := raised_in_unions(str(error))):
        return reason
    if isinstance(error, ModuleNotFoundError) and place is None:
        return f"{text}. Install it: pip install {(error.name or '').partition('.')[0]}"
    return None if any(map(_trains, frames)) else _wrong_argument(error, text, place, frames[-1])


def _wrong_argument(error: Exception, text: str, place: Place | None, last: FrameType) -> str | None:
    """Return the line for what a class raises before the training, or None for an error of the project itself."""
    if place is not None:
        return f"{type(error).__name__}{text and f': {text}'}{place}"
    is_call = isinstance(error, TypeError) and re.search(r"required .*argument|unexpected keyword|positional arg", text)
    is_own = Path(last.f_code.co_filename).is_relative_to(PACKAGE) and not isinstance(error, OSError)
    if isinstance(error, ValueError | TypeError | ImportError | OSError) and (is_call or not is_own):
        return text
    return None


def find_argument_error(error: BaseException | None) -> ArgumentError | None:
    """Return the ArgumentError that an error is or was raised from. jsonargparse wraps those of classes."""
    while error is not None and not isinstance(error, ArgumentError):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _is_of_user(file: str) -> bool:
    # Code without a file has a name such as "<frozen importlib._bootstrap>".
    return not file.startswith("<") and is_foreign_file(file)


def _trains(frame: FrameType) -> bool:
    """Whether a call is a part of training or evaluation, in which every error is one of the code."""
    module, function = str(frame.f_globals.get("__name__")), frame.f_code.co_name
    if module == "lightning.pytorch.trainer.trainer":
        return function in ("fit", "validate", "test")
    parts = ("curvature.", "experiments.tasks", "experiments.search_turns")
    return module.startswith(("optuna.", *(f"lightning_ssesam.{part}" for part in parts)))


def _loads(frame: FrameType) -> bool:
    function = frame.f_code.co_name
    return frame.f_globals.get("__name__") in _LOADS and any(
        word in function for word in ("load", "restore", "resume", "ckpt_path", "get_filesystem")
    )


def _checkpoint(options: Sequence[str]) -> str:
    """Return the name of the checkpoint for a sentence."""
    for position, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name == "--ckpt_path" and (equals or options[position + 1 :]):
            return f"the checkpoint {value if equals else options[position + 1]!r}"
    return "the checkpoint"
