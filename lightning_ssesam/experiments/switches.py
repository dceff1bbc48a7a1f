"""Which callbacks change what an objective is built with: its stage and its radii."""

from collections.abc import Iterable, Sequence

from lightning.pytorch.callbacks import Callback

from lightning_ssesam.callbacks import RadiusSchedule, StageSwitch
from lightning_ssesam.objectives import Objective


def needs_switch(objective: Objective, callbacks: Iterable[Callback]) -> bool:
    """Return whether a :class:`StageSwitch` with one point has to be added, because there is none for two stages."""
    return objective.num_stages == 2 and not any(isinstance(callback, StageSwitch) for callback in callbacks)


def problem_of(objective: Objective, callbacks: Sequence[Callback]) -> str:
    """Return what is wrong if the callbacks do not fit the stages and the radii of an objective, else an empty text."""
    changing = [callback for callback in callbacks if isinstance(callback, StageSwitch | RadiusSchedule)]
    misfits = [callback.misfit(objective) for callback in changing]
    if problem := next(filter(None, misfits), ""):
        return problem
    if objective.num_stages <= 2 or any(getattr(callback, "switches_stages", False) for callback in callbacks):
        return ""
    example = StageSwitch.example(objective.num_stages)
    return (
        f"{type(objective).__name__} has {objective.num_stages} stages and needs a StageSwitch with"
        f" {objective.num_stages - 1} points, such as {example}: add one to its `callbacks`."
    )


def fixed_radii(objective: Objective, callbacks: Iterable[Callback]) -> dict[str, float]:
    """Return the radii of an objective that no :class:`RadiusSchedule` moves."""
    moved = {callback.name for callback in callbacks if isinstance(callback, RadiusSchedule)}
    return {name: value for name, value in objective.radius_values.items() if name not in moved}
