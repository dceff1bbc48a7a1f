"""Searches that several processes make together: who makes which trial, and who makes that of a killed process again.

Optuna's own heartbeats are those of databases only. Here a process notes a **beat** in the trial that it makes, now and
then, and the others look whether it changes. They need no clock in common.
"""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_ssesam.experiments.search import Search, is_done
from lightning_ssesam.experiments.search_place import Place

if TYPE_CHECKING:
    import optuna

# Seconds between two beats, and those without a beat after which a process is lost.
_BETWEEN_BEATS, _SILENT = 20.0, 120.0
# Seconds between two looks at the trials of other processes.
_BETWEEN_LOOKS = 1.0
# What a trial notes about the process that makes it, its last beat, and that it is one too many.
_PROCESS, _BEAT, _SURPLUS = "process", "beat", "surplus"


class Turns:
    """Makes the trials of several methods together with other processes, each trial once.

    Args:
        searches: Study and function of each method.
        trials: Number of trials of each method, of all processes together.
        place: Place of the trials.
        confirm: Called with a study before each trial: raises if its settings are no longer those of this command.
    """

    def __init__(
        self,
        searches: Sequence[tuple["optuna.Study", Search]],
        trials: int,
        place: Place,
        confirm: Callable[["optuna.Study"], None],
    ) -> None:
        self._searches, self._trials, self._place, self._confirm = searches, trials, place, confirm
        self._progress = searches[0][1].progress
        # The last beat of each trial that another process makes, and when it was first seen.
        self._beats: dict[tuple[str, int], tuple[Any, float]] = {}

    def make_all(self) -> None:
        """Make trials, in turns, until all are made. Wait for those of other processes at the end."""
        is_said = False
        while True:
            counts = [self._count(study) for study, _ in self._searches]
            self._progress.count(sum(min(count.done, self._trials) for count in counts))
            if all(count.done >= self._trials for count in counts):
                return
            begun = [count.done + len(count.running) for count in counts]
            if min(begun) < self._trials:
                self._make(*self._searches[begun.index(min(begun))])
                is_said = False
                continue
            if not is_said:
                running = ", ".join(name for count in counts for name in count.running)
                self._progress.say(
                    f"No trial is left to begin. Waiting for {running}. If a process is killed, its trial is made here."
                    " Ctrl-C ends this command, and nothing is lost."
                )
                is_said = True
            time.sleep(_BETWEEN_LOOKS)

    def _make(self, study: "optuna.Study", search: Search) -> None:
        """Take a trial and make it, unless other processes have taken the last ones at the same moment."""
        import optuna

        with self._place.claimed():
            trial = study.ask()
            if self._is_surplus(study, trial.number):
                trial.set_user_attr(_SURPLUS, True)
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                return
            trial.set_user_attr(_PROCESS, _this_process())
            trial.set_user_attr(_BEAT, 0)
        # Samplers of two processes with the same seed would draw the same values.
        study.sampler = optuna.samplers.TPESampler(seed=trial.number)
        value, state = None, optuna.trial.TrialState.PRUNED
        try:
            with _beating(trial), suppress(optuna.TrialPruned):
                self._confirm(study)
                value = search(trial)
                state = optuna.trial.TrialState.COMPLETE
            study.tell(trial, value, state)
        except BaseException as error:
            if isinstance(error, RuntimeError | ValueError) and _has_failed(study, trial.number):
                self._progress.say(f"{_name(study, trial)} was made again: this process was silent for too long.")
                return
            with suppress(Exception):
                _fail(study, trial.number, again=isinstance(error, KeyboardInterrupt | SystemExit))
            raise

    def _is_surplus(self, study: "optuna.Study", number: int) -> bool:
        """Return whether there are enough trials without that of a number.

        Storages number trials in the order in which they are made. So of too many trials, the last ones find this out.
        """
        trials = study.get_trials(deepcopy=False)
        return sum(trial.number < number and trial.state.name != "FAIL" for trial in trials) >= self._trials

    def _count(self, study: "optuna.Study") -> "_Count":
        """Count the trials of a study. Those of lost processes are marked as failed, and will be made again."""
        running = []
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state.name != "RUNNING":
                continue
            if not self._is_lost(study, trial):
                running.append(f"{_name(study, trial)} ({_name_of_process(trial)})")
            elif _fail(study, trial.number, again=True):
                self._progress.say(f"{_name(study, trial)} is made again: {_name_of_process(trial)} is lost.")
        return _Count(sum(map(is_done, trials)), running)

    def _is_lost(self, study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> bool:
        key, beat, now = (study.study_name, trial.number), trial.user_attrs.get(_BEAT), time.monotonic()
        if key not in self._beats or self._beats[key][0] != beat:
            self._beats[key] = (beat, now)
        return has_ended(trial) or now - self._beats[key][1] > _SILENT


class _Count(NamedTuple):
    """How many trials of a method are done, and the names of those that other processes make."""

    done: int
    running: list[str]


def is_surplus(trial: "optuna.trial.FrozenTrial") -> bool:
    """Return whether a trial was given up before it began, because other processes had taken the last ones."""
    return bool(trial.user_attrs.get(_SURPLUS))


def is_taken(trial: "optuna.trial.FrozenTrial") -> bool:
    """Return whether a process of a shared search may be making a trial at this moment."""
    return trial.state.name == "RUNNING" and _PROCESS in trial.user_attrs and not has_ended(trial)


def has_ended(trial: "optuna.trial.FrozenTrial") -> bool:
    """Return whether the process that makes a trial is known to have ended, because it ran on this machine."""
    process, here = trial.user_attrs.get(_PROCESS) or {}, _this_process()
    is_here = process.get("system") == here["system"] is not None
    return is_here and process.get("start") != _start_of(process["number"])


def _fail(study: "optuna.Study", number: int, *, again: bool) -> bool:
    """Mark a trial as failed, and put its values into the queue. Return False if another process was faster."""
    import optuna

    trial = study.get_trials(deepcopy=False)[number]
    try:
        study.tell(number, state=optuna.trial.TrialState.FAIL)
    except (RuntimeError, ValueError):
        return False
    # What was queued before may not have been asked for.
    values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    if again and values:
        study.enqueue_trial(values)
    return True


def _has_failed(study: "optuna.Study", number: int) -> bool:
    return study.get_trials(deepcopy=False)[number].state.name == "FAIL"


def _name(study: "optuna.Study", trial: Any) -> str:
    return f"{study.study_name} trial {trial.number}"


def _name_of_process(trial: "optuna.trial.FrozenTrial") -> str:
    process = trial.user_attrs.get(_PROCESS)
    return f"process {process['number']} on {process['machine']}" if process else "a process that gave no name"


@contextmanager
def _beating(trial: "optuna.Trial") -> Iterator[None]:
    """Note in a trial, now and then, that this process is at work."""
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(_BETWEEN_BEATS):
            number += 1
            # The storage may be back at the next beat.
            with suppress(Exception):
                trial.set_user_attr(_BEAT, number)
        trial.storage.remove_session()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _this_process() -> dict[str, Any]:
    """Return what tells this process from others: its number, its machine, its system, when it was started."""
    number = os.getpid()
    return {"number": number, "machine": platform.node(), "system": _system(), "start": _start_of(number)}


def _system() -> str | None:
    """Return what numbers of processes are counted in, until the machine starts again; None if it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_of(number: int) -> str | None:
    """Return when a process of this system was started, in its own unit; None if there is no such process."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    # The state comes first: a process that has ended and was not waited for is a zombie.
    return None if fields[0] in "ZX" else fields[19]
