"""Lightning's private names: a version without one is refused in a sentence, and nothing is left behind."""

import copy
import importlib
import inspect

import lightning.fabric.utilities.data as fabric_data
import pytest
import torch
from helpers import (
    SPLIT,
    STRICT,
    Automatic,
    Model,
    assert_same_bits,
    batches,
    batches_loader,
    choose,
    fit,
    mlp,
    trainer,
)
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops import fit_loop
from lightning.pytorch.overrides import distributed
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_ssesam import SSESAM
from lightning_ssesam.exact_resume import ExactResume
from lightning_ssesam.lightning_internals import EXACT_RESUME, STEP, preflight
from lightning_ssesam.trainer_calls import accumulates

pytestmark = STRICT


class Without:
    """An object with all but one of its attributes."""

    def __init__(self, inner, path):
        self._inner, self._path = inner, path

    def __getattr__(self, name):
        first, _, rest = self._path.partition(".")
        if name == first and not rest:
            raise AttributeError(name)
        value = getattr(self._inner, name)
        return Without(value, rest) if name == first else value


@pytest.mark.parametrize("path", [*STEP, *EXACT_RESUME])
def test_each_name_is_held_by_the_preflight(path, monkeypatch):
    run, file = trainer(), {**STEP, **EXACT_RESUME}[path]
    preflight(run, {path: file})
    root, _, rest = path.partition(".")
    if root == "trainer":
        run = Without(run, rest)
    else:
        owner = {"CombinedLoader": CombinedLoader, "data": fabric_data, "distributed": distributed}[root]
        monkeypatch.delattr(owner, rest)
    with pytest.raises(MisconfigurationException) as caught:
        preflight(run, {path: file})
    message = str(caught.value)
    assert message.startswith("lightning-ssesam was tested with Lightning 2.5 to 2.6, but Lightning ")
    assert f"has no `{path}` in lightning/{file}, or does not use it. Install `lightning<2.7`." in message


def test_files_that_the_names_are_said_to_stand_in():
    for path, file in {**STEP, **EXACT_RESUME}.items():
        module = importlib.import_module("lightning." + file.removesuffix(".py").replace("/", "."))
        assert path.rpartition(".")[2] in inspect.getsource(module), path


def test_a_lightning_without_a_name_of_the_step_is_refused_before_training(monkeypatch):
    monkeypatch.delattr(fit_loop._FitLoop, "_skip_backward")
    seen = []

    class Seen(Model):
        def training_step(self, batch, batch_idx):
            seen.append(batch_idx)

    with pytest.raises(MisconfigurationException, match=r"has no `trainer.fit_loop._skip_backward` in"):
        fit(Seen(), batches(1))
    assert not seen


@pytest.mark.usefixtures("float64")
def test_a_lightning_too_new_for_exact_resume_trains_without(monkeypatch):
    net, data = mlp(), batches(3)
    twin = Model(copy.deepcopy(net), SSESAM(SPLIT))
    fit(twin, data)
    monkeypatch.delattr(CombinedLoader, "_state_dicts")
    monkeypatch.setattr(fit_loop._FitLoop, "on_save_checkpoint", lambda self: {}, raising=False)
    model = Model(net, SSESAM(SPLIT))
    with pytest.raises(MisconfigurationException, match=r"or train without exact resume: .*exact_resume=False"):
        fit(model, data)
    choose(model, exact_resume=False)
    fit(model, data)
    assert_same_bits(model.parameters(), twin.parameters())


def test_a_lightning_that_no_longer_calls_a_name_is_refused(monkeypatch):
    """It is still there, so that only its silence tells."""
    monkeypatch.setattr(fit_loop._FitLoop, "setup_data", without_states(fit_loop._FitLoop.setup_data))
    with pytest.raises(MisconfigurationException, match=r"_load_combined_loader_states.*or does not use it"):
        fit(Model(), batches(1))


def without_states(setup_data):
    def call(self):
        own, self._load_combined_loader_states = self._load_combined_loader_states, lambda: None
        setup_data(self)
        self._load_combined_loader_states = own

    return call


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_exact_resume_trains_the_same_and_resumes_as_lightning_does(accumulate, tmp_path):
    net, data, saved = mlp(), batches(4), []
    for exact in (True, False):
        model = Model(copy.deepcopy(net), SSESAM(SPLIT))
        choose(model, exact_resume=exact)
        run = fit(model, data, accumulate_grad_batches=accumulate)
        run.save_checkpoint(tmp_path / f"{exact}.ckpt")
        saved.append((model, torch.load(tmp_path / f"{exact}.ckpt", weights_only=True)))
    (first, with_state), (second, without) = saved
    assert_same_bits(first.parameters(), second.parameters())
    assert with_state["callbacks"].keys() - without["callbacks"].keys() == {"ExactResume"}
    # Either goes on with the checkpoint of the other.
    ends = []
    for exact, path in ((True, "False.ckpt"), (False, "True.ckpt")):
        model = Model(copy.deepcopy(net), SSESAM(SPLIT))
        choose(model, exact_resume=exact)
        fit(model, data, ckpt_path=tmp_path / path, max_epochs=2, accumulate_grad_batches=accumulate)
        ends.append(list(model.parameters()))
    assert_same_bits(*ends)


def test_callbacks_of_the_module_and_what_they_leave():
    model, plain = Model(objective=SSESAM(SPLIT, 0.0, 0.0)), Automatic()
    run = trainer()
    before = {id(owner): set(vars(owner)) for owner in owners(run)}
    run.fit(model, batches_loader(batches(2)))
    assert {type(callback) for callback in run.callbacks} >= {ExactResume}
    assert all(set(vars(owner)) <= before[id(owner)] for owner in owners(run))
    assert "configure_optimizers" not in vars(model)
    run.fit_loop.max_epochs = 2
    run.fit(plain, batches_loader(batches(2)))
    assert model.automatic_optimization is False


def owners(run):
    loops = run.fit_loop.epoch_loop
    return [run.fit_loop, loops.automatic_optimization, loops.manual_optimization, loops.val_loop, run.strategy]


def test_the_flag_is_false_within_a_step_only():
    seen = []

    class Seen(Model):
        def sample_losses(self, batch):
            seen.append(("pass", self.automatic_optimization))
            return super().sample_losses(batch)

        def optimizer_step(self, *args, **kwargs):
            seen.append(("update", self.automatic_optimization))
            super().optimizer_step(*args, **kwargs)

        def on_train_batch_end(self, *args):
            seen.append(("after", self.automatic_optimization))

    model = Seen()
    assert model.automatic_optimization is False
    fit(model, batches(1))
    assert seen == [("pass", False), ("update", True), ("after", True)]
    assert model.automatic_optimization is False


class Accumulation(Callback):
    def __init__(self):
        self.pairs = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.pairs.append((accumulates(trainer, batch_idx), trainer.fit_loop._should_accumulate()))


@pytest.mark.parametrize("accumulate", [1, 2, 3, 7])
def test_accumulates_as_lightning_says(accumulate):
    """Asked by public names; compared with Lightning's own, private answer."""
    watch = Accumulation()
    fit(Automatic(), batches(5), accumulate_grad_batches=accumulate, callbacks=[watch], max_epochs=2)
    assert len(watch.pairs) == 10
    assert all(ours == theirs for ours, theirs in watch.pairs)
