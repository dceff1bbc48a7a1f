"""What Lightning does with a BoringModel, automatically and with the mixin; the tool that runs Lightning's tests."""

import os
import re
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import boring
import pytest
import torch
from helpers import STRICT, assert_same_bits, clones, start_process, trainer
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader, grad_norm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, default_collate

from lightning_ssesam import SharpnessAwareMixin

pytestmark = [STRICT, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(params=["automatic", "mixin"])
def port(request):
    """Makes of a class what trains it: itself, or the same class with the mixin in front."""
    return boring.ported if request.param == "mixin" else lambda kind: kind


def fit(model, loader=None, ckpt_path=None, **kwargs):
    options = {"limit_train_batches": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    run = trainer(**{**options, **kwargs})
    run.fit(model, loader, ckpt_path=ckpt_path)
    return run


def recorder(base, seen, names):
    """Return a class that notes the calls of some hooks."""

    def noted(name):
        def hook(self, *args, **kwargs):
            seen.append(name)
            return getattr(base, name)(self, *args, **kwargs)

        return hook

    return type("Noted", (base,), {name: noted(name) for name in names})


def hooks_of(kind):
    return [name for name in dir(kind) if name.startswith(("on_", "setup", "teardown"))]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_are_called_in_the_same_order(accumulate):
    """But for the one that frees the gradients, which the mixin does at the end of a step and not before it."""
    sequences = []
    for port in (lambda kind: kind, boring.ported):
        seen = []
        of_module = [name for name in hooks_of(BoringModel) if name not in ("on_gpu", "on_trainer")]
        model = port(recorder(BoringModel, seen, [*of_module, "configure_optimizers", "lr_scheduler_step"]))()
        callback = recorder(Callback, seen, hooks_of(Callback))()
        fit(model, callbacks=[callback], max_epochs=2, accumulate_grad_batches=accumulate)
        sequences.append(seen)
    automatic, mixin = sequences
    assert Counter(mixin)["on_before_zero_grad"] == 2 * 2 * 4 // accumulate
    if accumulate == 1:
        without = [[name for name in seen if name != "on_before_zero_grad"] for seen in sequences]
        assert without[0] == without[1]
        assert Counter(automatic) == Counter(mixin)
    # The passes of all batches come with the last of them.
    of_passes = ("on_before_zero_grad", "on_before_backward", "on_after_backward")
    without = [[name for name in seen if name not in of_passes] for seen in sequences]
    assert without[0] == without[1]
    assert Counter(automatic)["on_before_backward"] == Counter(mixin)["on_before_backward"] == 2 * 2 * 4


def test_same_weights():
    net, ends = BoringModel().layer, []
    for port in (lambda kind: kind, boring.ported):
        model = port(BoringModel)()
        model.layer.load_state_dict(net.state_dict())
        torch.manual_seed(1)
        fit(model, max_epochs=2)
        ends.append(clones(model.parameters()))
    assert_same_bits(*ends)
    assert not torch.equal(ends[0][0], net.weight)


def test_outputs_for_callbacks(port):
    class Extra(BoringModel):
        def training_step(self, batch, batch_idx):
            return {**super().training_step(batch, batch_idx), "number": batch_idx}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert set(outputs) == {"loss", "number"}
            assert outputs["number"] == batch_idx
            assert not outputs["loss"].requires_grad

    assert fit(port(Extra)()).global_step == 4


def test_loss_given_to_callbacks(port):
    class Given(BoringModel):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            self.last = loss.item()
            return loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert outputs["loss"].item() == self.last

    fit(port(Given)())


def test_same_data_after_the_same_seed(port):
    class Seeing(BoringModel):
        def __init__(self):
            super().__init__()
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return super().training_step(batch, batch_idx)

    def seen(seed, sanity):
        if seed:
            seed_everything(seed, verbose=False)
        model = port(Seeing)()
        fit(model, num_sanity_val_steps=sanity)
        return torch.stack(model.seen)

    first = seen(5, 0)
    assert not torch.equal(first, seen(None, 0))
    assert torch.equal(first, seen(5, 2))


@pytest.mark.parametrize(("at", "steps"), [(2, 2), (9, 4)])
def test_epoch_that_a_hook_ends(port, at, steps):
    class Ending(BoringModel):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == at else None

    run = fit(port(Ending)(), max_epochs=3)
    assert run.global_step == 3 * steps
    assert run.fit_loop.batch_idx == min(at, 3)


def test_stop_in_the_middle_of_an_epoch(port):
    class Stopping(BoringModel):
        validated = ()

        def training_step(self, batch, batch_idx):
            self.trainer.should_stop = batch_idx == 2
            return super().training_step(batch, batch_idx)

        def on_validation_start(self):
            self.validated += ((self.current_epoch, self.global_step),)

    model = port(Stopping)()
    run = fit(model, max_epochs=5, limit_train_batches=8)
    assert (run.current_epoch, run.global_step, model.validated) == (1, 3, ((0, 3),))


@pytest.mark.parametrize(("least", "validations", "steps"), [({"min_epochs": 3}, 3, 6), ({"min_steps": 3}, 2, 3)])
def test_stop_waits_for_the_least(port, least, validations, steps):
    class Logging(BoringModel):
        validations = 0

        def training_step(self, batch, batch_idx):
            loss = self.step(batch)
            self.log("loss", loss)
            return loss

        def on_validation_start(self):
            self.validations += 1

    model = port(Logging)()
    stopping = EarlyStopping("loss", check_on_train_epoch_end=True, stopping_threshold=100.0)
    run = fit(model, max_epochs=4, limit_train_batches=2, callbacks=[stopping], **least)
    assert (model.validations, run.global_step) == (validations, steps)


def test_number_of_backward_passes(port):
    model = port(BoringModel)()
    with patch("torch.Tensor.backward") as backward:
        run = fit(model)
        assert backward.call_count == 4
        run.test(model, verbose=False)
    assert backward.call_count == 4


def configured(port, make):
    class Configured(BoringModel):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return make(optimizer)

    return port(Configured)()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: ([o], [ReduceLROnPlateau(o)]), "must include a monitor"),
        (lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": ReduceLROnPlateau(o)}}, "must include a monitor"),
        (lambda o: ([o], [{"scheduler": StepLR(o, 1), "interval": "week"}]), 'The "interval" key'),
        (lambda o: {"optimizer": o, "lr_scheduler": {}}, 'must have the key "scheduler"'),
        (lambda o: ([o], [StepLR(torch.optim.SGD(o.param_groups[0]["params"]), 1)]), "wasn't returned"),
        (lambda o: 1, "Unknown configuration"),
        (
            lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": ReduceLROnPlateau(o), "monitor": "nothing"}},
            "which is not available",
        ),
    ],
    ids=["plateau", "plateau in a dictionary", "interval", "no scheduler", "optimizer", "number", "monitor"],
)
def test_configurations_that_lightning_refuses(port, make, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(configured(port, make))


def test_scheduler_that_may_miss_its_metric(port):
    config = {"monitor": "nothing", "strict": False}
    model = configured(port, lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": ReduceLROnPlateau(o), **config}})
    with pytest.warns(RuntimeWarning, match="which is not available but strict"):
        assert fit(model).global_step == 4


def test_no_optimizer(port):
    model = configured(port, lambda o: None)
    before = clones(model.parameters())
    with pytest.warns(UserWarning, match="will run with no optimizer"):
        fit(model)
    assert_same_bits(model.parameters(), before)


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_several_optimizers_do_not_matter_for_evaluation(port, name):
    model, run = configured(port, lambda o: [o, o]), trainer(fast_dev_run=2)
    getattr(run, name)(model, datamodule=BoringDataModule())
    assert run.optimizers == run.lr_scheduler_configs == []


@pytest.mark.parametrize(
    ("options", "rate"), [({}, 1e-2), ({"val_check_interval": 0.5}, 1e-2), ({"check_val_every_n_epoch": 2}, 1e-2)]
)
def test_scheduler_by_the_epoch(port, options, rate):
    run = fit(configured(port, lambda o: ([o], [StepLR(o, 1)])), max_epochs=2, **options)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("every", [None, 4])
def test_scheduler_is_stepped_before_a_checkpoint_is_written(port, every, interval, tmp_path):
    config = {"interval": interval}
    model = configured(port, lambda o: ([o], [{"scheduler": StepLR(o, 1, gamma=10), **config}]))
    fit(model, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=every)], enable_checkpointing=True)
    (file,) = tmp_path.glob("*.ckpt")
    (scheduler,) = torch.load(file, weights_only=True)["lr_schedulers"]
    steps = 1 if interval == "epoch" else 4
    assert (scheduler["_step_count"], scheduler["_last_lr"]) == (1 + steps, [10.0**steps])


