"""What users bring along: attributes, optimizers, batches that are skipped, values that are logged."""

import copy
import logging
import traceback

import lightning as L
import pytest
import pytorch_optimizer as others
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
    clones,
    convbn,
    fit,
    mlp,
    naive_gradient,
    sgd,
    trainer,
)
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_ssesam import ERM, SAM, SSESAM, SharpnessAwareMixin, StepOptions
from lightning_ssesam.curvature import Hessian

pytestmark = STRICT

TAKEN = [
    "_step", "_update", "_backward", "_select", "_losses_of", "_find_gradient", "_log_outcome", "_forward_only",
    "_check_class", "_check_supported", "_skip_or_raise", "_skip_batch", "_keep", "_step_optimizer", "engine",
    "interval", "passes", "processes", "stage", "rho", "split", "loss", "terms", "logs", "pending", "optimizers",
    "log_dict", "manual_backward", "log", "batch_idx", "samples", "parts", "hooks",
]  # fmt: skip
"""Names that the mixin uses or used, or that sound so. A user's own value of them changes nothing."""


class TestNames:
    @pytest.mark.usefixtures("float64")
    @pytest.mark.parametrize("kind", ["values", "submodules", "methods"])
    def test_names_that_change_nothing(self, kind):
        own = {"values": lambda: 7, "submodules": lambda: nn.Linear(1, 1), "methods": None}[kind]
        methods = {} if own else {name: lambda self, *args, **kwargs: 1 / 0 for name in TAKEN}
        for kept in ("log", "log_dict", "optimizers", "manual_backward"):
            # As methods, these are Lightning's, for everybody to override.
            methods.pop(kept, None)
        model = type("Own", (Model,), methods)(objective=SSESAM(SPLIT, 0.05, 0.1))
        choose(model, log_sharpness=True, on_nonfinite="skip")
        for name in TAKEN if own else ():
            setattr(model, name, own())
        twin, data = copy.deepcopy(model.net), batches(2)
        run = fit(model, data)
        optimizer = sgd(twin.parameters())
        for x, y in data:
            gradient = naive_gradient(twin, model.objective.terms(y), x, y)
            for p, g in zip(twin.parameters(), gradient, strict=True):
                p.grad = g
            optimizer.step()
        torch.testing.assert_close(model.net.state_dict(), twin.state_dict(), rtol=0, atol=1e-14)
        assert {"train/loss", "train/grad_norm_head", "train/sharpness_tail"} <= set(run.callback_metrics)

    def test_logger_in_log(self):
        model = Model()
        model.log = logging.getLogger("own")
        assert "train/loss" in fit(model, batches(1)).callback_metrics

    @pytest.mark.parametrize("name", ["objective", "step_options"])
    @pytest.mark.parametrize("value", ["binary:logistic", 3, {"a": 1}, nn.Linear(1, 1), torch.zeros(2)])
    def test_objective_and_options(self, name, value):
        class Own(Model):
            def __init__(self):
                super().__init__()
                if name == "objective":
                    del self.objective
                else:
                    del self.step_options
                setattr(self, name, value)

        with pytest.raises(MisconfigurationException, match=f"{name}"):
            fit(Own(), batches(1))

    @pytest.mark.parametrize("name", ["in_clean_pass", "measuring", "skipped_updates"])
    def test_what_the_mixin_says(self, name):
        message = f"`Own.{name}` is what SharpnessAwareMixin itself says of a step. Give your attribute another name."
        for own in (lambda self: 1, property(lambda self: 1), 3):
            with pytest.raises(MisconfigurationException, match=message):
                fit(type("Own", (Model,), {name: own})(), batches(1))
        model = type("Own", (Model,), {})()
        setattr(model, name, nn.Linear(1, 1))
        with pytest.raises(MisconfigurationException, match=message):
            fit(model, batches(1))
        if name == "measuring":
            model = type("Own", (Model,), {})()
            model.measuring = True
            with pytest.raises(MisconfigurationException, match=message):
                fit(model, batches(1))

    @pytest.mark.parametrize("value", [[], "none", True, -1])
    def test_number_of_skipped_updates(self, value):
        with pytest.raises(ValueError, match=r"Expected argument `skipped_updates` to be the number of updates"):
            Model().skipped_updates = value

    @pytest.mark.parametrize("name", ["sample_targets", "select_samples"])
    def test_hooks(self, name):
        for value in (3, torch.zeros(2), nn.Linear(1, 1)):
            model = Model()
            setattr(model, name, value)
            with pytest.raises(MisconfigurationException, match=f"`Model.{name}` is a method that SharpnessAware"):
                fit(model, batches(1))

    def test_class_attribute_log(self):
        with pytest.raises(MisconfigurationException, match=r"`Own.log` is the method that logs values"):
            fit(type("Own", (Model,), {"log": logging.getLogger("own")})(), batches(1))

    def test_hooks_of_an_object(self):
        asked = []
        model = Model(objective=SSESAM(SPLIT), passes="split")

        def select_samples(batch, index):
            asked.append(len(index))
            return [part[index] for part in batch]

        model.select_samples = select_samples
        fit(model, batches(1))
        assert asked

    def test_skipped_updates_go_along_with_a_copy(self):
        model = Model()
        model.skipped_updates = 4
        assert copy.deepcopy(model).skipped_updates == 4


