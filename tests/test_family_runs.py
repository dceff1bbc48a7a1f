"""The family through ``Trainer.fit``: states of ascents in checkpoints, accumulation, precision, refusals."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SPLIT,
    STRICT,
    Model,
    assert_same_bits,
    batches,
    batches_loader,
    choose,
    clones,
    fit,
    mlp,
    trainer,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_resume import Stateful
from torch import nn

from lightning_ssesam import (
    ASAM,
    GSAM,
    LESAM,
    SAM,
    SSESAM,
    Adaptive,
    Ascent,
    Friendly,
    FriendlySAM,
    MomentumSAM,
    Noise,
    PACBayesRadius,
    RandomSAM,
    StageSwitch,
)
from lightning_ssesam.errors import ArgumentError

pytestmark = [STRICT, pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]

FRIENDLY = Ascent(Friendly(0.6, 0.8), Adaptive(0.05))
# An objective, and the options of its step.
STATEFUL = {
    "Friendly": (lambda: SSESAM(SPLIT, 0.3, 0.5, ascent=FRIENDLY), {}),
    "Noise": (lambda: RandomSAM(0.3), {}),
    "reuse": (lambda: SAM(0.3), {"interval": 3, "reuse": 0.7}),
}


class Failing(Callback):
    """Fails in a hook of one step."""

    def __init__(self, hook, step):
        setattr(self, hook, lambda trainer, *_: self.fail(trainer))
        self.step = step

    def fail(self, trainer):
        if trainer.global_step == self.step:
            raise KeyError("injected")


def run_of(kind, data, start, epochs=2, ckpt_path=None, callbacks=(), **kwargs):
    """Train; a run that is resumed begins with another seed, as a new process does."""
    make, options = STATEFUL[kind]
    model = Model(copy.deepcopy(start), make())
    choose(model, **options, **kwargs.pop("options", {}))
    callbacks = [StageSwitch(at=0.5), *callbacks] if kind == "Friendly" else list(callbacks)
    run = trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True, **kwargs)
    torch.manual_seed(9 if ckpt_path is None else 10)
    run.fit(model, data if isinstance(data, Stateful) else batches_loader(data), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("kind", STATEFUL)
class TestResume:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_in_the_middle_and_at_the_end_of_an_epoch(self, kind, accumulate, tmp_path):
        """With two batches an update, the fifth batch of an epoch is an update by itself."""
        data, start = batches(5, n=12), mlp()
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"accumulate_grad_batches": accumulate}
        model = run_of(kind, Stateful(data), start, callbacks=[keep], **options)
        steps = 10 if accumulate == 1 else 6
        for step in {2, steps // 2, steps - 1}:
            resumed = run_of(kind, Stateful(data), start, ckpt_path=tmp_path / f"step={step}.ckpt", **options)
            assert_same_bits(resumed.parameters(), model.parameters())
        torch.load(tmp_path / f"step={steps - 1}.ckpt", weights_only=True)

    @pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_train_batch_start"])
    def test_after_an_exception(self, kind, hook, tmp_path):
        """The checkpoint goes on before the update, whose gradient was made already."""
        data, start = batches(5, n=12), mlp()
        model = run_of(kind, Stateful(data), start)
        callbacks = [Failing(hook, 3), OnExceptionCheckpoint(tmp_path, "failed")]
        with pytest.raises(KeyError, match="injected"):
            run_of(kind, Stateful(data), start, callbacks=callbacks)
        resumed = run_of(kind, Stateful(data), start, ckpt_path=tmp_path / "failed.ckpt")
        assert_same_bits(resumed.parameters(), model.parameters())

    def test_skipped_step_leaves_the_state(self, kind):
        """A run with a bad batch is the run without, but for counters."""
        if kind == "reuse":
            return
        data, start = batches(4, n=12), mlp()
        bad = (torch.full((12, 8), float("nan")), data[0][1])
        plain = {"Friendly": Model(copy.deepcopy(start), FriendlySAM(0.3, 0.6)), "Noise": Model(start, RandomSAM(0.3))}[
            kind
        ]
        skipping = copy.deepcopy(plain)
        choose(skipping, on_nonfinite="skip")
        for model, batch_list in ((plain, data), (skipping, [*data[:2], bad, *data[2:]])):
            torch.manual_seed(9)
            fit(model, batch_list)
        assert skipping.skipped_updates == 1
        assert_same_bits(skipping.parameters(), plain.parameters())

    def test_second_fit_begins_anew(self, kind):
        data, start = batches(4, n=12), mlp()
        model, twins = run_of(kind, data, start, epochs=1), []
        make, options = STATEFUL[kind]
        for one in (model, Model(copy.deepcopy(model.net), make())):
            choose(one, **options)
            one.objective.stage = 1
            torch.manual_seed(9)
            fit(one, data)
            twins.append(clones(one.parameters()))
        assert_same_bits(*twins)

    def test_copies_in_the_middle(self, kind):
        """A copy of a module is a module that has not begun, and can be trained by itself."""

        class Copying(Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                if trainer.global_step == 2:
                    copies.append(copy.deepcopy(pl_module.net))
                    pickle.dumps(pl_module.objective)
                    copies.append(copy.deepcopy(pl_module))

        data, start, copies = batches(4, n=12), mlp(), []
        model = run_of(kind, data, start, callbacks=[Copying()], epochs=1)
        expected = run_of(kind, data, start, epochs=1)
        assert_same_bits(model.parameters(), expected.parameters())
        net, copied = copies
        fresh = Model(net, STATEFUL[kind][0]())
        fresh.step_options, fresh.objective.stage = copied.step_options, copied.objective.stage
        for one in (fresh, copied):
            torch.manual_seed(9)
            fit(one, data)
        assert_same_bits(copied.parameters(), fresh.parameters())


OBJECTIVES = {
    "FriendlySAM": lambda: FriendlySAM(0.3, 0.6, 0.8),
    "LESAM": lambda: LESAM(0.05, 0.4),
    "PACBayesRadius": lambda: SAM(0.3, ascent=Ascent(radius=PACBayesRadius(0.2, 731, 0.01, 0.3))),
    "GSAM": lambda: GSAM(0.3, 0.6),
    "reuse": lambda: SAM(0.3),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_is_one_large_batch(name):
    """The last update has one batch of two, whose gradient Lightning halves: directions and radii do not see it."""
    data, start = batches(5, n=12), mlp()
    whole = [tuple(map(torch.cat, zip(*data[i : i + 2], strict=True))) for i in (0, 2, 4)]
    models = [Model(copy.deepcopy(start), OBJECTIVES[name]()) for _ in range(2)]
    for model, batch_list, k in zip(models, (data, whole), (2, 1), strict=True):
        if name == "reuse":
            choose(model, interval=2, reuse=0.7)
        if k == 1:
            model.on_before_optimizer_step = lambda optimizer, model=model: [
                p.grad.mul_(0.5) for p in model.parameters() if model.global_step == 2
            ]
        fit(model, batch_list, accumulate_grad_batches=k)
        # A second epoch, in which the state of the short group counts.
        fit(model, batch_list, accumulate_grad_batches=k)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=1e-13)


def scaling(scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_scale(name):
    """A GradScaler as on a GPU; powers of two in its place change no digit."""
    data, start, states = batches(4), mlp(), []
    for scale in (1.0, 1024.0):
        model = Model(copy.deepcopy(start), OBJECTIVES[name]())
        if name == "reuse":
            choose(model, interval=2, reuse=0.7)
        fit(model, data, plugins=[scaling(scale)])
        states.append(model.state_dict())
    # Gradients of half precision lose other digits.
    torch.testing.assert_close(*states, rtol=0, atol=3e-3)
    moved = states[0]["net.0.weight"] - start[0].weight
    assert moved.norm() > 0.1


@pytest.mark.parametrize("is_clean", [True, False])
def test_overflow_leaves_the_state(is_clean):
    class Overflowing(Model):
        def sample_losses(self, batch):
            losses = super().sample_losses(batch)
            return losses * 1e38 if self.global_step == 1 and self.in_clean_pass == is_clean else losses

    def note(outputs, batch, batch_idx):
        support = next(c for c in model.trainer.callbacks if type(c).__name__ == "TrainerSupport")
        seen.append(support.state_dict()["ascents"]["all"]["mean"])

    model, seen = Overflowing(mlp(), FriendlySAM(0.3, 0.6, 0.8)), []
    model.on_train_batch_end = note
    fit(model, batches(3), plugins=[scaling(1024.0)])
    first, second, third = seen
    assert_same_bits(second.values(), first.values())
    assert not torch.equal(third["net.0.weight"], first["net.0.weight"])


class TestRefusals:
    @pytest.mark.parametrize(
        ("objective", "optimizer", "text"),
        [
            (lambda: SAM(0.1, ascent=Ascent(only="norm")), None, "`only` to be a selection of at least one of the 4"),
            (lambda: ASAM(0.1, ascent=Ascent(only=lambda n, p: False)), None, "`only` to be a selection of at least"),
            (lambda: MomentumSAM(0.1), lambda p: torch.optim.SGD(p, lr=0.1), "`optimizer` to be one with a momentum"),
            (lambda: MomentumSAM(0.1), lambda p: torch.optim.Adagrad(p), "`optimizer` to be one with a momentum"),
            (
                lambda: SSESAM(SPLIT, ascent=Ascent(MomentumSAM().make_ascent().direction)),
                torch.optim.Adadelta,
                "`optim",
            ),
        ],
    )
    def test_before_training(self, objective, optimizer, text):
        model = Model(mlp(), objective(), optimizer=optimizer)
        before = clones(model.parameters())
        model.on_train_start = lambda: pytest.fail("training has begun")
        with pytest.raises(MisconfigurationException, match=f"`Model` cannot train as it is. Expected argument {text}"):
            fit(model, batches(1))
        assert_same_bits(model.parameters(), before)

    def test_lazy_modules_are_looked_at_in_the_first_step(self):
        net = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.LazyLinear(5))
        model = Model(net, SAM(0.1, ascent=Ascent(only="norm")))
        model.on_fit_start = lambda: model.net(torch.zeros(2, 8))
        with pytest.raises(
            (ArgumentError, MisconfigurationException), match="`only` to be a selection of at least one"
        ):
            fit(model, batches(1))

    def test_parameter_that_only_the_optimizer_has(self):
        """It takes part in the perturbation under a name of its own."""
        seen, extra = set(), nn.Parameter(torch.ones(5))

        class Scaled(Model):
            def sample_losses(self, batch):
                return F.cross_entropy(self.net(batch[0]) * extra, batch[1], reduction="none")

        def only(name, parameter):
            seen.add(name)
            return parameter is extra

        model = Scaled(
            mlp(), SAM(0.1, ascent=Ascent(only=only)), optimizer=lambda p: torch.optim.SGD([*p, extra], lr=0.1)
        )
        fit(model, batches(2))
        assert seen == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias", "parameters.4"}
        assert not torch.equal(extra, torch.ones(5))

    def test_adam_has_a_momentum(self):
        model = Model(mlp(), MomentumSAM(0.1), optimizer=torch.optim.Adam)
        before = clones(model.parameters())
        fit(model, batches(2))
        assert not torch.equal(before[0], next(model.parameters()))


@pytest.mark.usefixtures("float64")
def test_double_precision_of_the_trainer():
    """A float32 default dtype outside rounds no constant of an ascent."""
    data, start, states = batches(4), mlp(), []
    for default, precision in ((torch.float64, "32-true"), (torch.float32, "64-true")):
        torch.set_default_dtype(default)
        model = Model(copy.deepcopy(start), SSESAM(SPLIT, 0.3, 0.5, ascent=FRIENDLY))
        fit(model, data, precision=precision)
        states.append(model.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=1e-13)


def test_compiled_network_keeps_its_names():
    seen = []

    def only(name, parameter):
        seen.append(name)
        return True

    model = Model(mlp(), SAM(0.1, ascent=Ascent(Noise(), only=only)))
    model.net = torch.compile(model.net, backend="eager")
    fit(model, batches(1))
    assert set(seen) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
