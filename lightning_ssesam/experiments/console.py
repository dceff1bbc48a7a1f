"""Threads and messages of the commands."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import MemoryHandler

import torch

from lightning_ssesam._validation import bad_argument


@contextmanager
def limited_threads(number: int) -> Iterator[None]:
    """Give each operation this number of CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Hold back what Lightning logs and warns of, until the function that is yielded is called.

    It is lost if an error ends the block before, which then stands alone.
    """
    with ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        held = [_hold(logger, handler) for logger in _loggers() for handler in list(logger.handlers)]
        for logger, handler, memory in held:
            stack.callback(_give_back, logger, handler, memory)

        def release() -> None:
            stack.close()
            for *_, memory in held:
                memory.flush()
            for warning in caught or ():
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

        try:
            yield release
        finally:
            # Python flushes every handler at its end.
            for *_, memory in held:
                memory.setTarget(None)


def _hold(logger: logging.Logger, handler: logging.Handler) -> tuple[logging.Logger, logging.Handler, MemoryHandler]:
    memory = MemoryHandler(10_000, logging.CRITICAL + 1, handler, flushOnClose=False)
    logger.removeHandler(handler)
    logger.addHandler(memory)
    return logger, handler, memory


def _give_back(logger: logging.Logger, handler: logging.Handler, memory: MemoryHandler) -> None:
    logger.removeHandler(memory)
    logger.addHandler(handler)


def _loggers() -> list[logging.Logger]:
    return [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages that Lightning writes for each training."""
    with warnings.catch_warnings(), at_level(logging.ERROR, *_loggers()):
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")
        yield


@contextmanager
def at_level(level: int, *loggers: logging.Logger) -> Iterator[None]:
    """Give loggers a level of ``logging``, and their own one after the block."""
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, own in zip(loggers, before, strict=True):
            logger.setLevel(own)


def find_device(name: str) -> torch.device:
    """Return a device by name; ``"auto"`` is a GPU if there is one. A wrong name raises ``ArgumentError``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise bad_argument("device", "'auto' or a device of this machine, such as 'cpu'", name) from error