def test_pytorch_lightning():
    other = pytest.importorskip("pytorch_lightning")
    for bases in (
        (SharpnessAwareMixin, other.LightningModule),
        (SharpnessAwareMixin, type("X", (other.LightningModule,), {})),
    ):
        with pytest.raises(
            MisconfigurationException, match=r"`Own` derives from .* Write `import lightning.pytorch as pl`"
        ):
            type("Own", bases, {})


class OwnSAM(torch.optim.Optimizer):
    """A SAM wrapper, in the ways in which people write it."""

    def __init__(self, params, style):
        super().__init__(params, {"rho": 0.05})
        self.base, self.style = SGD(self.param_groups, lr=0.1), style

    def step(self, closure=None):
        saved = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"]]
        for p, _ in saved:
            if self.style.startswith("in place"):
                with torch.no_grad():
                    p.add_(p.grad, alpha=0.05)
            elif self.style != "gradient alone":
                p.data.add_(p.grad, alpha=0.05)
            if "kept" not in self.style:
                p.grad = None
        with torch.enable_grad():
            loss = closure()
        for p, before in saved:
            p.data = before
        self.base.step()
        return loss


class Twice(torch.optim.Optimizer):
    """Takes the gradient once more after a step, as extragradient and LBFGS do."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure):
        for _ in range(2):
            loss = closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(0.1 * p.grad)
        return loss


class NeedsGraph(torch.optim.Optimizer):
    """As the AdaHessian of its authors."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure):
        closure()
        if any(p.grad.grad_fn is None for p in self.param_groups[0]["params"]):
            raise RuntimeError("Gradient tensor does not have grad_fn. Set create_graph to True.")


class WithGraph(Model):
    def backward(self, loss, **kwargs):
        loss.backward(create_graph=True, **kwargs)


class Forgets(SGD):
    def step(self, closure=None):
        super().step()


class Before(SGD):
    """Calls its closure under `no_grad`, before it moves anything."""

    @torch.no_grad()
    def step(self, closure):
        loss = closure()
        super().step()
        return loss


AGAIN = "The optimizer moves the weights and then asks for their gradient again"
GRAPH = r"The optimizer differentiates the gradient \(`create_graph=True`\)"


