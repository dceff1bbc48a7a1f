"""The mixin in a Trainer."""

import copy
import csv
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    OBJECTIVES,
    SPLIT,
    STRICT,
    Automatic,
    Model,
    assert_same_bits,
    batches,
    batches_loader,
    clones,
    convbn,
    fit,
    mlp,
    naive_gradient,
    sgd,
    trainer,
)
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from lightning_ssesam import ERM, SAM, SSESAM, ImbSAM, LongTailClassifier, Objective, SharpnessAwareMixin, StageSwitch
from lightning_ssesam.batches import terms_of_union

pytestmark = STRICT


def logged(logger):
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def naive_training(net, objective, data, optimizer):
    for x, y in data:
        gradient = naive_gradient(net, objective.terms(y), x, y)
        for p, g in zip([p for p in net.parameters() if p.requires_grad], gradient, strict=True):
            p.grad = g
        optimizer.step()


def fill_weights(layer):
    if not isinstance(layer.weight, torch.nn.parameter.UninitializedParameter):
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 1, layer.weight.numel()).view_as(layer.weight))
            layer.bias.zero_()


class Scriptable(Model):
    def forward(self, inputs):
        return self.net(inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", [{"method": "script"}, {"method": "trace", "example_inputs": torch.randn(3, 8)}])
def test_to_torchscript(options):
    for model in (Scriptable(objective=SSESAM(SPLIT)), LongTailClassifier([50, 40, 30, 6, 5], nn.Linear(8, 5))):
        inputs = torch.randn(2, 8)
        torch.testing.assert_close(model.to_torchscript(**options)(inputs), model(inputs), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("float64")
class TestTraining:
    @pytest.mark.parametrize("passes", ["full", "split", "auto"])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_equals_naive_twin(self, objective, passes):
        data = [*batches(2), *batches(1, classes=range(3)), *batches(1, classes=[4]), *batches(1, n=5)]
        model = Model(objective=OBJECTIVES[objective](), passes=passes)
        twin = copy.deepcopy(model.net)
        fit(model, data)
        naive_training(twin, OBJECTIVES[objective](), data, sgd(twin.parameters()))
        torch.testing.assert_close(list(model.net.parameters()), list(twin.parameters()), rtol=0, atol=1e-13)

    def test_erm_equals_automatic_optimization(self):
        net, data = convbn(), batches(shape=(3, 5, 5))
        ours, automatic = Model(copy.deepcopy(net)), Automatic(net)
        fit(ours, data)
        fit(automatic, data)
        torch.testing.assert_close(ours.net.state_dict(), automatic.net.state_dict(), rtol=0, atol=1e-15)

    def test_several_parameter_groups_and_frozen_parameters(self):
        def groups(params):
            return torch.optim.SGD([{"params": weights, "lr": 0.3}, {"params": biases, "weight_decay": 0.1}], lr=0.1)

        model, data = Model(objective=SSESAM(SPLIT)), batches()
        model.net[0].weight.requires_grad_(False)
        weights, biases = [model.net[0].weight, model.net[2].weight], [model.net[0].bias, model.net[2].bias]
        model.make_optimizer = groups
        twin = copy.deepcopy(model.net)
        fit(model, data)
        weights, biases = [twin[0].weight, twin[2].weight], [twin[0].bias, twin[2].bias]
        naive_training(twin, SSESAM(SPLIT), data, groups(None))
        torch.testing.assert_close(list(model.net.parameters()), list(twin.parameters()), rtol=0, atol=1e-14)

    def test_unused_parameters_stay(self):
        model = Model(objective=SSESAM(SPLIT))
        model.unused = nn.Parameter(torch.randn(4))
        before = model.unused.detach().clone()
        fit(model, batches())
        assert torch.equal(model.unused, before)

    def test_fine_tuning_with_frozen_batch_norm_takes_split_passes(self):
        class FrozenNorm(Model):
            def on_train_batch_start(self, batch, batch_idx):
                self.net[1].eval()

        net, data = convbn(), batches(shape=(3, 5, 5))
        net[1].running_mean.uniform_()
        for p in net[1].parameters():
            p.requires_grad_(False)
        models = [FrozenNorm(copy.deepcopy(net), SSESAM(SPLIT), passes) for passes in ("full", "auto")]
        calls = []
        models[1].net.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
        for model in models:
            fit(model, data)
        # The first five measure whether samples mix: the batch three times, and each group alone.
        assert sum(calls[:5]) == 3 * 24 + 24
        assert sum(calls[5:]) == 2 * 24 * len(data)
        torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=1e-14)
        assert_same_bits(models[0].net[1].buffers(), net[1].buffers())

    @pytest.mark.parametrize("passes", ["auto", "full", "split"])
    def test_lazy_modules(self, passes):
        """They end with the weights of modules that were made at once."""
        lazy_norm, norm = (nn.Tanh(), nn.Tanh()) if passes == "split" else (nn.LazyBatchNorm1d(), nn.BatchNorm1d(16))
        lazy = nn.Sequential(nn.LazyLinear(16), lazy_norm, nn.LazyLinear(5))
        made = nn.Sequential(nn.Linear(8, 16), norm, nn.Linear(16, 5))
        # Lazy layers reset their parameters when they make them.
        for layer in (lazy[0], lazy[2], made[0], made[2]):
            layer.reset_parameters = partial(fill_weights, layer)
            layer.reset_parameters()
        models = [Model(net, SSESAM(SPLIT), passes) for net in (lazy, made)]
        data = batches()
        for model in models:
            fit(model, data)
        torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=1e-14)

    def test_mixup_and_cutmix(self):
        class Mixed(Model):
            def __init__(self, *args):
                super().__init__(*args)
                self.mix = v2.RandomChoice([v2.MixUp(num_classes=5), v2.CutMix(num_classes=5)])
                self.mixed = []

            def on_after_batch_transfer(self, batch, dataloader_idx):
                self.mixed.append(self.mix(*batch))
                return self.mixed[-1]

        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
        for passes in ("full", "split"):
            model = Mixed(copy.deepcopy(net), SSESAM(SPLIT), passes)
            fit(model, batches(shape=(3, 4, 4)))
            assert all(y.shape == (24, 5) for _, y in model.mixed)
            twin = copy.deepcopy(net)
            naive_training(twin, SSESAM(SPLIT), model.mixed, sgd(twin.parameters()))
            torch.testing.assert_close(list(model.net.parameters()), list(twin.parameters()), rtol=0, atol=1e-14)

    def test_dense_targets(self):
        net = nn.Conv2d(3, 5, 3, padding=1)
        data = [(torch.randn(4, 3, 6, 6), torch.randint(5, (4, 6, 6))) for _ in range(3)]
        model = Model(copy.deepcopy(net), SSESAM(SPLIT))
        fit(model, data)
        naive_training(net, SSESAM(SPLIT), data, sgd(net.parameters()))
        torch.testing.assert_close(list(model.net.parameters()), list(net.parameters()), rtol=0, atol=1e-14)

    def test_empty_batch_trains_on(self):
        model = Model(objective=SSESAM(SPLIT), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        before = clones(model.parameters())
        run = fit(model, batches(1, n=0))
        assert "train/loss" not in run.callback_metrics
        assert_same_bits(model.parameters(), before)

    def test_ragged_last_batch(self):
        model = Model(objective=ImbSAM(SPLIT, reduction="group"))
        run = fit(model, [*batches(2), *batches(1, n=1)])
        assert run.global_step == 3
        assert all(p.isfinite().all() for p in model.parameters())


class TestCounting:
    def test_steps_and_checkpoints_as_under_automatic_optimization(self, tmp_path):
        seen = {}
        for kind in (lambda: Model(objective=SSESAM(SPLIT)), Automatic):
            model = kind()
            folder = tmp_path / type(model).__name__
            checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
            run = fit(model, batches(7), max_epochs=3, max_steps=9, callbacks=[checkpoint], enable_checkpointing=True)
            seen[folder.name] = (run.global_step, run.current_epoch, sorted(file.name for file in folder.iterdir()))
        assert seen["Model"] == seen["Automatic"]
        assert seen["Model"][0] == 9
        assert seen["Model"][2] == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt", "step=8.ckpt"]

    def test_logged_rows_as_under_automatic_optimization(self, tmp_path):
        rows = {}
        for model in (Model(), Automatic()):
            logger = CSVLogger(tmp_path, name=type(model).__name__)
            fit(model, batches(6), max_epochs=2, logger=logger, log_every_n_steps=2)
            rows[logger.name] = [int(row["step"]) for row in logged(logger) if row["train/loss"]]
        assert rows["Model"] == rows["Automatic"] == [1, 3, 5, 7, 9, 11]

    def test_hooks_see_the_final_gradient_once_a_step(self):
        class Seen(Callback):
            gradients = ()

            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                self.gradients = (*self.gradients, clones(p.grad for p in pl_module.parameters()))

        torch.manual_seed(0)
        seen, data = Seen(), batches(1)
        model = Model(objective=SSESAM(SPLIT))
        twin = copy.deepcopy(model.net)
        fit(model, data, callbacks=[seen])
        assert len(seen.gradients) == 1
        expected = naive_gradient(twin, SSESAM(SPLIT).terms(data[0][1]), *data[0])
        torch.testing.assert_close(list(seen.gradients[0]), expected, rtol=1e-5, atol=1e-7)
        assert all(p.grad is None for p in model.parameters())

    def test_train_loss_is_the_clean_loss_on_the_progress_bar(self):
        class Seen(TQDMProgressBar):
            def on_train_batch_end(self, trainer, pl_module, *args):
                shown.append(self.get_metrics(trainer, pl_module).get("train/loss"))
                super().on_train_batch_end(trainer, pl_module, *args)

        data, shown, made = batches(1), [], Seen()
        model = Model(objective=SSESAM(SPLIT))
        expected = F.cross_entropy(model.net(data[0][0]), data[0][1]).item()
        run = fit(model, data, callbacks=[made], enable_progress_bar=True)
        assert run.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-6)
        assert shown == [pytest.approx(expected, rel=1e-6)]
        assert run.progress_bar_metrics["train/loss"] == pytest.approx(expected, rel=1e-6)

    def test_bar_of_ones_own(self):
        class Hiding(TQDMProgressBar):
            def get_metrics(self, trainer, pl_module):
                metrics = super().get_metrics(trainer, pl_module)
                seen.append(metrics.pop("train/loss", None))
                return metrics

            def on_train_batch_end(self, trainer, pl_module, *args):
                shown.append(self.get_metrics(trainer=trainer, pl_module=pl_module))

        class Logging(Model):
            def on_train_batch_end(self, *args):
                self.log("own", 42.0, prog_bar=True)

        shown, seen = [], []
        fit(Logging(), batches(2), callbacks=[Hiding()], enable_progress_bar=True)
        assert [metrics.get("train/loss") for metrics in shown] == [None, None]
        assert shown[1]["own"] == 42
        assert all(value > 0 for value in seen)


