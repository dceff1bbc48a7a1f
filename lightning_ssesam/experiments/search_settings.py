"""What all trials of a method have in common: kept with them, and compared by every command that joins the search."""

from ast import literal_eval
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.fingerprint import digest
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.experiments.search import Bounds
from lightning_ssesam.experiments.search_place import Place

if TYPE_CHECKING:
    import optuna

# Names under which a study keeps the settings, and fingerprints of the options that they come from.
_SETTINGS, _OPTIONS = "settings", "options"


@dataclass(frozen=True)
class Settings:
    """What all trials of a method have in common.

    Args:
        fingerprint: Fingerprint of a training.
        seeds: Number of trainings for a trial.
        metric: Accuracy to maximise.
        bounds: Smallest and largest value of each name that is searched.
        recipe: Options of the trainings, to say which of them differ.
    """

    fingerprint: str
    seeds: int
    metric: str
    bounds: Bounds
    recipe: Recipe

    def __str__(self) -> str:
        return f"{self.fingerprint} {self.seeds} {self.metric} {self.bounds}"

    def keep(self, study: "optuna.Study", place: Place) -> None:
        """Keep the settings in a study that has none. Raise ``ArgumentError`` if it has others."""
        if _SETTINGS not in study.user_attrs:
            if place.is_shared:
                study.set_user_attr(_OPTIONS, self._options())
            study.set_user_attr(_SETTINGS, str(self))
        self.check(study, place)

    def check(self, study: "optuna.Study", place: Place) -> None:
        """Raise ``ArgumentError`` if a study has other settings."""
        kept = study.user_attrs
        if kept[_SETTINGS] == str(self):
            return
        if not place.is_shared:
            text = f"{place.name!r} holds a search with other settings."
            raise ArgumentError(f"{text} Use another `output`, or delete the folder.")
        names = self._others(kept[_SETTINGS], kept.get(_OPTIONS, {}))
        which = ", ".join(f"`{name}`" for name in names) or "the data or the code"
        text = f"{place.name!r} holds a search of {study.study_name} with other settings ({which})."
        raise ArgumentError(f"{text} Use another `storage`, or the same settings in all commands.")

    def _options(self) -> dict[str, str]:
        return {field.name: digest(getattr(self.recipe, field.name))[:16] for field in fields(self.recipe)}

    def _others(self, kept: str, options: Mapping[str, str]) -> list[str]:
        """Return the names of the arguments that differ from those that are kept."""
        fingerprint, seeds, metric, bounds = kept.split(" ", 3)
        mine = self._options() if fingerprint != self.fingerprint else {}
        names = [name for name, value in mine.items() if options.get(name, value) != value]
        names += ["seeds"] if seeds != str(self.seeds) else []
        names += ["metric"] if metric != self.metric else []
        pairs = literal_eval(bounds)
        return names + [name for name in {**pairs, **self.bounds} if pairs.get(name) != self.bounds.get(name)]
