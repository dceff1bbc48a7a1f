"""Which callbacks change what an objective is built with: its stage and its radii."""

from collections.abc import Iterable, Sequence

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_ssesam.callbacks import RadiusSchedule, StageSwitch
from lightning_ssesam.objectives import Objective


def needs_switch(objective: Objective, callbacks: Iterable[Callback]) -> bool:
    """Return whether a :class:`StageSwitch` with one point has to be added, because there is none for two stages."""
    return objective.num_stages == 2 and not any(isinstance(callback, StageSwitch) for callback in callbacks)


def problem_of(objective: Objective, callbacks: Sequence[Callback]) -> str:
    """Return what is wrong if the callbacks do not fit the stages and the radii of an objective, else an empty text."""
    changing = [callback for callback in callbacks if isinstance(callback, StageSwitch | RadiusSchedule)]
    misfits = [callback.misfit(objective) for callback in changing]
    if problem := next(filter(None, misfits), "") or repeated(callbacks):
        return problem
    if objective.num_stages <= 2 or any(getattr(callback, "switches_stages", False) for callback in callbacks):
        return ""
    example = StageSwitch.example(objective.num_stages)
    return (
        f"{type(objective).__name__} has {objective.num_stages} stages and needs a StageSwitch with"
        f" {objective.num_stages - 1} points, such as {example}: add one to its `callbacks`."
    )


def repeated(callbacks: Iterable[Callback]) -> str:
    """Return what is wrong if two callbacks do the same, of which a Trainer takes one, else an empty text."""
    keys = set()
    for callback in callbacks:
        name, key = type(callback).__name__, callback.state_key
        text = f"There are several {name} callbacks with the same settings: leave one of them."
        if isinstance(callback, RadiusSchedule):
            # Also those of a subclass.
            key = f"RadiusSchedule of {callback.name}"
            text = f"Several RadiusSchedules move `{callback.name}`: leave one of them, or name another radius."
        elif isinstance(callback, StageSwitch):
            key = "StageSwitch"
            text = "There are several StageSwitches: leave one of them. It takes several points, as in at=[0.5, 0.8]."
        elif not is_overridden("state_dict", instance=callback, parent=Callback):
            continue
        if key in keys:
            return text
        keys.add(key)
    return ""


def fixed_radii(objective: Objective, callbacks: Iterable[Callback]) -> dict[str, float]:
    """Return the radii of an objective that no :class:`RadiusSchedule` moves."""
    moved = {callback.name for callback in callbacks if isinstance(callback, RadiusSchedule)}
    return {name: value for name, value in objective.radius_values.items() if name not in moved}
