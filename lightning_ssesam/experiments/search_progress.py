"""The display of a search while it runs."""

from types import TracebackType

from tqdm.auto import tqdm
from typing_extensions import Self

from lightning_ssesam.experiments.progress import display_options

_FORMAT = "{percentage:3.0f}%|{bar:20}| {n:.1f}/{total} trials [{elapsed}<{remaining}{postfix}]"


class SearchProgress:
    """A bar in trials over all methods, which moves with every epoch, and the trial that is trained.

    Args:
        total: Number of trials of all methods together.
        done: Number of trials that were made before.
        seeds: Number of trainings of a trial.
        epochs: Number of epochs of a training.
    """

    def __init__(self, total: int, done: int, seeds: int, epochs: int) -> None:
        self.seeds, self.epochs = seeds, epochs
        self.bar = tqdm(total=total, initial=done, miniters=0, bar_format=_FORMAT, **display_options())
        self._done, self._trial, self._best = done, "", ""

    def begin(self, method: str, trial: int, best: float | None) -> None:
        """Show another trial of a method whose best value so far is ``best``, in [0, 1]."""
        self._trial = f"{method} trial {trial}"
        self._best = "" if best is None else f", best {100 * best:.1f} %"
        self._show(0, f"{self._trial}{self._best}")

    def epoch(self, seed: int, epoch: int) -> None:
        """Show that a number of epochs of a trial's training is over. Both are counted, the seed from 0."""
        training = f"training {seed + 1}/{self.seeds}, " if self.seeds > 1 else ""
        share = (seed * self.epochs + epoch) / (self.seeds * self.epochs)
        self._show(min(share, 1.0), f"{self._trial}: {training}epoch {epoch}/{self.epochs}{self._best}")

    def count(self, done: int) -> None:
        """Show how many trials are done, with those that other processes have made."""
        self._done = done
        self._show(0, self._trial)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(text)

    def end(self) -> None:
        """Count the trial, whatever ended it."""
        self._done += 1
        self._show(0, self._trial)

    def _show(self, share: float, text: str) -> None:
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(self._done + share - self.bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()
