"""The Trainer's features with the mixin, beside automatic optimization; trainer_features.yaml names these tests."""

import copy
import csv
import math
import time
import traceback
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

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
    choose,
    classification_batch,
    clones,
    convbn,
    fit,
    mlp,
    naive_gradient,
    sgd,
    trainer,
)
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from schedulefree import AdamWScheduleFree
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ssesam import SAM, SSESAM, ImbSAM, StageSwitch, Term

pytestmark = STRICT


def both(data, net=None, scheduler=None, optimizer=None, ours=Model, theirs=Automatic, callbacks=list, **kwargs):
    """Train the mixin with ERM, and the same module automatically, on the same data. Return modules and Trainers."""
    net, results = mlp() if net is None else net, []
    for kind in (ours, theirs):
        model = kind(copy.deepcopy(net), scheduler=scheduler, optimizer=optimizer)
        torch.manual_seed(1)
        results.append((model, fit(model, data, callbacks=callbacks(), **kwargs)))
    return results


def assert_same_training(results, atol=1e-14):
    (ours, ours_run), (theirs, theirs_run) = results
    torch.testing.assert_close(ours.net.state_dict(), theirs.net.state_dict(), rtol=0, atol=atol)
    assert ours_run.global_step == theirs_run.global_step > 0
    assert ours_run.current_epoch == theirs_run.current_epoch


def union(group):
    return torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])


def grouped(data, size):
    return [data[i : i + size] for i in range(0, len(data), size)]


@pytest.mark.usefixtures("float64")
class TestClipping:
    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("algorithm", ["norm", "value"])
    def test_as_under_automatic_optimization(self, algorithm, accumulate):
        results = both(
            batches(5),
            gradient_clip_val=0.05,
            gradient_clip_algorithm=algorithm,
            accumulate_grad_batches=accumulate,
        )
        assert_same_training(results)
        unclipped, _ = both(batches(5), accumulate_grad_batches=accumulate)[0]
        assert not torch.allclose(unclipped.net[0].weight, results[0][0].net[0].weight)

    def test_final_gradient_is_clipped_once(self):
        data, net = batches(1), mlp()
        model = Model(copy.deepcopy(net), SSESAM(SPLIT), optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
        before = clones(net.parameters())
        fit(model, data, gradient_clip_val=0.01)
        gradient = naive_gradient(net, SSESAM(SPLIT).terms(data[0][1]), *data[0])
        norm = torch.sqrt(sum((g**2).sum() for g in gradient))
        expected = [p - 0.01 * g / norm for p, g in zip(before, gradient, strict=True)]
        torch.testing.assert_close(list(model.parameters()), expected, rtol=0, atol=1e-8)

    def test_own_configure_gradient_clipping(self):
        def own(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            assert self.calls == "before"
            self.calls = (gradient_clip_val, gradient_clip_algorithm)
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val / 2)

        def before(self, optimizer):
            self.calls = "before"

        hooks = {"configure_gradient_clipping": own, "on_before_optimizer_step": before}
        ours, theirs = type("Ours", (Model,), hooks), type("Theirs", (Automatic,), hooks)
        results = both(batches(3), ours=ours, theirs=theirs, gradient_clip_val=0.02)
        assert_same_training(results)
        assert results[0][0].calls == results[1][0].calls == (0.02, None)


@pytest.mark.usefixtures("float64")
class TestAccumulation:
    @pytest.mark.parametrize("passes", ["full", "split"])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_equals_the_union_of_the_batches(self, objective, passes):
        # One batch without tail, one that is all tail, a short one.
        data = [*batches(2), *batches(1, classes=[0, 1]), *batches(1, classes=[3]), *batches(1), *batches(1, n=5)]
        net = mlp()
        model, twin = Model(copy.deepcopy(net), OBJECTIVES[objective](), passes), Model(net, OBJECTIVES[objective]())
        run = fit(model, data, accumulate_grad_batches=3, max_epochs=2)
        fit(twin, [union(group) for group in grouped(data, 3)], max_epochs=2)
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=1e-13)
        assert run.global_step == 4

    def test_last_shorter_group(self):
        """Lightning divides by the length of a whole group there too."""

        class Half(SAM):
            def terms(self, targets):
                return tuple(Term(term.weights / 2, term.rho) for term in super().terms(targets))

        data, net = batches(1), mlp()
        model, twin = Model(copy.deepcopy(net), SAM(0.1)), Model(net, Half(0.1))
        fit(model, data, accumulate_grad_batches=2)
        fit(twin, data)
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=1e-15)

    @pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
    def test_as_under_automatic_optimization(self, size):
        assert_same_training(both(batches(7), accumulate_grad_batches=size, max_epochs=2))

    def test_batch_norm_as_under_automatic_optimization(self):
        assert_same_training(both(batches(5, shape=(3, 5, 5)), convbn(), accumulate_grad_batches=2))

    def test_batch_norm_keeps_the_statistics_of_each_batch(self):
        data, net = batches(4, shape=(3, 5, 5)), convbn()
        model, plain = Model(copy.deepcopy(net), SSESAM(SPLIT)), copy.deepcopy(net)
        for x, _ in data:
            plain(x)
        fit(model, data, accumulate_grad_batches=4)
        assert_same_bits(model.net[1].buffers(), plain[1].buffers())

    def test_one_batch_at_a_time_is_forwarded(self):
        sizes = []
        model = Model(objective=SSESAM(SPLIT), passes="full")
        model.net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        fit(model, batches(4), accumulate_grad_batches=4)
        assert sizes == [24] * 12

    def test_dense_targets_of_different_sizes(self):
        net = nn.Conv2d(3, 5, 3, padding=1)
        data = [(torch.randn(2, 3, s, s), torch.randint(5, (2, s, s))) for s in (4, 6)]
        model, before = Model(copy.deepcopy(net), SSESAM(SPLIT)), clones(net.parameters())
        fit(model, data, accumulate_grad_batches=2)
        targets = torch.cat([y.flatten() for _, y in data])
        terms = SSESAM(SPLIT).terms(targets)

        def gradient(weights):
            losses = torch.cat([F.cross_entropy(net(x), y, reduction="none").flatten() for x, y in data])
            return torch.autograd.grad((weights * losses).sum(), list(net.parameters()))

        total = [torch.zeros_like(p) for p in net.parameters()]
        for weights, rho, *_ in terms:
            g = gradient(weights)
            norm = torch.sqrt(sum((part**2).sum() for part in g))
            with torch.no_grad():
                for p, part in zip(net.parameters(), g, strict=True):
                    p.add_(rho * part / norm)
            total = [t + part for t, part in zip(total, gradient(weights), strict=True)]
            with torch.no_grad():
                for p, b in zip(net.parameters(), before, strict=True):
                    p.copy_(b)
        for p, g in zip(net.parameters(), total, strict=True):
            p.grad = g
        sgd(net.parameters()).step()
        torch.testing.assert_close(list(model.parameters()), list(net.parameters()), rtol=0, atol=1e-14)

    def test_dense_probabilities(self):
        net = nn.Conv2d(3, 5, 3, padding=1)
        data = [(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4).softmax(1)) for _ in range(2)]
        models = [Model(copy.deepcopy(net), SSESAM(SPLIT)) for _ in range(2)]
        fit(models[0], data, accumulate_grad_batches=2)
        fit(models[1], [union(data)])
        torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=1e-14)

    def test_class_indices_and_probabilities_in_one_group(self):
        (x, y), net = classification_batch(), mlp()
        probabilities = F.one_hot(y, 5).double()
        models = [Model(copy.deepcopy(net), SSESAM(SPLIT)) for _ in range(2)]
        fit(models[0], [(x, y), (x, probabilities)], accumulate_grad_batches=2)
        fit(models[1], [(x, y), (x, y)], accumulate_grad_batches=2)
        torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=1e-14)

    def test_gradient_accumulation_scheduler(self):
        def callbacks():
            return [GradientAccumulationScheduler({0: 2, 1: 3, 2: 1})]

        results = both(batches(7), callbacks=callbacks, max_epochs=3)
        assert_same_training(results)
        assert results[0][1].global_step == 4 + 3 + 7

    def test_epoch_that_is_cut_short_leaves_nothing_over(self):
        class Short(Model):
            def on_train_batch_start(self, batch, batch_idx):
                return -1 if batch_idx == 3 else None

        class ShortAutomatic(Automatic):
            on_train_batch_start = Short.on_train_batch_start

        results = both(batches(6), ours=Short, theirs=ShortAutomatic, accumulate_grad_batches=2, max_epochs=3)
        assert_same_training(results)

    def test_logged_rows(self, tmp_path):
        data = batches(7)

        class Logged(Model):
            def sample_losses(self, batch):
                losses = super().sample_losses(batch)
                self.log("mean", losses.mean(), on_step=True, on_epoch=True)
                self.log("sum", losses.sum(), on_step=True, on_epoch=True, reduce_fx="sum")
                return losses

        rows = {}
        for model in (Logged(), Automatic()):
            logger = CSVLogger(tmp_path, name=type(model).__name__)
            run = fit(model, data, accumulate_grad_batches=3, logger=logger, log_every_n_steps=1, max_epochs=2)
            with Path(logger.log_dir, "metrics.csv").open() as file:
                rows[logger.name] = [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]
            if isinstance(model, Logged):
                seen = {name: value.item() for name, value in run.callback_metrics.items()}
        assert rows["Logged"] == rows["Automatic"] == [0, 1, 2, 3, 4, 5]
        # One value for the samples of a whole group.
        assert seen["train/loss"] == seen["mean_step"]
        assert seen["sum_epoch"] == pytest.approx(seen["mean_epoch"] * 7 * 24)


