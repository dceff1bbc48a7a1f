"""Lightning's own tests of BoringModel through the mixin; CONTRIBUTING.md says how to run them.

The tests of a checkout of Lightning run twice: as they are, and with the mixin and ERM in front of each BoringModel. At
the end stands which tests pass with automatic optimization and not with the mixin. `REASONS` has those that may.

    python tests/boring.py --lightning ../pytorch-lightning [--tests tests_pytorch/loops ...] [options of pytest]
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import lightning
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import zeros

from lightning_ssesam import ERM, SharpnessAwareMixin, StepOptions

ROOT = Path(__file__).parent.parent
MODE, REPORT = "BORING_MODE", "BORING_REPORT"

# Why a test may fail with the mixin. A pattern is searched in the name of the test and in the error it failed with.
REASONS = {
    "documented refusal: the module optimizes by hand already": [
        "uses SharpnessAwareMixin, which optimizes manually: do not set `automatic_optimization`",
    ],
    "documented refusal: several optimizers": ["must return one optimizer under SharpnessAwareMixin"],
    "documented refusal: an optimizer that evaluates the loss several times": [
        "LBFGS evaluates the loss several times a step",
    ],
    "documented refusal: a strategy that does not leave the gradients of whole parameters": [
        r"SharpnessAwareMixin cannot work with \w+",
    ],
    "documented refusal: a step outside of a fit": [r"makes an update and needs `Trainer\.fit` around it"],
    "documented refusal: a `configure_callbacks` that is assigned, and drops the mixin's callbacks": [
        "overrides SharpnessAwareMixin's and drops its callbacks",
    ],
    "documented refusal: SpikeDetection where batches are accumulated": ["SpikeDetection looks at the loss of every"],
    "documented: batches that are accumulated go through the network when the last of them has come": [
        "::test_backward_count_with_grad_accumulation",
    ],
    "the mixin's step takes a batch, not the iterator over the loader": ["dataloader_iter"],
    "the mixin attaches two callbacks, which the test counts or wants last": [
        "::test_callbacks_configured_in_model",
        "::test_configure_callbacks_hook_multiple_calls",
        r"(TrainerSupport|ExactResume) object at",
    ],
    "internals of automatic optimization: what `training_step` may return, which `sample_losses` replaces": [
        "::test_warning_invalid_trainstep_output",
        r"::test_skip_training_step_not_allowed\[2\]",
    ],
    "internals of automatic optimization: the class of the closure, or an optimizer that does not call it": [
        "::test_lightning_optimizer_automatic_optimization_optimizer_step",
        "::test_optimizer_step_no_closure_raises",
        "::test_closure_",
    ],
    "internals of automatic optimization: the gradients are freed before the backward pass, not after the step": [
        "::test_trainer_model_hook_system_fit",
    ],
    "internals of automatic optimization: its loop is called, replaced or read by the test": [
        r"automatic_optimization\.(run|_|optim_progress)",
        "::test_loop_state_on_exception",
        "::test_loop_state_on_complete_run",
    ],
}


# The plugin of pytest, which both runs load.

# Tests compare all names that were logged.
QUIET = {"log_loss": False} if hasattr(StepOptions, "log_loss") else {}


class Ported(SharpnessAwareMixin):
    """Trains as `training_step` of the class behind it says, the way docs/existing_project.md adds the mixin.

    The step's loss is that of the one sample that a batch counts as, so that no rounding tells both runs apart.
    """

    objective = ERM()
    step_options = StepOptions(passes="full", **QUIET)
    assigned_step = None

    def training_step(self, batch, batch_idx):
        if self.in_clean_pass:
            # A test has assigned a step that calls this one.
            return self._behind(batch, batch_idx)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.waiting = []
        self.waiting.append(batch_idx)
        loss = super().training_step(batch, batch_idx)
        output = vars(self).pop("output", None)
        return {**output, "loss": loss} if isinstance(output, Mapping) and loss is not None else loss

    def sample_losses(self, batch):
        self.output = (self.assigned_step or self._behind)(batch, self.waiting.pop(0))
        loss = self.output["loss"] if isinstance(self.output, Mapping) else self.output
        return None if loss is None else loss.reshape(1)

    def _behind(self, *arguments):
        step = super(SharpnessAwareMixin, self).training_step
        takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        return step(*arguments) if takes_index else step(arguments[0])

    def sample_targets(self, batch):
        return zeros(1).long()

    def __setattr__(self, name, value):
        if name != "training_step" or not callable(value) or hasattr(value, "_torchdynamo_orig_callable"):
            super().__setattr__(name, value)
            return
        # A test that assigns a step to the module means the one to train by. Those that are compiled are the mixin's.
        vars(self).pop("training_step", None)
        self.assigned_step = value

    def __delattr__(self, name):
        super().__delattr__("assigned_step" if name == "training_step" and self.assigned_step else name)

    def __reduce_ex__(self, protocol):
        # The class has no name of its own to be found by. The test's class makes it again, also in another process.
        return make, (type(self).__bases__[1],), *super().__reduce_ex__(protocol)[2:]


@functools.cache
def ported(kind):
    """Return a class of the same name with the mixin in front."""
    if issubclass(kind, SharpnessAwareMixin):
        return kind
    return type(kind.__name__, (Ported, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def port():
    """Make every BoringModel, and every subclass of it in a test, one with the mixin."""
    BoringModel.__new__ = staticmethod(lambda kind, *args, **kwargs: object.__new__(ported(kind)))


def make(kind):
    """Return a module without state, for `pickle` and `copy`."""
    port()
    return kind.__new__(kind)


def pytest_configure(config):
    """Called before tests are collected, in every process of pytest."""
    if os.environ.get(MODE) == "mixin":
        port()
    if REPORT in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Report(Path(os.environ[REPORT])))


class Report:
    """Writes a line for every test and phase, so that a run that is ended leaves what it knows."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash else str(report.longrepr or "")
            with self.path.open("a") as file:
                file.write(json.dumps([report.nodeid, report.outcome, text[:2000]]) + "\n")

    def pytest_collectreport(self, report):
        if report.failed:
            print(f"cannot be collected: {report.nodeid}", file=sys.stderr)