def test_names_of_what_is_logged_where(port):
    kinds = {"s": {"on_step": True, "on_epoch": False}, "e": {"on_step": False, "on_epoch": True}}
    kinds["se"] = {"on_step": True, "on_epoch": True}

    class Logging(BoringModel):
        def training_step(self, batch, batch_idx):
            loss = self.step(batch)
            for name, options in kinds.items():
                self.log(f"l_{name}", loss, prog_bar=False, logger=True, **options)
                self.log(f"p_{name}", loss, prog_bar=True, logger=False, **options)
            return loss

        def on_train_epoch_end(self):
            self.log("end", torch.tensor(2.0), prog_bar=True)

    run = fit(port(Logging)(), max_epochs=2)
    extra = {"train/loss"}
    assert set(run.logged_metrics) - extra == {"l_s", "l_e", "l_se_step", "l_se_epoch", "end"}
    assert set(run.progress_bar_metrics) - extra == {"p_s", "p_e", "p_se_step", "p_se_epoch", "end"}
    both = set(run.logged_metrics) | set(run.progress_bar_metrics)
    assert set(run.callback_metrics) - extra == (both | {"l_se", "p_se"}) - extra
    assert run.callback_metrics["l_se"] == run.callback_metrics["p_e"] != run.callback_metrics["l_s"]