def rates_of(scheduler, **kwargs):
    """Train both kinds; return the learning rates that each batch saw, of every parameter group."""

    class Rates(Callback):
        def on_train_start(self, trainer, pl_module):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    class Validating:
        def validation_step(self, batch, batch_idx):
            self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))

    ours, theirs = type("Ours", (Validating, Model), {}), type("Theirs", (Validating, Automatic), {})
    val, data, seen = batches_loader(batches(1)), batches(6), []
    results = both(data, scheduler=scheduler, ours=ours, theirs=theirs, callbacks=lambda: [Rates()], val=val, **kwargs)
    for _, run in results:
        (rates,) = [callback for callback in run.callbacks if isinstance(callback, Rates)]
        seen.append(rates.seen)
    assert_same_training(results, atol=1e-5)
    return seen


def scheduled(make, **kwargs):
    return lambda optimizer: {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **kwargs}}


def warm_up(optimizer):
    schedulers = [LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, 8)]
    return SequentialLR(optimizer, schedulers, milestones=[3])


def plateau(optimizer):
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "scheduler",
    [
        scheduled(lambda o: ExponentialLR(o, 0.9)),
        scheduled(lambda o: ExponentialLR(o, 0.9), interval="step"),
        scheduled(lambda o: ExponentialLR(o, 0.9), interval="step", frequency=3),
        scheduled(lambda o: ExponentialLR(o, 0.9), frequency=2),
        lambda o: ([o], [CosineAnnealingLR(o, 4)]),
        lambda o: ([o], [ExponentialLR(o, 0.9), {"scheduler": MultiStepLR(o, [3, 5]), "interval": "step"}]),
        scheduled(plateau, monitor="val"),
        scheduled(plateau, monitor="train/loss"),
        scheduled(plateau, monitor="train/loss", interval="step", frequency=2),
        scheduled(lambda o: OneCycleLR(o, 1.0, total_steps=30), interval="step"),
        scheduled(warm_up, interval="step"),
    ],
    ids=[
        "epoch",
        "step",
        "every 3 steps",
        "every 2 epochs",
        "cosine",
        "two",
        "plateau",
        "plateau on training loss",
        "plateau every 2 steps",
        "one cycle",
        "warm-up",
    ],
)
def test_learning_rates_as_under_automatic_optimization(scheduler, accumulate):
    ours, theirs = rates_of(scheduler, max_epochs=4, accumulate_grad_batches=accumulate)
    assert ours == theirs
    assert len({rate for rates in ours for rate in rates}) > 1