@pytest.mark.filterwarnings("ignore:Using backward")
class TestOptimizers:
    @pytest.mark.parametrize(
        ("optimizer", "message", "kind"),
        [
            *((lambda p, s=style: OwnSAM(p, s), AGAIN, Model) for style in ("in place", "data", "data kept")),
            (lambda p: OwnSAM(p, "gradient alone"), AGAIN, Model),
            (lambda p: others.SAM(p, SGD, lr=0.1), AGAIN, Model),
            (lambda p: others.BSAM(p, num_data=100), AGAIN, Model),
            (Twice, AGAIN, Model),
            (others.AdaHessian, GRAPH, Model),
            (lambda p: others.SophiaH(p, update_period=1), GRAPH, Model),
            *((getattr(others, name), GRAPH, WithGraph) for name in ("AdaHessian", "SophiaH")),
            (NeedsGraph, GRAPH, Model),
            (lambda p: Forgets(p, lr=0.1), "The optimizer has made no step with its closure", Model),
        ],
    )
    def test_refused_and_nothing_is_lost(self, optimizer, message, kind):
        model = kind(convbn(), optimizer=optimizer)
        before = clones(model.parameters())
        with pytest.raises(MisconfigurationException, match=message):
            fit(model, batches(2, shape=(3, 5, 5)))
        assert_same_bits(model.parameters(), before)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("style", ["in place kept", "gradient alone"])
    def test_refused_in_a_later_step(self, style):
        class Later(OwnSAM):
            def step(self, closure=None):
                self.steps = getattr(self, "steps", 0) + 1
                return closure() if self.steps < 3 else super().step(closure)

        with pytest.raises(MisconfigurationException, match=AGAIN):
            fit(Model(objective=SAM(0.05), optimizer=lambda p: Later(p, style)), batches(4))

    def test_closure_that_is_called_again_before_the_weights_move(self):
        class Careful(Model):
            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
                if optimizer_closure().isfinite():
                    optimizer.step(closure=optimizer_closure)

        model = Careful()
        twin, data = Model(copy.deepcopy(model.net)), batches(2)
        assert fit(model, data).global_step == fit(twin, data).global_step == 2
        assert_same_bits(model.parameters(), twin.parameters())

    def test_weights_that_are_not_numbers_have_not_moved(self):
        model = Model()
        with torch.no_grad():
            model.net[0].weight[0, 0] = float("nan")
        assert fit(model, batches(2)).global_step == 2

    @pytest.mark.usefixtures("float64")
    @pytest.mark.parametrize(
        "make",
        [
            lambda p: Before(p, lr=0.1),
            lambda p: others.Lookahead(SGD(p, lr=0.1)),
            lambda p: SGD(p, lr=0.1, foreach=True),
            lambda p: torch.optim.Adam(p, fused=True),
            torch.optim.Rprop,
        ],
    )
    def test_others_as_under_automatic_optimization(self, make):
        net, data = mlp(), batches(4)
        ours, theirs = Model(copy.deepcopy(net), optimizer=make), Automatic(net, make)
        fit(ours, data, gradient_clip_val=0.1)
        fit(theirs, data, gradient_clip_val=0.1)
        torch.testing.assert_close(ours.net.state_dict(), theirs.net.state_dict(), rtol=0, atol=1e-14)


class Seen(Callback):
    def __init__(self):
        self.outputs, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs.append(outputs)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def by_step(optimizer):
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Skipping:
    """Skips bad batches before the step."""

    bad = ()

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.bad else super().training_step(batch, batch_idx)


class SkippingInside(Model):
    """Skips bad batches where the losses are made."""

    bad = ()

    def sample_losses(self, batch, batch_idx):
        return None if batch_idx in self.bad else super().sample_losses(batch)


class SkippingAutomatic(Skipping, Automatic):
    pass