# The comparison of both runs.


def run(mode, checkout, tests, options):
    """Run Lightning's tests; return for each its outcome and what it failed with."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.jsonl")
        report.touch()
        paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            MODE: mode,
            REPORT: str(report),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        plugins = ["-p", "boring", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command = [sys.executable, "-m", "pytest", "-q", *plugins, *tests, *options]
        subprocess.run(command, cwd=checkout / "tests", env=environment, check=False)
        return outcomes(json.loads(line) for line in report.read_text().splitlines())


def outcomes(lines):
    """Return the outcome of each test: "failed" if one of its phases did."""
    results = {}
    for name, outcome, text in lines:
        if results.get(name, ("", ""))[0] != "failed":
            results[name] = (outcome, text)
    return results


def reason_for(name, text):
    """Return why a test may fail with the mixin; None if there is no reason."""
    matches = (reason for reason, patterns in REASONS.items() for p in patterns if re.search(p, f"{name}\n{text}"))
    return next(matches, None)


def compare(automatic, mixin):
    """Print which tests the mixin loses. Return the names of those that it loses for no reason."""
    for name, results in (("automatic", automatic), ("mixin", mixin)):
        counts = Counter(outcome for outcome, _ in results.values())
        print(f"{name}: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    passed = [name for name, (outcome, _) in automatic.items() if outcome == "passed"]
    lost = {name: mixin.get(name, ("missing", "did not run"))[1] for name in passed}
    lost = {name: text for name, text in lost.items() if mixin.get(name, ("missing", ""))[0] != "passed"}
    reasons = {name: reason_for(name, text) for name, text in lost.items()}
    print(f"\n{len(passed)} pass with automatic optimization, {len(passed) - len(lost)} of them with the mixin, too.")
    for reason, count in Counter(filter(None, reasons.values())).most_common():
        print(f"\n{count} do not, {reason}:")
        print("\n".join(f"  {name}" for name in lost if reasons[name] == reason))
    unexplained = [name for name in lost if reasons[name] is None]
    print(f"\n{len(unexplained)} do not, without a reason:")
    for name in unexplained:
        print(f"  {name}\n    {lost[name].splitlines()[0] if lost[name] else ''}")
    return unexplained


def main():
    """Run both and compare. Exit with 1 if the mixin loses a test for no reason, or if nothing could be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lightning", type=Path, required=True, help="checkout of Lightning, of the installed version")
    parser.add_argument("--tests", nargs="+", default=["tests_pytorch"], help="files or folders in its folder `tests`")
    arguments, options = parser.parse_known_args()
    checkout = arguments.lightning.resolve()
    if not (checkout / "tests" / "tests_pytorch").is_dir():
        parser.error(f"No such checkout of Lightning: {str(checkout)!r} has no folder tests/tests_pytorch.")
    version = checkout / "src" / "version.info"
    if version.is_file() and version.read_text().strip() != lightning.__version__:
        print(f"The checkout is of {version.read_text().strip()}, the installed Lightning is {lightning.__version__}.")
    automatic, mixin = (run(mode, checkout, arguments.tests, options) for mode in ("automatic", "mixin"))
    unexplained = compare(automatic, mixin)
    sys.exit(1 if unexplained or not any(outcome == "passed" for outcome, _ in automatic.values()) else 0)


if __name__ == "__main__":
    main()
