"""The import path of suggestions; see :mod:`lightning_ssesam.experiments.suggestion`."""

from lightning_ssesam.experiments.suggestion import Suggestion, suggest

__all__ = ["Suggestion", "suggest"]