@pytest.mark.usefixtures("float64")
class TestSkippedBatches:
    @pytest.mark.filterwarnings("ignore:.*returned `None`")
    @pytest.mark.parametrize("way", [type("Ours", (Skipping, Model), {}), SkippingInside])
    @pytest.mark.parametrize(
        ("bad", "accumulate", "steps"),
        [((1, 4), 1, 7), ((0,), 2, 4), ((1,), 2, 4), ((2, 3), 2, 4), ((6,), 2, 4), ((5, 6), 3, 3), (range(7), 2, 4)],
    )
    def test_as_under_automatic_optimization(self, way, bad, accumulate, steps):
        net, data, results = mlp(), batches(7), []
        for kind in (way, SkippingAutomatic):
            model, seen = kind(copy.deepcopy(net), optimizer=sgd, scheduler=by_step), Seen()
            model.bad = bad
            run = fit(
                model, data, max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[seen], gradient_clip_val=0.5
            )
            results.append((model, run, seen))
        (ours, run, seen), (theirs, their_run, their_seen) = results
        torch.testing.assert_close(ours.net.state_dict(), theirs.net.state_dict(), rtol=0, atol=1e-14)
        assert run.global_step == their_run.global_step == 2 * steps
        assert seen.rates == their_seen.rates
        kept = [(n + 1) % accumulate != 0 and n < 6 for n in range(7)] * 2
        expected = [bool(output) and not waits for output, waits in zip(their_seen.outputs, kept, strict=True)]
        assert [bool(output) for output in seen.outputs] == expected

    @pytest.mark.parametrize("objective", ["SAM", "SSESAM 1", "ImbSAM group"])
    @pytest.mark.parametrize("passes", ["full", "split"])
    def test_objective_sees_the_others_alone(self, objective, passes):
        (x, y), bad, (x2, y2) = batches(3)
        model = SkippingInside(objective=OBJECTIVES[objective](), passes=passes, optimizer=lambda p: SGD(p, lr=1.0))
        model.bad, net = (1,), copy.deepcopy(model.net)
        fit(model, [(x, y), bad, (x2, y2)], accumulate_grad_batches=3)
        x, y = torch.cat([x, x2]), torch.cat([y, y2])
        gradient = naive_gradient(net, OBJECTIVES[objective]().terms(y), x, y)
        moved = [p - q for p, q in zip(net.parameters(), model.net.parameters(), strict=True)]
        torch.testing.assert_close(moved, [2 / 3 * g for g in gradient], rtol=0, atol=1e-13)

    def test_what_a_skipped_batch_leaves(self):
        """Buffers and logs are those of the batches that are used."""

        class Own(SkippingInside):
            def sample_losses(self, batch, batch_idx):
                losses = super().sample_losses(batch, batch_idx)
                self.log("seen", float(batch_idx))
                return losses

        data = batches(2, shape=(3, 5, 5))
        model = Own(convbn(), SAM(0.05))
        model.bad, twin = (1,), copy.deepcopy(model)
        twin.bad = ()
        run = fit(model, data, accumulate_grad_batches=2)
        assert run.callback_metrics["seen"] == 0
        fit(twin, [data[0]])
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(model.net[1], name), getattr(twin.net[1], name), rtol=0, atol=0)

    def test_a_step_of_its_own_gets_no_other(self):
        class ByHand(Model):
            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(self.sample_losses(batch).mean())
                optimizer.step()

        net, data = mlp(), batches(3)
        ours, theirs = ByHand(copy.deepcopy(net)), Automatic(net)
        assert fit(ours, data).global_step == fit(theirs, data).global_step == 3
        torch.testing.assert_close(ours.net.state_dict(), theirs.net.state_dict(), rtol=0, atol=1e-14)

    def test_loss_instead_of_the_step_is_refused_at_any_batch(self):
        class Mixed(Model):
            def training_step(self, batch, batch_idx):
                return self.sample_losses(batch).mean() if batch_idx == 1 else super().training_step(batch, batch_idx)

        with pytest.raises(MisconfigurationException, match=r"`Mixed.training_step` takes the place of Sharp"):
            fit(Mixed(), batches(3))


class Extra:
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "number": batch_idx, "inputs": batch[0], "texts": ["a"]}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_extra_keys_reach_callbacks(accumulate):
    data, seen = batches(3), {}
    for base in (Model, Automatic):
        torch.manual_seed(0)
        seen[base] = Seen()
        fit(type("Own", (Extra, base), {})(mlp()), data, callbacks=[seen[base]], accumulate_grad_batches=accumulate)
    for number, (ours, theirs) in enumerate(zip(seen[Model].outputs, seen[Automatic].outputs, strict=True)):
        is_kept = accumulate == 2 and number == 0
        assert set(ours) == set(theirs) - ({"loss"} if is_kept else set())
        assert (ours["number"], ours["texts"]) == (number, ["a"])
        assert torch.equal(ours["inputs"], theirs["inputs"])
        if accumulate == 1:
            assert ours["loss"].item() == pytest.approx(theirs["loss"].item(), rel=1e-6)