def test_own_scheduler_and_optimizer_hooks_as_under_automatic_optimization():
    """Warming up in `optimizer_step`, as Lightning's documentation shows, and `lr_scheduler_step` by the step."""

    class Own:
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * min(1.0, (self.trainer.global_step + 1) / 5)
            loss = optimizer.step(closure=optimizer_closure)
            self.losses = [*getattr(self, "losses", []), float(loss)]

        def lr_scheduler_step(self, scheduler, metric):
            self.steps = [*getattr(self, "steps", []), self.trainer.global_step]

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            self.zeroed = [*getattr(self, "zeroed", []), batch_idx]
            optimizer.zero_grad(set_to_none=False)

        def on_before_zero_grad(self, optimizer):
            self.before = getattr(self, "before", 0) + 1

    ours, theirs = type("Ours", (Own, Model), {}), type("Theirs", (Own, Automatic), {})
    scheduler = scheduled(lambda o: ExponentialLR(o, 0.9), interval="step")
    results = both(batches(4), ours=ours, theirs=theirs, scheduler=scheduler, max_epochs=2)
    assert_same_training(results, atol=1e-6)
    one, other = (model for model, _ in results)
    assert one.steps == other.steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert one.losses == pytest.approx(other.losses)
    assert one.zeroed == other.zeroed
    assert one.before == other.before == 8


def test_optimizer_step_that_leaves_the_optimizer_alone():
    class Seldom:
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2 == 0:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    ours, theirs = type("Ours", (Seldom, Model), {}), type("Theirs", (Seldom, Automatic), {})
    results = both(batches(4), ours=ours, theirs=theirs, max_epochs=-1, max_steps=7)
    assert_same_training(results, atol=1e-6)
    assert results[0][1].global_step == 7


class TestPrecision:
    @pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed", "32-true"])
    def test_as_under_automatic_optimization(self, precision):
        results = both(batches(4), precision=precision, max_epochs=2)
        # The mean of bfloat16 losses is rounded, and our weighted sum of them is not.
        assert_same_training(results, atol=1e-2 if precision == "bf16-true" else 1e-6)
        assert results[0][0].net[0].weight.dtype == results[1][0].net[0].weight.dtype

    @pytest.mark.parametrize("passes", ["full", "split"])
    def test_64_true_equals_float64(self, passes, float64):
        data, net = batches(3), mlp()
        models = [Model(copy.deepcopy(net), SSESAM(SPLIT), passes) for _ in range(2)]
        fit(models[0], data)
        models[1].float()
        models[1].load_state_dict(Model(net).state_dict())
        models[1].net.load_state_dict({k: v.float() for k, v in net.state_dict().items()})
        fit(models[1], [(x.float(), y) for x, y in data], precision="64-true")
        torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=1e-6)
        assert models[1].net[0].weight.dtype == torch.float64

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_low_precision_is_near(self, precision):
        data, net = batches(4), mlp()
        models = [Model(copy.deepcopy(net), SSESAM(SPLIT, 0.05, 0.1)) for _ in range(2)]
        fit(models[0], data)
        fit(models[1], data, precision=precision)
        moved = models[0].net[0].weight - net[0].weight
        error = models[1].net[0].weight.float() - models[0].net[0].weight
        assert 0 < error.norm() < 0.1 * moved.norm()

    def test_scaled_gradients_give_the_same_training(self):
        """A GradScaler as on a GPU; its factor is in every gradient and in no result."""
        data, net = batches(4), mlp()
        models = [Model(copy.deepcopy(net), SSESAM(SPLIT)) for _ in range(2)]
        seen = []
        models[1].on_before_optimizer_step = lambda optimizer: seen.append(models[1].net[0].weight.grad.norm())
        for model in models:
            choose(model, log_sharpness=True)
        runs = [fit(models[0], data, gradient_clip_val=0.1), fit(models[1], data, plugins=[scaling(1024.0)])]
        plain = Model(copy.deepcopy(net), SSESAM(SPLIT))
        plain_run = fit(plain, data, plugins=[scaling(1.0)])
        torch.testing.assert_close(models[1].state_dict(), plain.state_dict(), rtol=0, atol=2e-4)
        assert max(seen) < 10
        assert runs[1].global_step == plain_run.global_step == 4
        norm = runs[1].callback_metrics["train/grad_norm"]
        assert 0 < norm < 10

    def test_scaled_gradients_are_clipped_after_unscaling(self):
        data, net = batches(1), mlp()
        model = Model(net, SSESAM(SPLIT), optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
        before = clones(net.parameters())
        fit(model, data, plugins=[scaling(1024.0)], gradient_clip_val=0.01)
        moved = torch.sqrt(sum(((p - b) ** 2).sum() for p, b in zip(net.parameters(), before, strict=True)))
        assert moved.item() == pytest.approx(0.01, rel=1e-3)

    @pytest.mark.parametrize("passes", ["full", "split"])
    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_overflow_in_any_pass_skips_one_update(self, passes, number):
        class Overflowing(Model):
            calls = 0

            def sample_losses(self, batch):
                losses = super().sample_losses(batch)
                self.calls += 1
                # Of the second step: a clean forward, the head's or the tail's perturbed one.
                return losses * 1e38 if self.calls == self.bad else losses

        data, plugin = batches(3), scaling(1024.0)
        model = Overflowing(objective=SSESAM(SPLIT), passes=passes)
        model.bad = {"full": 4, "split": 5}[passes] + number + (1 if passes == "split" and number else 0)
        states = []
        model.on_train_batch_end = lambda *args: states.append((clones(model.parameters()), plugin.scaler.get_scale()))
        run = fit(model, data, plugins=[plugin])
        (first, scale), (second, halved), (third, still) = states
        assert_same_bits(first, second)
        assert (scale, halved, still) == (1024.0, 512.0, 512.0)
        assert not torch.equal(second[0], third[0])
        assert all(p.isfinite().all() for p in model.parameters())
        assert run.global_step == 3


def scaling(scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


class Validating:
    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))


