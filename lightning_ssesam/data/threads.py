"""Many small calls at a time: what waits for a disk of another machine, such as to look at each of a million files."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 16
# Calls that a thread makes in a row, and items that are held in memory.
_CHUNK = 256
_BLOCK = 64 * _CHUNK


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield what a function returns for each item, in order. It is called in several threads.

    Args:
        function: Function that waits for a disk most of its time.
        items: Items, of which some thousands are taken at a time.
    """
    iterator = iter(items)

    def call(chunk: list[Item]) -> list[Result]:
        return [function(item) for item in chunk]

    block = list(islice(iterator, _BLOCK))
    if len(block) <= _CHUNK:
        yield from call(block)
        return
    with ThreadPoolExecutor(_THREADS) as threads:
        while block:
            chunks = [block[start : start + _CHUNK] for start in range(0, len(block), _CHUNK)]
            for results in threads.map(call, chunks):
                yield from results
            block = list(islice(iterator, _BLOCK))