class TestBatchIdx:
    def test_of_each_batch(self):
        class Numbered(Model):
            seen = ()

            def sample_losses(self, batch, batch_idx):
                self.seen = (*self.seen, (batch_idx, len(batch[1]), self.in_clean_pass))
                return super().sample_losses(batch)

        model = Numbered(objective=SAM(0.05))
        fit(model, [*batches(1, n=4), *batches(1, n=5), *batches(1, n=6)], accumulate_grad_batches=2)
        passes = [(0, 4, True), (1, 5, True), (0, 4, False), (1, 5, False), (2, 6, True), (2, 6, False)]
        assert list(model.seen) == passes
        model = Numbered(objective=SSESAM(SPLIT), passes="split")
        fit(model, batches(2))
        assert [number for number, *_ in model.seen] == [0] * 4 + [1] * 4

    def test_in_measurements(self):
        class Numbered(Model):
            def sample_losses(self, batch, batch_idx):
                return super().sample_losses(batch) * (batch_idx + 1)

        model, data = Numbered(), batches(2)
        expected = sum((n + 1) * F.cross_entropy(model.net(x), y).item() for n, (x, y) in enumerate(data)) / 2
        assert Hessian(model, data).loss() == pytest.approx(expected, rel=1e-5)


class TestLoggedValues:
    """What Lightning refuses is refused where it is logged, before anything has changed."""

    @pytest.mark.parametrize("passes", ["full", "split"])
    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (
                ("x", torch.ones(2)),
                {},
                r"a tensor of a single element, in `self.log\('x', value\)`, but got one of shape",
            ),
            (("x", "text"), {}, r"`value` to be a number, a tensor or a metric"),
            (("x", None), {}, "`value`"),
            (("x", [1.0]), {}, "`value`"),
            (("x", {"a": 1.0}), {}, "`value`"),
            (("x", 1j), {}, "`value`"),
            ((3, 1.0), {}, "`name` to be a string"),
            (("x", 1.0), {"batch_size": "8"}, "`batch_size` to be a number"),
            (("x", 1.0), {"reduce_fx": "median"}, "Expected `reduce_fx` of"),
            (("x", 1.0), {"reduce_fx": torch.median}, "Expected `reduce_fx` of"),
            (("x", 1.0), {"on_step": False}, "logs nothing in a training step"),
            (("x", 1.0), {"on_step": False, "on_epoch": False}, "logs nothing in a training step"),
            (("x/dataloader_idx_0", 1.0), {}, "without `/dataloader_idx_`"),
            (("x", MeanMetric()), {}, "You logged a MeanMetric that is no attribute of `Logging`"),
            (("x", 1.0), {"unknown": 1}, "unexpected keyword argument"),
        ],
    )
    def test_refused_at_the_line(self, passes, arguments, options, message):
        class Logging(Model):
            def sample_losses(self, batch):
                losses = super().sample_losses(batch)
                if self.global_step == 1:
                    self.log(*arguments, **options)  # the line
                return losses

            def on_train_batch_start(self, batch, batch_idx):
                self.before = clones([*self.parameters(), *self.buffers()])

        model = Logging(objective=SSESAM(SPLIT), passes=passes)
        with pytest.raises((ValueError, TypeError, MisconfigurationException), match=message) as caught:
            fit(model, batches(2))
        assert any(
            (frame.line or "").endswith("# the line") for frame in traceback.extract_tb(caught.value.__traceback__)
        )
        assert_same_bits([*model.parameters(), *model.buffers()], model.before)
        assert model.trainer.global_step == 1

    @pytest.mark.parametrize("other", [{"on_epoch": True}, {"reduce_fx": "sum"}, {"prog_bar": True}, {"logger": False}])
    @pytest.mark.parametrize("when", ["pass", "step", "after"])
    def test_one_name_with_other_options(self, other, when):
        class Twice(Model):
            def sample_losses(self, batch):
                if when != "step" or self.global_step == 0:
                    self.log("x", 1.0)
                if when == "pass" or (when == "step" and self.global_step == 1):
                    self.log("x", 1.0, **other)
                return super().sample_losses(batch)

            def training_step(self, batch, batch_idx):
                if when == "after" and batch_idx == 1:
                    self.log("x", 1.0, **other)
                return super().training_step(batch, batch_idx)

        model = Twice()
        with pytest.raises(
            MisconfigurationException, match=r"`self.log\('?x'?, ...\)` twice in .* different arguments"
        ):
            fit(model, batches(2))
        assert model.trainer.global_step == (0 if when == "pass" else 1)

    def test_one_name_in_the_step_and_in_the_pass(self):
        class Both(Model):
            def sample_losses(self, batch):
                self.log("x", 1.0)
                return super().sample_losses(batch)

            def training_step(self, batch, batch_idx):
                self.log("x", 1.0, on_epoch=True)
                return super().training_step(batch, batch_idx)

        model = Both()
        with pytest.raises(MisconfigurationException, match=r"`self.log\('x', ...\)` twice in the training step"):
            fit(model, batches(2))
        assert model.trainer.global_step == 0

    def test_same_meaning_is_no_other_option(self):
        class Same(Model):
            def __init__(self):
                super().__init__()
                self.metric = MulticlassAccuracy(5)

            def sample_losses(self, batch):
                self.log("x", 1.0)
                self.log("x", 3.0, on_step=True, on_epoch=False, reduce_fx=torch.mean, logger=True, sync_dist=True)
                self.log("y", torch.tensor([2.0]), reduce_fx="avg", on_epoch=True)
                self.log("z", torch.tensor(2), False, None, True, True, max)
                self.metric.update(self.net(batch[0]), batch[1])
                self.log("m", self.metric, on_step=False, on_epoch=True)
                self.log("m", self.metric, on_step=False, on_epoch=True, metric_attribute="metric")
                return super().sample_losses(batch)

        run = fit(Same(), batches(2), max_epochs=2)
        assert {"x", "y_step", "y_epoch", "z_epoch", "m"} <= set(run.callback_metrics)
        assert run.callback_metrics["y_epoch"] == run.callback_metrics["z_epoch"] == 2

    @pytest.mark.parametrize("passes", ["full", "split"])
    def test_average_by_its_other_name(self, passes):
        class Own(Model):
            def sample_losses(self, batch):
                losses = super().sample_losses(batch)
                self.log("mean", losses.mean(), reduce_fx="avg")
                return losses

        model, data = Own(objective=SSESAM(SPLIT), passes=passes), batches(1)
        expected = F.cross_entropy(model.net(data[0][0]), data[0][1]).item()
        assert fit(model, data).callback_metrics["mean"].item() == pytest.approx(expected, rel=1e-5)

    def test_loss_that_is_not_logged(self):
        model, twin = Model(), Model()
        twin.load_state_dict(model.state_dict())
        choose(model, log_loss=False, log_sharpness=True)
        data = batches(2)
        run = fit(model, data)
        assert set(run.callback_metrics) == {"train/grad_norm", "train/grad_norm_all"}
        assert "train/loss" in fit(twin, data).callback_metrics
        assert_same_bits(model.parameters(), twin.parameters())

        class Shown(Model):
            step_options = StepOptions(log_loss=False)

        for kind, is_shown in ((Shown, False), (Model, True)):
            model, run = kind(), trainer(enable_progress_bar=True)
            model.step_options = kind.step_options
            run.fit(model, batches_loader(data))
            assert ("train/loss" in run.progress_bar_metrics) is is_shown