class Ours(Validating, Model):
    pass


class Theirs(Validating, Automatic):
    pass


class TestCallbacksAndFlags:
    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize(
        "options",
        [
            {"every_n_train_steps": 2},
            {"every_n_epochs": 1},
            {"every_n_epochs": 2, "save_on_train_epoch_end": True},
            {"train_time_interval": timedelta(microseconds=1)},
            {"monitor": "val", "save_top_k": 2},
            {"monitor": "val", "mode": "max", "every_n_train_steps": 2},
            {"monitor": "train/loss", "every_n_train_steps": 3},
            {"save_last": True},
        ],
        ids=str,
    )
    def test_model_checkpoint(self, options, accumulate, tmp_path):
        saved = []
        val, net, data = batches_loader(batches(1)), mlp(), batches(5)
        for kind in (Ours, Theirs):
            model, folder = kind(copy.deepcopy(net)), tmp_path / kind.__name__
            # Lightning takes these attributes of a manually optimized module for weights of its own tests.
            model.layer, model.saved_models = nn.Linear(1, 1), {0: None}
            checkpoint = ModelCheckpoint(folder, "{epoch}-{step}", **{"save_top_k": -1, **options})
            fit(
                model,
                data,
                val,
                callbacks=[checkpoint],
                enable_checkpointing=True,
                max_epochs=3,
                accumulate_grad_batches=accumulate,
            )
            files = sorted(folder.iterdir())
            steps = [torch.load(file, weights_only=True)["global_step"] for file in files]
            saved.append([(file.name, step) for file, step in zip(files, steps, strict=True)])
        assert saved[0] == saved[1]
        assert saved[0]

    def test_model_checkpoint_does_not_speak_of_manual_optimization(self, recwarn, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1)
        fit(Model(), batches(2), callbacks=[checkpoint], enable_checkpointing=True)
        assert not [w for w in recwarn if "manual optimization" in str(w.message)]

    @pytest.mark.parametrize("has_batch_norm", [False, True])
    def test_stochastic_weight_averaging(self, has_batch_norm):
        class Weights(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                # Under automatic optimization Lightning ends the epoch that renews batch norm's statistics with a step
                # that takes the gradient of the epoch before; the mixin leaves the average as it is.
                if trainer.fit_loop._skip_backward and batch_idx == 0:
                    pl_module.average = clones(pl_module.parameters())

        results = both(
            batches(4, shape=(3, 5, 5)),
            convbn() if has_batch_norm else nn.Sequential(nn.Flatten(), nn.Linear(75, 5)),
            callbacks=lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1), Weights()],
            max_epochs=4,
        )
        (ours, run), (theirs, _) = results
        assert run.global_step == 16
        torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()), rtol=0, atol=1e-6)
        expected = theirs.average if has_batch_norm else list(theirs.parameters())
        torch.testing.assert_close(list(ours.parameters()), expected, rtol=0, atol=1e-6)
        if has_batch_norm:
            assert_same_bits(ours.parameters(), ours.average)

    def test_weight_averaging(self):
        # Lightning has them since 2.6.
        kinds = [vars(callbacks).get(name) for name in ("WeightAveraging", "EMAWeightAveraging")]
        for kind in [kind for kind in kinds if kind is not None]:
            assert_same_training(both(batches(4), callbacks=lambda kind=kind: [kind()]), atol=1e-6)

    @pytest.mark.parametrize(
        "flags",
        [
            {"max_steps": 7, "max_epochs": -1},
            {"max_steps": 3, "accumulate_grad_batches": 2, "max_epochs": -1},
            {"limit_train_batches": 3},
            {"limit_train_batches": 0.5, "accumulate_grad_batches": 2},
            {"overfit_batches": 2},
            {"fast_dev_run": True},
            {"fast_dev_run": 3},
            {"val_check_interval": 2},
            {"val_check_interval": 0.5, "accumulate_grad_batches": 2},
            {"val_check_interval": 3, "check_val_every_n_epoch": None},
            {"min_epochs": 2, "max_epochs": 3},
            {"detect_anomaly": True},
            {"profiler": "simple"},
            {"profiler": "advanced"},
            {"deterministic": True},
            {"inference_mode": False},
            {"reload_dataloaders_every_n_epochs": 1},
            {"num_sanity_val_steps": 1},
            {"barebones": True},
        ],
        ids=str,
    )
    def test_flags(self, flags):
        if flags.get("barebones"):
            flags = {**flags, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None}
            flags["enable_model_summary"] = None
        kwargs = {"max_epochs": 2, **flags}
        results = both(batches(6), ours=Ours, theirs=Theirs, val=batches_loader(batches(1)), **kwargs)
        assert_same_training(results, atol=1e-6)

    def test_max_time_ends_the_training(self):
        class Slow(Model):
            def on_train_batch_start(self, batch, batch_idx):
                time.sleep(0.05)

        run = fit(Slow(), batches(6), max_time=timedelta(seconds=0.4), max_epochs=1000)
        assert 1 <= run.global_step <= 8

    def test_early_stopping(self):
        callbacks = lambda: [EarlyStopping("val", patience=1, mode="max", min_delta=10.0)]  # noqa: E731
        val = batches_loader(batches(1))
        results = both(batches(3), ours=Ours, theirs=Theirs, callbacks=callbacks, val=val, max_epochs=9)
        assert_same_training(results, atol=1e-6)
        assert results[0][1].current_epoch == 2

    def test_tuner_with_clipping_and_accumulation(self):
        data, net, found = torch.utils.data.TensorDataset(*classification_batch(64)), mlp(), []

        class Tunable:
            lr, batch_size = 0.1, 2

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=self.lr)

            def train_dataloader(self):
                return torch.utils.data.DataLoader(data, batch_size=self.batch_size)

        for kind in (type("A", (Tunable, Model), {}), type("B", (Tunable, Automatic), {})):
            model = kind(copy.deepcopy(net))
            run = trainer(max_epochs=5, gradient_clip_val=0.1, accumulate_grad_batches=2)
            finder = Tuner(run).lr_find(model, num_training=20, update_attr=False)
            found.append((finder.results["lr"], Tuner(run).scale_batch_size(model, max_trials=3)))
            assert (run.gradient_clip_val, run.accumulate_grad_batches) == (0.1, 2)
        assert found[0] == found[1]

    def test_several_runs_with_flags(self):
        """Nothing stays switched on or off from one run to the next, of either kind."""
        run = trainer(gradient_clip_val=0.1, accumulate_grad_batches=2)
        for number, model in enumerate([Model(), Automatic(), Model(objective=SAM(0.1)), Model()], start=1):
            run.fit_loop.max_epochs = number
            run.fit(model, batches_loader(batches(4)))
            assert run.global_step == 2 * number
            assert model.automatic_optimization is isinstance(model, Automatic)
        assert (run.gradient_clip_val, run.accumulate_grad_batches) == (0.1, 2)