def exponential(interval="epoch", **kwargs):
    return lambda optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            "interval": interval,
            **kwargs,
        },
    }


def test_scheduler_support_is_undone_and_redone(tmp_path):
    model, run = Model(scheduler=exponential()), trainer(max_epochs=2)
    run.fit(model, batches_loader(batches(2)))
    assert "_update_learning_rates" not in vars(run.fit_loop.epoch_loop)
    assert "setup_optimizers" not in vars(run.strategy)
    run.fit_loop.max_epochs = 4
    run.fit(model, batches_loader(batches(2)))
    assert sum(type(callback).__name__ == "TrainerSupport" for callback in run.callbacks) == 1
    assert model.automatic_optimization is False
    # The second call builds its own optimizer and scheduler, and steps them twice more.
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**2)


def test_learning_rate_monitor(tmp_path):
    logger = CSVLogger(tmp_path)
    model = Model(scheduler=exponential("step"))
    fit(model, batches(3), logger=logger, log_every_n_steps=1, callbacks=[LearningRateMonitor("step")])
    rates = [float(row["lr-SGD"]) for row in logged(logger) if row["lr-SGD"]]
    assert rates == pytest.approx([0.1, 0.09, 0.081])


class Logging(Model):
    """Logs and counts in every way that a user may, in ``sample_losses``."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accuracy = MulticlassAccuracy(5, average="micro")
        self.passes_seen, self.samples_seen = [], 0

    def sample_losses(self, batch):
        inputs, targets = batch
        logits = self.net(inputs)
        losses = F.cross_entropy(logits, targets, reduction="none")
        self.passes_seen.append(self.in_clean_pass)
        if self.in_clean_pass:
            self.samples_seen += len(targets)
            self.accuracy.update(logits, targets)
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.log("mean", losses.mean(), on_step=True, on_epoch=True)
        self.log_dict({"samples": float(len(targets)), "largest": losses.max()}, reduce_fx="sum", on_epoch=True)
        self.log("smallest", losses.min(), False, None, True, True, "min")
        return losses


@pytest.mark.parametrize("passes", ["full", "split"])
def test_what_sample_losses_logs_counts_once(passes):
    torch.manual_seed(1)
    data = [*batches(2), *batches(1, classes=[0, 1])]
    net = mlp()
    model = Logging(copy.deepcopy(net), SSESAM(SPLIT), passes, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    run = fit(model, data)
    losses = [F.cross_entropy(net(x), y, reduction="none").detach() for x, y in data]
    correct = torch.cat([net(x).argmax(1) == y for x, y in data])
    seen = {name: value.item() for name, value in run.callback_metrics.items()}
    assert seen["accuracy"] == pytest.approx(correct.float().mean().item())
    assert seen["mean_step"] == pytest.approx(losses[-1].mean().item(), rel=1e-5)
    assert seen["mean_epoch"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert seen["smallest_epoch"] == pytest.approx(torch.cat(losses).min().item(), rel=1e-5)
    assert seen["samples_epoch"] == 72
    assert model.samples_seen == 72
    # A batch without tail needs one clean and one perturbed pass less where passes are split.
    assert model.passes_seen.count(True) == {"full": 3, "split": 5}[passes]
    assert model.passes_seen.count(False) == {"full": 6, "split": 5}[passes]
    assert model.in_clean_pass is False


def test_a_failed_step_logs_nothing_later():
    class Failing(Logging):
        def sample_losses(self, batch):
            losses = super().sample_losses(batch)
            if not self.in_clean_pass and self.fail:
                raise ConnectionError
            return losses

    model = Failing(objective=SSESAM(SPLIT), passes="split")
    model.fail = True
    with pytest.raises(ConnectionError):
        fit(model, batches(1))
    model.fail = False
    run = fit(model, batches(1))
    assert run.callback_metrics["samples_epoch"] == 24


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_fault_in_a_pass_of_a_training(error, number):
    """The third step fails in its clean, first or second perturbed forward."""

    class Faulty(Model):
        calls = 0

        def on_train_batch_start(self, batch, batch_idx):
            self.before = clones(
                [*self.parameters(), *self.buffers(), *(p.grad for p in self.parameters()), torch.get_rng_state()]
            )
            self.momentum = copy.deepcopy(self.optimizers().optimizer.state_dict())

        def sample_losses(self, batch):
            losses = super().sample_losses(batch)
            self.calls += 1
            if self.calls == 6 + number:
                raise error("injected")
            return losses

    class Witness(Callback):
        def on_exception(self, trainer, pl_module, exception):
            self.state = clones(pl_module.parameters())

    model, witness = Faulty(convbn(), SSESAM(SPLIT)), Witness()
    data = batches(4, shape=(3, 5, 5))
    with pytest.raises((error, SystemExit)):
        fit(model, data, callbacks=[witness])
    now = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
    assert_same_bits(now, model.before)
    assert_same_bits(witness.state, list(model.parameters()))
    assert all(module.training for module in model.modules())
    momentum = model.trainer.optimizers[0].state_dict()
    for key, state in model.momentum["state"].items():
        assert torch.equal(state["momentum_buffer"], momentum["state"][key]["momentum_buffer"])
    assert model.trainer.global_step == 2
    # It trains on as if nothing had been.
    model.calls = 100
    fit(model, data)


@pytest.mark.parametrize("form", ["pair", "list", "target", "label", "labels", "own"])
@pytest.mark.parametrize("passes", ["full", "split"])
def test_forms_of_batches(form, passes):
    class AnyForm(Model):
        def sample_losses(self, batch):
            if form in ("pair", "list"):
                x, y = batch
            elif form == "own":
                x, y = batch["inputs"]["x"], batch["extra"][0]
                assert batch["temperature"].shape == ()
                assert batch["name"] == "digits"
                assert batch["files"] == [f"{value}.png" for value in y.tolist()]
            else:
                x, y = batch["inputs"]["x"], batch[form]
            return F.cross_entropy(self.net(x), y, reduction="none")

        def sample_targets(self, batch):
            return batch["extra"][0] if form == "own" else super().sample_targets(batch)

    def shaped(x, y):
        if form == "pair":
            return x, y
        if form == "list":
            return [x, y]
        if form == "own":
            files = [f"{value}.png" for value in y.tolist()]
            extra = {"temperature": torch.tensor(1.0), "name": "digits", "files": files}
            return {"inputs": {"x": x}, "extra": (y, None), **extra}
        return {"inputs": {"x": x}, form: y}

    data, net = batches(2), mlp()
    model = AnyForm(copy.deepcopy(net), SSESAM(SPLIT), passes)
    fit(model, [shaped(x, y) for x, y in data])
    naive_training(net, SSESAM(SPLIT), data, sgd(net.parameters()))
    torch.testing.assert_close(list(model.net.parameters()), list(net.parameters()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ((torch.ones(2, 8), torch.ones(2).long(), torch.ones(2)), "a list of 3 items"),
        ({"x": torch.ones(2, 8)}, r"a mapping with the keys \['x'\]"),
        (torch.ones(2, 8), "a Tensor"),
    ],
)
def test_batches_without_targets(batch, got):
    message = f"a pair .* or a mapping .*, but got {got}. Override `sample_targets"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Model(), [batch])


class TestMisuse:
    """One clear error, before the first batch where it can be known."""

    def refused(self, model, message, **kwargs):
        started = []
        model.on_train_batch_end = lambda *args: started.append(args)
        with pytest.raises(MisconfigurationException, match=message):
            fit(model, batches(1), **kwargs)
        assert not started

    def test_no_sample_losses(self):
        class Without(SharpnessAwareMixin):
            def __init__(self):
                super().__init__()
                self.net, self.objective = mlp(), ERM()

            configure_optimizers = Automatic.configure_optimizers

        self.refused(Without(), r"`Without` uses SharpnessAwareMixin and must define `sample_losses\(self, batch\)`")
        with pytest.raises(NotImplementedError, match="`Without` must define `sample_losses"):
            Without().sample_losses(None)

    @pytest.mark.parametrize("objective", [None, 0.05, "SAM", SAM])
    def test_no_objective(self, objective):
        model = Model()
        model.objective = objective
        self.refused(model, "`Model` uses SharpnessAwareMixin and must set `self.objective` to an Objective")

    def test_objective_never_set(self):
        model = Model()
        del model.objective
        self.refused(model, "must set `self.objective` to an Objective, such as .*, but it is None")

    def test_unbound_objective(self):
        self.refused(Model(objective=SSESAM()), "`Model` cannot train as it is. SSESAM does not know which classes")

    def test_no_step_options(self):
        model = Model()
        model.step_options = {"passes": "split"}
        self.refused(model, r"`Model.step_options` must be a StepOptions, such as .*, but it is {'passes': 'split'}")

    def test_split_passes_with_batch_norm(self):
        model = Model(nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)), SAM(0.1), "split")
        self.refused(model, "`passes='split'` cannot work with `net.1`, .* or put batch norm in evaluation mode")

    def test_lbfgs(self):
        self.refused(Model(optimizer=torch.optim.LBFGS), "LBFGS evaluates the loss several times a step")

    def test_training_step_left_in_the_class(self):
        class Left(Model):
            def training_step(self, batch, batch_idx):
                return self.sample_losses(batch).mean()

        model = Left()
        with pytest.raises(MisconfigurationException, match=r"`Left.training_step` takes the place of Sharp"):
            fit(model, batches(3))

    @pytest.mark.parametrize("compiled", [False, True])
    def test_training_step_assigned_to_the_module(self, compiled):
        model = Model()
        step = lambda batch, batch_idx: model.sample_losses(batch).mean()  # noqa: E731
        model.training_step = torch.compile(step, backend="eager") if compiled else step
        with pytest.raises(MisconfigurationException, match=r"`Model.training_step` takes the place of Sharp"):
            fit(model, batches(3))

    def test_several_optimizers(self):
        model = Model(scheduler=lambda optimizer: [optimizer, optimizer])
        self.refused(model, "`Model.configure_optimizers` must return one optimizer under SharpnessAwareMixin")

    def test_automatic_optimization_switched_on(self):
        for value in (True, False):
            with pytest.raises(MisconfigurationException, match=r"`Model` uses .* which optimizes manually"):
                Model().automatic_optimization = value

    def test_callbacks_dropped(self):
        class Own(Model):
            def configure_callbacks(self):
                return []

        self.refused(
            Own(), r"`Own.configure_callbacks` overrides .* Return `\[\*super\(\).configure_callbacks\(\), \.\."
        )

    def test_scheduler_without_monitor(self):
        def without_monitor(optimizer):
            return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]

        self.refused(Model(scheduler=without_monitor), "`configure_optimizers` must include a monitor")

    @pytest.mark.parametrize("objective", [ERM(), SSESAM(SPLIT)])
    def test_reduced_losses(self, objective):
        class Reduced(Model):
            def sample_losses(self, batch):
                return super().sample_losses(batch).mean()

        with pytest.raises(ValueError, match=r"Expected `sample_losses` to return one unreduced loss for each target"):
            fit(Reduced(objective=objective, passes="full"), batches(1))

    def test_targets_out_of_range(self):
        with pytest.raises(ValueError, match=r"Expected argument `targets` to be class indices in \[0, 5\)"):
            fit(Model(objective=SSESAM(SPLIT)), [(torch.randn(3, 8), torch.tensor([0, 1, 5]))])


def test_own_callbacks_beside_the_mixins():
    class Counter(Callback):
        starts = 0

        def on_train_start(self, trainer, pl_module):
            self.starts += 1

    class Own(Model):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), counter]

    counter = Counter()
    run = fit(Own(), batches(1))
    assert counter.starts == 1
    assert run.global_step == 1


def test_callbacks_of_the_class_it_is_put_in_front_of():
    class Existing(Automatic):
        def configure_callbacks(self):
            return LearningRateMonitor()

    class Sharp(SharpnessAwareMixin, Existing):
        objective = ERM()
        sample_losses = Model.sample_losses

    run = fit(Sharp(), batches(1), logger=CSVLogger("logs"))
    assert {"LearningRateMonitor", "TrainerSupport"} <= {type(callback).__name__ for callback in run.callbacks}


def test_objective_may_be_bound_in_setup():
    class Late(Model):
        def setup(self, stage):
            self.objective.bind(SPLIT)

    assert fit(Late(objective=SSESAM()), batches(2), callbacks=[StageSwitch(step=1)]).global_step == 2


def test_trainer_serves_other_modules_afterwards():
    """What was put in place for one module is gone for the next."""
    run = trainer(max_epochs=1)
    run.fit(Model(scheduler=exponential()), batches_loader(batches(2)))
    for number, model in enumerate([Automatic(scheduler=exponential()), Model(scheduler=exponential())], start=2):
        before = clones(model.parameters())
        run.fit_loop.max_epochs = number
        run.fit(model, batches_loader(batches(2)))
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert model.automatic_optimization == isinstance(model, Automatic)
        assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.09)


@pytest.mark.parametrize("passes", ["full", "split"])
def test_own_train_loss_takes_the_place_of_the_mixins(passes):
    class Own(Model):
        def sample_losses(self, batch):
            losses = super().sample_losses(batch)
            self.log("train/loss", losses.mean() + 10, on_step=True, on_epoch=True)
            return losses

    run = fit(Own(objective=SSESAM(SPLIT), passes=passes), batches(3))
    assert run.callback_metrics["train/loss_epoch"] > 10
    assert run.callback_metrics["train/loss_step"] > 10


def test_odd_values_are_logged_as_with_full_passes():
    class Odd(Model):
        def sample_losses(self, batch):
            losses = super().sample_losses(batch)
            self.log("one", torch.ones(1))
            self.log("number", 3)
            return losses

    class Unknown(Model):
        def sample_losses(self, batch):
            self.log("x", 1.0, reduce_fx=lambda values: values[0], on_epoch=True)
            return super().sample_losses(batch)

    for passes in ("full", "split"):
        run = fit(Odd(objective=SSESAM(SPLIT), passes=passes), batches(1))
        assert run.callback_metrics["one"] == 1
        assert run.callback_metrics["number"] == 3
        with pytest.raises(MisconfigurationException, match="reduce_fx"):
            fit(Unknown(objective=SSESAM(SPLIT), passes=passes), batches(1))


def test_hyperparameters_may_hold_split_and_objective(tmp_path):
    class Saved(Model):
        def __init__(self, split, objective):
            super().__init__(objective=objective)
            self.save_hyperparameters()

    model = Saved(SPLIT, SSESAM(SPLIT, 0.3, 0.4))
    path = tmp_path / "model.ckpt"
    fit(model, batches(2)).save_checkpoint(path)
    loaded = Saved(**torch.load(path, weights_only=True)["hyper_parameters"])
    assert loaded.objective.tail_rho == 0.4
    assert loaded.hparams.split.tail.tolist() == SPLIT.tail.tolist()
    assert fit(Saved(SPLIT, SAM(0.1)), batches(2), max_epochs=2, ckpt_path=path).global_step == 4


@pytest.mark.parametrize("part", ["module", "network"])
def test_compiled(part):
    frames = []

    def backend(graph, example_inputs):
        frames.append(graph)
        return graph.forward

    net, data = mlp(), batches(3)
    plain, model = Model(copy.deepcopy(net), SSESAM(SPLIT), "full"), Model(copy.deepcopy(net), SSESAM(SPLIT), "full")
    fit(plain, data)
    if part == "network":
        model.net = torch.compile(model.net, backend=backend)
    fit(torch.compile(model, backend=backend) if part == "module" else model, data)
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-5, atol=1e-6)
    assert len(frames) == 1 or part == "module"


def test_scratch_memory_is_freed_when_the_run_ends():
    class Failing(Model):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.size = len(self._SharpnessAwareMixin__step.engine._weights._copies)
            if self.fail:
                raise ConnectionError

    model = Failing(objective=SAM(0.1))
    model.fail = False
    fit(model, batches(1))
    assert (model.size, len(model._SharpnessAwareMixin__step.engine._weights._copies)) == (4, 0)
    model.fail = True
    with pytest.raises(ConnectionError):
        fit(model, batches(1))
    assert (model.size, len(model._SharpnessAwareMixin__step.engine._weights._copies)) == (4, 0)


def test_evaluation_needs_nothing_of_the_training():
    class Evaluated(Model):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.sample_losses(batch).mean())

    model = Evaluated()
    del model.objective
    (metrics,) = trainer().validate(model, batches_loader(batches(2)), verbose=False)
    assert math.isfinite(metrics["val/loss"])


def test_added_to_an_existing_module():
    """In front of a module that has its own constructor and training step."""

    class Existing(Automatic):
        def __init__(self, net, *, scale):
            super().__init__(net)
            self.scale = scale

    class Sharp(SharpnessAwareMixin, Existing):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.objective = SAM(0.05)

        def sample_losses(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    net, data = mlp(), batches(3)
    model = Sharp(copy.deepcopy(net), scale=3)
    assert model.scale == 3
    assert model.automatic_optimization is False
    fit(model, data)
    naive_training(net, SAM(0.05), data, sgd(net.parameters()))
    torch.testing.assert_close(list(model.net.parameters()), list(net.parameters()), rtol=1e-4, atol=1e-6)


def test_objective_of_ones_own():
    class HardestHalf(Objective):
        def terms(self, targets):
            return SAM(0.1).terms(targets)

    data, net = batches(2), mlp()
    model = Model(copy.deepcopy(net), HardestHalf())
    fit(model, data)
    naive_training(net, SAM(0.1), data, sgd(net.parameters()))
    torch.testing.assert_close(list(model.net.parameters()), list(net.parameters()), rtol=1e-4, atol=1e-6)


def test_state_dict_is_that_of_the_plain_module():
    model = Model(objective=SSESAM(SPLIT))
    fit(model, batches(1))
    Automatic().load_state_dict(model.state_dict(), strict=True)
    assert L.LightningModule in type(model).__mro__
    copy.deepcopy(model)


def test_warns_of_stages_that_nothing_switches():
    with pytest.warns(UserWarning, match="SSESAM stays in stage 1, since no StageSwitch is among the callbacks"):
        fit(Model(objective=SSESAM(SPLIT)), batches(1))


@pytest.mark.parametrize(("passes", "selections"), [("full", 0), ("split", 4)])
def test_targets_are_asked_once_for_a_batch_and_once_for_a_selection(passes, selections):
    sizes = []

    class Asked(Model):
        def sample_targets(self, batch):
            sizes.append(len(batch[1]))
            return super().sample_targets(batch)

    (x, y), model = batches(1, n=10)[0], Asked(objective=SSESAM(SPLIT), passes=passes)
    y[:7], y[7:] = 0, 3
    fit(model, [(x, y)])
    assert sizes == [10, 7, 3, 7, 3][: 1 + selections]


def test_selection_that_does_not_fit_its_targets():
    class Forgetful(Model):
        def select_samples(self, batch, index):
            return batch

    message = r"`Forgetful.select_samples` was asked for \d+ samples, but `sample_targets` finds 24 targets"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Forgetful(objective=SSESAM(SPLIT), passes="split"), batches(1))


class Marked(NamedTuple):
    """A term with a field that somebody has added."""

    weights: Tensor
    rho: float
    mark: str


def test_terms_keep_fields_of_their_own_under_accumulation():
    class Marking(ERM):
        def terms(self, targets):
            (term,) = super().terms(targets)
            return (Marked(term.weights, 0.1, "kept"),)

    targets = [torch.tensor([0, 1]), torch.tensor([2, 3, 4])]
    for gather in (None, lambda union: ([union, union], 0)):
        parts = terms_of_union(Marking(), targets, gather)
        assert [[(len(term.weights), term.mark) for term in part] for part in parts] == [[(2, "kept")], [(3, "kept")]]
        scale = 1 if gather is None else 2
        assert parts[0][0].weights.tolist() == [scale / (5 * scale)] * 2


class OfSomebody(ERM):
    """An objective that is defined outside of the package."""


def test_checkpoint_may_hold_an_objective_of_ones_own():
    class Holding(Model):
        def __init__(self, objective):
            super().__init__(objective=objective)
            self.save_hyperparameters()

    fit(Holding(OfSomebody()), batches(1)).save_checkpoint("own.ckpt")
    loaded = torch.load("own.ckpt", weights_only=True)["hyper_parameters"]["objective"]
    assert type(loaded) is OfSomebody