class Regression(L.LightningModule):
    def __init__(self, shape):
        super().__init__()
        self.net, self.shape = nn.Conv2d(3, 1, 1), shape

    def losses(self, batch):
        x, y = batch
        return F.mse_loss(self.net(x).reshape(self.shape), y, reduction="none")

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1)


class OursRegression(SharpnessAwareMixin, Regression):
    def __init__(self, shape):
        super().__init__(shape)
        self.objective = ERM()

    def sample_losses(self, batch):
        return self.losses(batch)


class TheirRegression(Regression):
    def training_step(self, batch, batch_idx):
        return self.losses(batch).mean()


@pytest.mark.parametrize("shape", [(4, 1, 5, 6), (4, 5, 6), (4, 30)])
def test_targets_of_an_image_regression(shape):
    data = [(torch.randn(4, 3, 5, 6), torch.randn(shape))]
    message = (
        r"`targets` to be class probabilities .* For a regression, override `sample_targets`|for a regression, over"
    )
    ours, theirs = OursRegression(shape), TheirRegression(shape)
    before = clones(ours.parameters())
    with pytest.raises(ValueError, match=message):
        fit(ours, data)
    assert_same_bits(ours.parameters(), before)

    class Told(OursRegression):
        def sample_targets(self, batch):
            return torch.zeros(batch[1].shape, dtype=torch.long)

    told = Told(shape)
    theirs.load_state_dict(told.state_dict())
    fit(told, data)
    fit(theirs, data)
    torch.testing.assert_close(told.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