@pytest.mark.parametrize(("reduce", "value"), [(min, 0), (torch.max, 3), ("avg", 1.5), ("SUM", 6)])
def test_reductions_over_an_epoch(port, reduce, value):
    class Logging(BoringModel):
        def training_step(self, batch, batch_idx):
            self.log("number", torch.tensor(batch_idx), on_step=False, on_epoch=True, reduce_fx=reduce)
            return super().training_step(batch, batch_idx)

    assert fit(port(Logging)(), max_epochs=2).callback_metrics["number"] == value


def test_callback_that_logs(port):
    class Logging(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.log("start", 7.0)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.log("before", float(batch_idx), on_step=True, on_epoch=True)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.log("after", 10.0 * batch_idx, on_step=False, on_epoch=True)
            with pytest.raises(MisconfigurationException, match="is not useful"):
                pl_module.log("nothing", 0.0, on_step=False, on_epoch=False)

    seen = fit(port(BoringModel)(), callbacks=[Logging()]).callback_metrics
    values = {name: seen[name].item() for name in ("start", "before_step", "before_epoch", "after")}
    assert values == {"start": 7.0, "before_step": 3.0, "before_epoch": 1.5, "after": 15.0}


def test_gradient_norm_that_a_hook_logs(port):
    class Norms(BoringModel):
        def on_before_optimizer_step(self, optimizer):
            self.log_dict(grad_norm(self, 2))
            self.norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm()

    model = port(Norms)()
    assert fit(model).callback_metrics["grad_2.0_norm_total"] == pytest.approx(model.norm.item())


def test_optimizer_that_a_step_reads_and_a_hook_steps(port):
    class Reading(BoringModel):
        def on_train_start(self):
            assert not isinstance(self.trainer.optimizers[0], LightningOptimizer)
            self.trainer.optimizers[0].param_groups[0]["lr"] = 2.0

        def training_step(self, batch, batch_idx):
            assert isinstance(self.optimizers(), LightningOptimizer)
            assert self.optimizers().param_groups[0]["lr"] == 2.0
            self.last = self.step(batch)
            return self.last

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            assert optimizer.state is optimizer.optimizer.state
            assert optimizer.step(closure=optimizer_closure) == self.last

    assert fit(port(Reading)()).global_step == 4


def test_gradients_are_freed_by_the_hook_alone(port):
    class Seldom(BoringModel):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            if batch_idx % 2 == 0:
                optimizer.zero_grad()

    with patch("torch.optim.SGD.zero_grad") as zero_grad:
        fit(port(Seldom)())
    assert zero_grad.call_count == 2


def test_learning_rate_search_then_two_fits(port):
    model = port(BoringModel)()
    model.lr = 0.2
    run = trainer(limit_train_batches=4, limit_val_batches=0)
    Tuner(run).lr_find(model, num_training=5, update_attr=False)
    for epochs in (1, 2):
        run.fit_loop.max_epochs = epochs
        run.fit(model)
        assert model.optimizers().optimizer is run.optimizers[0]
        assert run.global_step == 4 * epochs


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_without_batch_idx(port, accumulate):
    class Short(BoringModel):
        steps = ()

        def training_step(self, images):
            return self.step(images)

        def optimizer_step(self, epoch, batch_idx, *args, **kwargs):
            self.steps += (batch_idx,)
            super().optimizer_step(epoch, batch_idx, *args, **kwargs)

    model = port(Short)()
    fit(model, accumulate_grad_batches=accumulate)
    assert model.steps == ((0, 1, 2, 3) if accumulate == 1 else (1, 3))


def test_loader_that_yields_none(port):
    class Holes(BoringModel):
        def train_dataloader(self):
            batches = [None if number % 2 else default_collate([torch.ones(32)]) for number in range(4)]
            return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert (outputs is None) is (batch_idx % 2 == 1)

    with pytest.warns(UserWarning, match="train_dataloader yielded None"):
        assert fit(port(Holes)()).global_step == 2


def test_anomaly_in_the_backward(port):
    class Anomalous(BoringModel):
        def training_step(self, batch, batch_idx):
            return self.step(batch) * float("nan")

        def backward(self, loss):
            loss.backward()

    with pytest.raises(RuntimeError, match="returned nan values"):
        fit(port(Anomalous)(), detect_anomaly=True)


# Checkpoints.


def test_resumed_run_does_not_validate_first(port, tmp_path):
    run = fit(port(BoringModel)())
    run.save_checkpoint(tmp_path / "end.ckpt")
    seen = []
    model = port(recorder(BoringModel, seen, ["on_validation_start", "on_train_start"]))()
    assert fit(model, ckpt_path=tmp_path / "end.ckpt", max_epochs=2).global_step == 8
    assert seen == ["on_train_start", "on_validation_start"]


class Numbers:
    """A loader of numbers, which may know where it is."""

    def __init__(self, start):
        self.at = start

    def __iter__(self):
        for at in range(self.at, 10):
            self.at = at
            yield at

    def __len__(self):
        return 10


class StatefulNumbers(Numbers):
    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"] + 1


@pytest.mark.parametrize(
    ("make", "before", "after", "warns"),
    [
        (lambda: StatefulNumbers(0), [0, 1], [2, 3], False),
        (lambda: CombinedLoader(Numbers(0)), [0, 1], [0, 1], True),
        (lambda: CombinedLoader([StatefulNumbers(3), StatefulNumbers(1)]), [[3, 1], [4, 2]], [[5, 3], [6, 4]], False),
        (lambda: CombinedLoader([Numbers(3), StatefulNumbers(1)]), [[3, 1], [4, 2]], [[3, 3], [4, 4]], True),
    ],
    ids=["stateful", "plain", "two", "mixed"],
)
def test_batches_after_resuming(port, make, before, after, warns, tmp_path, recwarn):
    class Counting(BoringModel):
        def __init__(self):
            super().__init__()
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return self.step(torch.ones(1, 32))

        def train_dataloader(self):
            return make()

    options = {"max_epochs": -1, "limit_train_batches": 1.0, "limit_val_batches": 0}
    first, second = port(Counting)(), port(Counting)()
    fit(first, max_steps=2, **options).save_checkpoint(tmp_path / "two.ckpt")
    recwarn.clear()
    fit(second, max_steps=4, ckpt_path=tmp_path / "two.ckpt", **options)
    assert (first.seen, second.seen) == (before, after)
    assert any("ended before the epoch ended" in str(warning.message) for warning in recwarn) is warns


def test_checkpoint_of_weights_and_nothing_else(port, tmp_path):
    model = port(BoringModel)()
    state = {"state_dict": clones_of(model), "optimizer_states": {}, "lr_schedulers": {}}
    torch.save({**state, "pytorch-lightning_version": "2.0.0"}, tmp_path / "old.ckpt")
    other = port(BoringModel)()
    other.on_train_start = lambda: assert_same_bits(other.state_dict().values(), state["state_dict"].values())
    assert fit(other, ckpt_path=tmp_path / "old.ckpt").global_step == 4


def clones_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_states_of_callbacks(port, tmp_path, recwarn):
    class Stateful(Callback):
        state = 1

        def state_dict(self):
            return {"state": self.state}

        def load_state_dict(self, state_dict):
            self.state = state_dict["state"] + 1

    def both():
        return [Stateful(), ModelCheckpoint(tmp_path, filename="end", monitor="epoch")]

    def resumed(callbacks):
        recwarn.clear()
        options = {"enable_checkpointing": True, "ckpt_path": tmp_path / "end.ckpt", "max_epochs": 2}
        fit(port(BoringModel)(), callbacks=callbacks, **options)
        assert callbacks[0].state == 2
        return [str(w.message) for w in recwarn if "Please add the following callbacks" in str(w.message)]

    fit(port(BoringModel)(), callbacks=both(), enable_checkpointing=True)
    assert resumed(both()) == []
    (warning,) = resumed(both()[:1])
    assert "['ModelCheckpoint{" in warning or '["ModelCheckpoint{' in warning
    assert "TrainerSupport" not in warning


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_steps_counted_up_to_an_exception(port, accumulate, tmp_path):
    class Failing(BoringModel):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 2:
                raise ConnectionError
            return super().training_step(batch, batch_idx)

    callbacks = [OnExceptionCheckpoint(tmp_path)]
    with pytest.raises(ConnectionError):
        fit(
            port(Failing)(),
            max_epochs=2,
            callbacks=callbacks,
            accumulate_grad_batches=accumulate,
            enable_checkpointing=True,
        )
    steps = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["global_step"]
    # An epoch has four batches; what is left over at its end makes an update, too.
    assert steps == {1: 4 + 2, 2: 2 + 1, 3: 2 + 0}[accumulate]


# The tool that runs Lightning's own tests.

LIKE_LIGHTNINGS = """
import copy, pickle
import pytest, torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}

def test_passes_with_both():
    class TestModel(BoringModel):
        steps = 0
        def training_step(self, batch, batch_idx):
            self.steps += 1
            return super().training_step(batch, batch_idx)
    model = TestModel()
    Trainer(max_steps=3, **QUIET).fit(model)
    assert model.steps == 3 and type(model).__name__ == "TestModel" and isinstance(model, TestModel)
    assert type(copy.deepcopy(model)) is type(model)
    assert type(pickle.loads(pickle.dumps(BoringModel()))) is type(BoringModel())

def test_step_that_is_assigned():
    model, seen = BoringModel(), []
    def step(batch, batch_idx):
        seen.append(batch_idx)
        return model.step(batch)
    model.training_step = step
    Trainer(max_steps=3, **QUIET).fit(model)
    assert seen == [0, 1, 2]

def test_by_hand():
    BoringModel().automatic_optimization = False

def test_that_only_automatic_optimization_passes():
    model = BoringModel()
    Trainer(max_steps=1, **QUIET).fit(model)
    assert "SharpnessAwareMixin" not in str(type(model).__mro__), "trained by\\nthe mixin"

@pytest.fixture
def broken():
    yield
    assert "SharpnessAwareMixin" not in str(type(BoringModel()).__mro__)

def test_whose_teardown_fails(broken):
    pass

def test_that_fails_with_both():
    assert False

@pytest.mark.skip
def test_skipped():
    pass
"""


def run_pytest(arguments, environment):
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    pytest.main(arguments)


def start_pytest(command, cwd, env, check):
    """Instead of the command: pytest in a process that need not import torch and Lightning."""
    assert command[:3] == [sys.executable, "-m", "pytest"]
    process = start_process(run_pytest, command[3:], env, folder=cwd)
    process.join()


def test_tool(tmp_path, monkeypatch, capsys):
    """Its run with the mixin, beside the outcomes of one without, which are known."""
    monkeypatch.setattr(boring.subprocess, "run", start_pytest)
    folder = tmp_path / "tests" / "tests_pytorch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "test_like.py").write_text(LIKE_LIGHTNINGS)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nxfail_strict = true\n")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "version.info").write_text("1.0.0\n")
    name, run = "tests/tests_pytorch/test_like.py::test_", boring.run
    tests = re.findall(r"def test_(\w+)", LIKE_LIGHTNINGS)
    automatic = {f"{name}{test}": ("passed", "") for test in tests}
    automatic |= {f"{name}that_fails_with_both": ("failed", ""), f"{name}skipped": ("skipped", "")}
    monkeypatch.setattr(boring, "run", lambda mode, *args: automatic if mode == "automatic" else run(mode, *args))
    options = ["--lightning", str(tmp_path), "--tests", "tests_pytorch/test_like.py", "-W", "ignore"]
    monkeypatch.setattr(sys, "argv", ["boring.py", *options])
    with pytest.raises(SystemExit) as end:
        boring.main()
    assert end.value.code == 1
    report = capsys.readouterr().out.splitlines()
    assert report[0].startswith("The checkout is of 1.0.0, the installed Lightning is ")
    assert report[1] == "automatic: 1 failed, 5 passed, 1 skipped"
    assert report[2] == "mixin: 4 failed, 2 passed, 1 skipped"
    assert "5 pass with automatic optimization, 2 of them with the mixin, too." in report
    assert "1 do not, documented refusal: the module optimizes by hand already:" in report
    assert "2 do not, without a reason:" in report
    lost = [line.strip() for line in report if "::" in line]
    only_automatic = f"{name}that_only_automatic_optimization_passes"
    assert lost == [f"{name}by_hand", only_automatic, f"{name}whose_teardown_fails"]
    assert report[report.index(f"  {only_automatic}") + 1].startswith("    AssertionError: trained by")


def test_tool_leaves_lightning_alone_without_the_mixin(monkeypatch):
    monkeypatch.setattr(BoringModel, "__new__", BoringModel.__new__)
    for mode, is_ported in (("automatic", False), ("mixin", True)):
        monkeypatch.setenv(boring.MODE, mode)
        boring.pytest_configure(None)
        assert isinstance(BoringModel(), SharpnessAwareMixin) is is_ported


def test_tool_refuses_a_folder_without_the_tests(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["boring.py", "--lightning", str(tmp_path)])
    with pytest.raises(SystemExit):
        boring.main()
    assert f"No such checkout of Lightning: '{tmp_path}' has no folder tests/tests_pytorch." in capsys.readouterr().err


def test_reasons_are_patterns_of_their_own():
    refused = "`M` uses SharpnessAwareMixin, which optimizes manually: do not set `automatic_optimization`."
    assert boring.reason_for("a.py::test", refused) == "documented refusal: the module optimizes by hand already"
    assert boring.reason_for("a.py::test", "AssertionError: assert 1 == 2") is None
    patterns = [pattern for patterns in boring.REASONS.values() for pattern in patterns]
    assert len(set(patterns)) == len(patterns)
    assert Path(boring.__file__).name == "boring.py"
