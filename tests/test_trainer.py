"""What the Trainer gives under automatic optimization, with the mixin: docs/trainer.md names these tests."""

import copy
import csv
import math
from datetime import timedelta
from pathlib import Path

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
    batches_loader,
    classification_batch,
    clones,
    convbn,
    fit,
    mlp,
    naive_gradient,
    sgd,
    trainer,
)
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_ssesam import SAM, SSESAM, ImbSAM, StageSwitch, Term

pytestmark = STRICT


def batches(number=6, n=24, shape=(8,), **kwargs):
    return [classification_batch(n, shape, **kwargs) for _ in range(number)]


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
        for weights, rho in terms:
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
        # Losses move little here: the epoch's mean is over its samples, the last step's is of the last batch alone.
        net = model.net
        assert seen["train/loss"] == seen["mean_step"]
        assert seen["sum_epoch"] == pytest.approx(seen["mean_epoch"] * 7 * 24)
        assert net is not None