class TestPlace:
    """Where Lightning is when it calls what."""

    def test_updates_and_backward_passes_are_outside_of_autocast(self):
        seen = {}

        def note(name):
            seen.setdefault(name, set()).add((torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))

        class Noting(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                note("forward")
                return x

            @staticmethod
            def backward(ctx, gradient):
                note("backward")
                return gradient

        class Noted:
            def on_before_optimizer_step(self, optimizer):
                note("before step")

            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
                note("step")
                optimizer.step(closure=optimizer_closure)

            def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
                note("zero")
                optimizer.zero_grad()

        ours, theirs = type("Ours", (Noted, Model), {}), type("Theirs", (Noted, Automatic), {})

        class Net(nn.Linear):
            def forward(self, x):
                return Noting.apply(super().forward(x))

        for precision in ("bf16-mixed", "64-true", "bf16-true"):
            found = []
            for kind in (ours, theirs):
                seen.clear()
                fit(kind(Net(8, 5)), batches(1), precision=precision)
                found.append({name: set(places) for name, places in seen.items()})
            assert found[0] == found[1], precision

    def test_backward_hooks_are_called_once_a_pass(self):
        calls = []

        class Hooked(Model):
            def on_before_backward(self, loss):
                calls.append("before")

            def on_after_backward(self):
                calls.append("after")

        fit(Hooked(objective=SSESAM(SPLIT)), batches(1))
        assert calls == ["before", "after"] * 4

    def test_backward_of_ones_own(self):
        def backward(self, loss):
            loss.backward()

        results = both(
            batches(3),
            ours=type("Ours", (Model,), {"backward": backward}),
            theirs=type("Theirs", (Automatic,), {"backward": backward}),
        )
        assert_same_training(results, atol=1e-6)

    def test_group_whose_last_batch_is_left_out(self):
        """The batch before it makes the update alone, as under automatic optimization."""

        class Leaving:
            def training_step(self, batch, batch_idx):
                return None if batch_idx == 1 else super().training_step(batch, batch_idx)

        ours, theirs = type("Ours", (Leaving, Model), {}), type("Theirs", (Leaving, Automatic), {})
        results = both(batches(6), ours=ours, theirs=theirs, accumulate_grad_batches=2)
        assert_same_training(results, atol=1e-6)
        assert results[0][1].global_step == 3

    def test_loader_that_writes_into_the_same_memory(self):
        class Reusing:
            def __init__(self, data):
                self.data = data

            def __len__(self):
                return len(self.data)

            def __iter__(self):
                x, y = torch.empty(24, 8), torch.empty(24).long()
                for new_x, new_y in self.data:
                    yield x.copy_(new_x), y.copy_(new_y)

        data, net = batches(4), mlp()
        models = [Model(copy.deepcopy(net), SSESAM(SPLIT)) for _ in range(2)]
        fit(models[0], data, accumulate_grad_batches=2)
        trainer(accumulate_grad_batches=2).fit(models[1], Reusing(data))
        assert_same_bits(models[0].parameters(), models[1].parameters())

    def test_spike_detection(self):
        model = Model()
        choose(model, on_nonfinite="skip")
        data = batches(3)
        data[1][0][0] = math.nan
        fit(model, data, callbacks=[SpikeDetection(warmup=10)])
        with pytest.raises(MisconfigurationException, match="SpikeDetection looks at the loss of every batch"):
            fit(Model(), data, callbacks=[SpikeDetection(warmup=10)], accumulate_grad_batches=2)
        with pytest.raises(MisconfigurationException, match="SpikeDetection looks at the loss of every batch"):
            fit(Model(), data, callbacks=[SpikeDetection(warmup=10), GradientAccumulationScheduler({1: 2})])

    def test_step_without_a_trainer(self):
        with pytest.raises(
            MisconfigurationException, match=r"needs `Trainer.fit` around it. Call `sample_losses\(batch"
        ):
            Model().training_step(batches(1)[0], 0)

    def test_goes_on_after_a_fault_in_configure_callbacks(self):
        class Failing(Model):
            fails = True

            def configure_callbacks(self):
                callbacks = super().configure_callbacks()
                if self.fails:
                    raise ConnectionError
                return callbacks

        model = Failing()
        with pytest.raises(ConnectionError):
            fit(model, batches(1))
        model.fails = False
        assert fit(model, batches(1)).global_step == 1

    def test_no_data_stays_in_the_module(self):
        class Failing(Model):
            def on_train_batch_end(self, outputs, batch, batch_idx):
                self.copied = copy.deepcopy(self)
                raise ConnectionError

        model = Failing()
        with pytest.raises(ConnectionError):
            fit(model, batches(2), accumulate_grad_batches=2)
        assert model._SharpnessAwareMixin__step.pending == model.copied._SharpnessAwareMixin__step.pending == []

    def test_tests_with_a_checkpoint_ask_for_no_callback(self, recwarn):
        class Tested(Model):
            def test_step(self, batch, batch_idx):
                return self.sample_losses(batch).mean()

        model = Tested()
        choose(model, on_nonfinite="skip")
        fit(model, batches(1)).save_checkpoint("end.ckpt")
        model.skipped_updates = 7
        trainer().test(model, batches_loader(batches(1)), ckpt_path="end.ckpt", verbose=False)
        assert model.skipped_updates == 7
        assert not [w for w in recwarn if "TrainerSupport" in str(w.message)]


class TestNonFinite:
    """The third batch is bad: without `on_nonfinite` it would spoil everything."""

    def data(self, kind):
        data = batches(5, shape=(3, 5, 5))
        data[2][0][0, 0, 0, 0] = kind
        return data

    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("kind", [math.nan, math.inf])
    @pytest.mark.parametrize("objective", ["ERM", "SAM", "SSESAM 1"])
    def test_skip(self, objective, kind, accumulate):
        data = self.data(kind)
        net = convbn()
        model, twin = Model(copy.deepcopy(net), OBJECTIVES[objective]()), Model(net, OBJECTIVES[objective]())
        choose(model, on_nonfinite="skip")
        run = fit(model, data, accumulate_grad_batches=accumulate, logger=CSVLogger("logs"), log_every_n_steps=1)
        good = [group for number, group in enumerate(grouped(data, accumulate)) if number != 2 // accumulate]
        fit(twin, [batch for group in good for batch in group], accumulate_grad_batches=accumulate)
        assert_same_bits(model.parameters(), twin.parameters())
        assert_same_bits(model.buffers(), twin.buffers())
        assert model.skipped_updates == 1
        assert run.global_step == len(grouped(data, accumulate))
        assert run.callback_metrics["train/skipped_updates"] == 1
        assert run.callback_metrics["train/loss"].isfinite()

    @pytest.mark.parametrize("number", [1, 4])
    def test_last_steps_that_are_skipped_are_logged(self, number, caplog):
        data = batches(4)
        for x, _ in data[4 - number :]:
            x[0, 0] = math.nan
        model = Model(objective=SAM(0.1))
        choose(model, on_nonfinite="skip")
        with caplog.at_level("INFO"):
            run = fit(model, data)
        assert run.callback_metrics["train/skipped_updates"] == number == model.skipped_updates
        said = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
        assert said == [f"The update of step {4 - number} is skipped: its loss or gradient is not finite."]

    def test_skip_counts_over_a_resumed_run(self, tmp_path):
        model = Model(convbn(), SAM(0.1))
        choose(model, on_nonfinite="skip")
        fit(model, self.data(math.nan)).save_checkpoint(tmp_path / "a.ckpt")
        again = Model(convbn(), SAM(0.1))
        choose(again, on_nonfinite="skip")
        fit(again, self.data(math.nan), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
        assert again.skipped_updates == 2

    def test_raise(self):
        data = self.data(math.nan)
        net = convbn()
        model, twin = Model(copy.deepcopy(net), SSESAM(SPLIT)), Model(net, SSESAM(SPLIT))
        choose(model, on_nonfinite="raise")
        with pytest.raises(FloatingPointError, match="The loss or the gradient of step 2 is infinite or not a number"):
            fit(model, data)
        fit(twin, data[:2])
        assert_same_bits(model.parameters(), twin.parameters())
        assert_same_bits(model.buffers(), twin.buffers())

    def test_gradient_alone(self):
        """The loss is finite and its gradient is not, as of a square root at zero."""

        class Root(Model):
            def sample_losses(self, batch):
                return super().sample_losses(batch) + self.net[0].weight.sum().mul(0).sqrt()

        model, net = Root(), mlp()
        choose(model, on_nonfinite="skip")
        model.net.load_state_dict(net.state_dict())
        fit(model, batches(2))
        assert_same_bits(model.net.parameters(), net.parameters())
        assert model.skipped_updates == 2

    def test_ignored_by_default_as_under_automatic_optimization(self):
        results = both(self.data(math.nan), convbn())
        for model, _ in results:
            assert not model.net[0].weight.isfinite().any()

    def test_scaler_that_is_switched_off(self):
        model = Model(convbn(), SAM(0.1))
        choose(model, on_nonfinite="skip")
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        fit(model, self.data(math.nan), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        assert model.skipped_updates == 1
        assert all(p.isfinite().all() for p in model.parameters())

    def test_left_to_the_scaler(self):
        model = Model(convbn(), SAM(0.1))
        choose(model, on_nonfinite="raise")
        run = fit(model, self.data(math.nan), plugins=[scaling(1024.0)])
        assert run.global_step == 5
        assert model.skipped_updates == 0

    def test_training_ends_where_nothing_is_finite(self):
        model = Model()
        choose(model, on_nonfinite="skip")
        data = [(torch.full((4, 8), math.nan), torch.zeros(4).long())]
        assert fit(model, data, max_steps=3, max_epochs=-1).global_step == 3


class TestLogging:
    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("passes", ["full", "split"])
    def test_sharpness_and_norms(self, passes, accumulate, float64):
        data = batches(accumulate)
        x, y = union(data)
        net = mlp()
        model = Model(copy.deepcopy(net), SSESAM(SPLIT, 0.3, 0.5), passes)
        choose(model, log_sharpness=True)
        run = fit(model, data, accumulate_grad_batches=accumulate)
        seen = {name: value.item() for name, value in run.callback_metrics.items()}

        def loss(weights):
            return (weights * F.cross_entropy(net(x), y, reduction="none")).sum()

        for name, (weights, rho, _) in zip(("head", "tail"), SSESAM(SPLIT, 0.3, 0.5).terms(y), strict=True):
            gradient = torch.autograd.grad(loss(weights), list(net.parameters()))
            norm = torch.sqrt(sum((g**2).sum() for g in gradient))
            before, clean = loss(weights).item(), clones(net.parameters())
            with torch.no_grad():
                for p, g in zip(net.parameters(), gradient, strict=True):
                    p.add_(rho * g / norm)
            assert seen[f"train/sharpness_{name}"] == pytest.approx(loss(weights).item() - before, rel=1e-5)
            assert seen[f"train/sharpness_{name}"] > 0
            assert seen[f"train/grad_norm_{name}"] == pytest.approx(norm.item(), rel=1e-5)
            with torch.no_grad():
                for p, value in zip(net.parameters(), clean, strict=True):
                    p.copy_(value)
        total = naive_gradient(net, SSESAM(SPLIT, 0.3, 0.5).terms(y), x, y)
        norm = torch.sqrt(sum((g**2).sum() for g in total)).item()
        assert seen["train/grad_norm"] == pytest.approx(norm, rel=1e-5)

    def test_names(self):
        def names(objective):
            model = Model(objective=objective)
            choose(model, log_sharpness=True)
            seen = fit(model, batches(1)).callback_metrics
            return sorted(name.removeprefix("train/") for name in seen if name != "train/loss")

        assert names(OBJECTIVES["ERM"]()) == ["grad_norm", "grad_norm_all"]
        assert names(SAM(0.1)) == ["grad_norm", "grad_norm_all", "sharpness_all"]
        tail = ["grad_norm", "grad_norm_head", "grad_norm_tail", "sharpness_tail"]
        assert names(ImbSAM(SPLIT)) == names(OBJECTIVES["SSESAM 2"]()) == tail
        assert names(OBJECTIVES["SSESAM joint 1"]()) == ["grad_norm", "grad_norm_all", "sharpness_all"]
        # Terms 0 and 3 are plain and share their backward.
        assert names(OBJECTIVES["own"]()) == [
            "grad_norm",
            *(f"{v}_{t}" for v in ("grad_norm", "sharpness") for t in "12"),
        ]

    def test_norms_of_terms_in_a_shorter_group(self):
        data, net, seen = batches(1), mlp(), []
        for accumulate in (1, 2):
            model = Model(copy.deepcopy(net), SSESAM(SPLIT))
            choose(model, log_sharpness=True)
            metrics = fit(model, data, accumulate_grad_batches=accumulate).callback_metrics
            seen.append({name.removeprefix("train/"): value.item() for name, value in metrics.items()})
        for name in ("grad_norm_head", "grad_norm_tail", "sharpness_head", "sharpness_tail"):
            assert seen[1][name] == pytest.approx(seen[0][name], rel=1e-5)
        # This one is what the optimizer receives.
        assert seen[1]["grad_norm"] == pytest.approx(seen[0]["grad_norm"] / 2, rel=1e-5)

    def test_off_by_default_and_changes_nothing(self):
        data, net = batches(3), mlp()
        models = [Model(copy.deepcopy(net), SSESAM(SPLIT)) for _ in range(2)]
        choose(models[1], log_sharpness=True)
        assert set(fit(models[0], data).callback_metrics) == {"train/loss"}
        fit(models[1], data)
        assert_same_bits(models[0].parameters(), models[1].parameters())

    @pytest.mark.parametrize("log_sharpness", [False, True])
    def test_does_not_wait_for_the_device(self, log_sharpness):
        """Nothing of a full step becomes a Python number, but what is looked at because it is on a CPU.

        The first step may wait: it finds out what a forward moves.
        """

        class Waits(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function is torch.ops.aten._local_scalar_dense.default:
                    frames = [frame for frame in traceback.extract_stack() if "lightning_ssesam" in frame.filename]
                    waits.append(frames[-1].name)
                return function(*args, **(kwargs or {}))

        class Watched(Model):
            def training_step(self, batch, batch_idx):
                with Waits() if batch_idx > 0 else nullcontext():
                    return super().training_step(batch, batch_idx)

        waits = []
        model = Watched(objective=SSESAM(SPLIT), passes="full")
        choose(model, log_sharpness=log_sharpness)
        fit(model, batches(3))
        assert set(waits) <= {"check_class_indices", "find_ignored", "<genexpr>"}
        assert len(waits) == 8

    def test_values_of_the_clean_pass_and_sizes_of_ones_own(self):
        class Own(Model):
            def __init__(self):
                super().__init__(objective=SSESAM(SPLIT), passes="full")
                self.levels = [torch.zeros(())]

            def sample_losses(self, batch):
                self.levels[0].fill_(1.0 if self.in_clean_pass else 2.0)
                self.log("level", self.levels[0])
                self.log("weighted", float(len(batch[1])), batch_size=1, on_epoch=True)
                return super().sample_losses(batch)

        seen = fit(Own(), [*batches(1), *batches(1, n=8)]).callback_metrics
        assert seen["level"] == 1
        assert seen["weighted_epoch"] == 16

    def test_stage(self):
        seen = []

        class Stages(Model):
            def on_train_batch_end(self, *args):
                seen.append(self.trainer.callback_metrics["stage"].item())

        fit(Stages(objective=SSESAM(SPLIT)), batches(4), callbacks=[StageSwitch(step=2)])
        assert seen == [1, 1, 2, 2]


class TestOptimizers:
    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
            lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
            lambda params: torch.optim.AdamW(params, lr=0.01, foreach=False),
            lambda params: torch.optim.RMSprop(params, lr=0.01),
            lambda params: torch.optim.SGD(params, lr=0.1, nesterov=True, momentum=0.9, fused=True),
        ],
        ids=["AdamW foreach", "AdamW fused", "AdamW", "RMSprop", "SGD fused"],
    )
    def test_as_under_automatic_optimization(self, optimizer):
        assert_same_training(both(batches(5), optimizer=optimizer, max_epochs=2), atol=1e-5)

    def test_parameters_that_are_not_the_modules(self):
        def extended(kind):
            class Extended(kind):
                def configure_optimizers(self):
                    return torch.optim.SGD([*self.parameters(), self.extra[0]], lr=0.1)

                def forward(self, x):
                    return self.inner(x) * self.extra[0]

            def make(net, **kwargs):
                model = Extended(net)
                model.extra, model.inner = [nn.Parameter(torch.ones(5))], [net]
                model.net.register_forward_hook(lambda module, args, output: output * model.extra[0])
                return model

            return make

        (ours, _), (theirs, _) = both(batches(3), ours=extended(Model), theirs=extended(Automatic))
        torch.testing.assert_close(ours.extra[0], theirs.extra[0], rtol=0, atol=1e-6)
        models = []
        for rho in (0.0, 1e-9):
            torch.manual_seed(0)
            model = extended(Model)(mlp())
            model.objective = SAM(rho)
            fit(model, batches(3))
            models.append(model.extra[0])
        torch.testing.assert_close(*models, rtol=0, atol=1e-6)

    def test_sparse_gradients(self):
        class Words(nn.Module):
            def __init__(self, sparse):
                super().__init__()
                self.embedding, self.head = nn.Embedding(20, 8, sparse=sparse), nn.Linear(8, 5)

            def forward(self, x):
                return self.head(self.embedding(x).mean(1))

        data = [(torch.randint(20, (24, 3)), torch.randint(5, (24,))) for _ in range(3)]
        for objective in ("ERM", "SSESAM 1", "SSESAM 2"):
            nets = [Words(True), Words(False)]
            nets[1].load_state_dict(nets[0].state_dict())
            for net in nets:
                model = Model(net, OBJECTIVES[objective](), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
                choose(model, log_sharpness=True)
                fit(model, data)
            torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=1e-6)

    def test_complex_parameters(self):
        class Rotating(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(8, 5, dtype=torch.complex64))

            def forward(self, x):
                return (x.to(torch.complex64) @ self.weight).abs()

        class Real(nn.Module):
            def __init__(self, weight):
                super().__init__()
                self.weight = nn.Parameter(torch.view_as_real(weight.detach()).clone())

            def forward(self, x):
                return (x.to(torch.complex64) @ torch.view_as_complex(self.weight)).abs()

        data, net = batches(3), Rotating()
        models = [Model(net, SSESAM(SPLIT)), Model(Real(net.weight), SSESAM(SPLIT))]
        for model in models:
            fit(model, data)
        torch.testing.assert_close(torch.view_as_real(net.weight), models[1].net.weight, rtol=0, atol=1e-5)

    def test_parameters_that_it_is_not_given(self):
        def last_layer(params):
            return torch.optim.SGD(list(params)[2:], lr=0.1)

        results = both(batches(3), optimizer=last_layer)
        assert_same_training(results, atol=1e-6)
        # They take part in the norm of a perturbation, and their gradients are freed with the others.
        assert all(p.grad is None for p in results[0][0].parameters())

    def test_schedule_free(self):
        class Free:
            def on_train_epoch_start(self):
                self.optimizers().train()

            def on_validation_epoch_start(self):
                if self.trainer.optimizers:
                    self.optimizers().eval()

            on_train_end = on_validation_epoch_start

        def optimizer(params):
            return AdamWScheduleFree(params, lr=0.01)

        ours, theirs = type("Free", (Free, Ours), {}), type("FreeAutomatic", (Free, Theirs), {})
        results = both(batches(5), optimizer=optimizer, ours=ours, theirs=theirs, max_epochs=2)
        assert_same_training(results, atol=1e-5)


def recording(frames):
    """A backend with the autograd of a compiled network and without a compiler, which a machine may lack."""

    def backend(graph, example_inputs):
        frames.append(graph)
        return lookup_backend("aot_eager")(graph, example_inputs)

    return backend


class Network(nn.Module):
    """Not one of torch's own, which an older torch does not compile in place."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        return self.layers(x)


class TestCompile:
    @pytest.mark.parametrize("way", ["compile", "method"])
    @pytest.mark.parametrize("first_stage", ["grouped", "joint"])
    def test_one_graph_over_steps_and_stages(self, first_stage, way):
        torch._dynamo.reset()
        frames, data = [], [*batches(3), *batches(1, classes=[0, 1]), *batches(1, classes=[4])]
        net = Network()
        plain = Model(copy.deepcopy(net), SSESAM(SPLIT, first_stage=first_stage), "full")
        model = Model(copy.deepcopy(net), SSESAM(SPLIT, first_stage=first_stage))
        fit(plain, data, callbacks=[StageSwitch(step=2)])
        if way == "compile":
            model.net = torch.compile(model.net, backend=recording(frames))
        else:
            model.net.compile(backend=recording(frames))
        fit(model, data, callbacks=[StageSwitch(step=2)])
        torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-5, atol=1e-6)
        assert len(frames) == 1

    def test_step_that_wraps_the_mixins(self):
        """A step that is assigned to the module, and calls the one of its class."""
        model, plain, seen, data = Model(), Model(), [], batches(2)
        plain.load_state_dict(model.state_dict())
        step = model.training_step
        model.training_step = lambda batch, batch_idx: (seen.append(batch_idx), step(batch, batch_idx))[1]
        fit(model, data)
        fit(plain, data)
        assert seen == [0, 1]
        assert_same_bits(model.parameters(), plain.parameters())

    def test_setting_is_put_back(self):
        config = torch._functorch.config
        before = getattr(config, "donated_buffer", None)
        model = Model(objective=SAM(0.1))
        model.net = torch.compile(model.net, backend=recording([]))
        fit(model, batches(1))
        assert getattr(config, "donated_buffer", None) == before
