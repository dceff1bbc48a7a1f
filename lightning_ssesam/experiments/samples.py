"""The data modules of a comparison or a search, each made once before the first training."""

import copy
from collections.abc import Callable, Iterable
from functools import cached_property

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.experiments.methods import WithSampler
from lightning_ssesam.factories import check_made


class Source:
    """A data module that methods share.

    Attributes:
        data: Data module as it was made, without samples.
    """

    def __init__(self, data: LongTailDataModule) -> None:
        self.data = data

    @cached_property
    def prepared(self) -> LongTailDataModule:
        """A copy of the data module. Its data have been downloaded, and its files checked."""
        data = copy.copy(self.data)
        data.prepare_data()
        data.check_files()
        return data

    @cached_property
    def contents(self) -> str:
        """Fingerprint of the data module."""
        return self.prepared.fingerprint()


def make_sources(factories: Iterable[Callable[[], LongTailDataModule]]) -> list[Source]:
    """Return the source of each factory. Factories that differ only in their samplers share one.

    It raises ``ArgumentError`` for multi-label data, of which runs have no accuracies to compare.
    """
    found: dict[int, Source] = {}
    sources = []
    for factory in factories:
        plain = factory.data if isinstance(factory, WithSampler) else factory
        if id(plain) not in found:
            data = check_made("data", plain(), LongTailDataModule)
            if data.multi_label:
                expected = "a data module with one label a sample; `fit`, `validate` and `test` take multi-label data"
                raise bad_argument("data", expected, got_text=f"{type(data).__name__}, whose samples have several")
            found[id(plain)] = Source(data)
        sources.append(found[id(plain)])
    return sources
