"""A run that was interrupted and resumed is, bit for bit, the run that was not."""

import copy
import csv
import os
import random
import signal
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SPLIT,
    STRICT,
    Automatic,
    Model,
    assert_same_bits,
    batches_loader,
    classification_batch,
    fit,
    mlp,
    start_process,
    trainer,
)
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ssesam import SSESAM, StageSwitch
from lightning_ssesam.exact_resume import _NumPyState

# Lightning speaks of callbacks that a resumed run does without, which is what these tests are about.
pytestmark = [STRICT, pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]

BATCHES, EPOCHS = 5, 3


class Stateful:
    """A loader that can go on from any batch, in another random order every epoch."""

    def __init__(self, data):
        self.data, self.state, self.resumed = data, {"seed": 0, "position": 0}, False

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        if not self.resumed:
            self.state = {"seed": int(torch.randint(1 << 30, ())), "position": 0}
        self.resumed = False
        generator = torch.Generator().manual_seed(self.state["seed"])
        for number in torch.randperm(len(self.data), generator=generator).tolist()[self.state["position"] :]:
            self.state["position"] += 1
            yield [t.clone() for t in self.data[number]]

    def state_dict(self):
        # The very object that it goes on to change.
        return self.state

    def load_state_dict(self, state):
        self.state, self.resumed = dict(state), 0 < state["position"] < len(self.data)


class Random(Model):
    """Everything that a checkpoint could lose: momenta, dropout, batch norm, random augmentation of three kinds."""

    def __init__(self):
        net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 5))
        super().__init__(net, SSESAM(SPLIT), optimizer=lambda params: torch.optim.AdamW(params, lr=0.01))
        self.fault = None
        self.calls = 0

    def on_train_batch_start(self, batch, batch_idx):
        batch[0].add_(0.1 * torch.randn(()) + 0.1 * np.random.rand() + 0.1 * random.random())

    def sample_losses(self, batch):
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        self.calls += 1
        if self.calls == self.fault:
            raise ConnectionError("injected")
        return losses

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]) + torch.rand(()))

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BATCHES * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data():
    torch.manual_seed(5)
    return [classification_batch() for _ in range(BATCHES)]


def seed(number):
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(number)


def run(ckpt_path=None, fault=None, callbacks=(), accumulate=1, loader=None, model=None, **kwargs):
    seed(3)
    model = model or Random()
    if ckpt_path is not None:
        # A process of another day.
        seed(99)
    model.fault = fault
    one = trainer(
        **{"max_epochs": EPOCHS, **kwargs},
        callbacks=[StageSwitch(at=0.5), *callbacks],
        accumulate_grad_batches=accumulate,
        enable_checkpointing=True,
        default_root_dir="unused",
    )
    loader = Stateful(data()) if loader is None else loader
    try:
        one.fit(model, loader, batches_loader(data()[:1]), ckpt_path=ckpt_path)
    except ConnectionError:
        return None
    return model


def assert_same_end(model, uninterrupted):
    assert_same_bits(model.state_dict().values(), uninterrupted.state_dict().values())
    ours, theirs = (m.trainer.optimizers[0].state_dict() for m in (model, uninterrupted))
    for key, state in theirs["state"].items():
        assert_same_bits(ours["state"][key].values(), state.values())
    assert ours["param_groups"] == theirs["param_groups"]
    assert model.trainer.global_step == uninterrupted.trainer.global_step
    assert model.objective.stage == uninterrupted.objective.stage == 2


def checkpoints(folder="checkpoints", **options):
    return ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **options)


class KnowsItsSteps(Random):
    """Asks for the number of steps when the optimizer is made, before a checkpoint is loaded. This makes the loader."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == BATCHES * EPOCHS
        return super().configure_optimizers()


@pytest.mark.parametrize("kind", ["own", "torchdata", "shuffled"])
def test_loader_that_is_made_before_the_checkpoint_is_loaded(kind):
    x, y = classification_batch(n=8 * BATCHES)

    def loader():
        if kind == "own":
            return Stateful(data())
        return (StatefulDataLoader if kind == "torchdata" else DataLoader)(TensorDataset(x, y), 8, shuffle=True)

    every = {"every_n_epochs": 1} if kind == "shuffled" else {"every_n_train_steps": 1}
    whole = run(callbacks=[checkpoints(**every)], loader=loader(), model=KnowsItsSteps())
    files = sorted(Path("checkpoints").glob("*.ckpt"))
    assert len(files) == (EPOCHS if kind == "shuffled" else BATCHES * EPOCHS)
    for path in files:
        assert_same_end(run(path, loader=loader(), model=KnowsItsSteps()), whole)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_from_the_checkpoint_of_every_step(accumulate):
    uninterrupted = run(accumulate=accumulate)
    run(callbacks=[checkpoints(every_n_train_steps=1)], accumulate=accumulate)
    files = list(Path("checkpoints").iterdir())
    assert len(files) == EPOCHS * -(-BATCHES // accumulate)
    for file in files:
        assert_same_end(run(file, accumulate=accumulate), uninterrupted)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_from_the_checkpoint_of_an_exception(accumulate):
    """In any forward of any step: clean or perturbed, in an epoch's first batch, while batches are accumulated."""
    # An epoch of either stage: each further one would be as the second, and takes as long as both.
    options = {"accumulate": accumulate, "max_epochs": 2}
    uninterrupted = run(**options)
    for fault in range(1, uninterrupted.calls + 1):
        run(fault=fault, callbacks=[OnExceptionCheckpoint(".", f"at-{fault}")], **options)
        progress = torch.load(f"at-{fault}.ckpt", weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        assert progress["current"]["ready"] < BATCHES
        assert not progress["is_last_batch"]
        assert_same_end(run(f"at-{fault}.ckpt", **options), uninterrupted)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"every_n_epochs": 1}, {}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {"limit_val_batches": 0}),
        ({"every_n_train_steps": 1}, {"limit_val_batches": 0}),
        ({"every_n_train_steps": 1}, {"val_check_interval": 2}),
        ({"train_time_interval": timedelta(microseconds=1)}, {"val_check_interval": 2, "accumulate": 3}),
        ({"monitor": "val"}, {"val_check_interval": 2, "accumulate": 3}),
        ({"monitor": "val"}, {"val_check_interval": 1, "accumulate": 2}),
        ({"every_n_train_steps": 1}, {"max_steps": 12}),
        ({"every_n_epochs": 1}, {"max_steps": 12}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {"max_steps": 12}),
        ({"every_n_train_steps": 1}, {"limit_train_batches": 4, "check_val_every_n_epoch": 2}),
    ],
    ids=str,
)
def test_from_checkpoints_of_all_kinds(options, flags):
    uninterrupted = run(**flags)
    run(callbacks=[checkpoints(**options)], **flags)
    files = list(Path("checkpoints").iterdir())
    assert len(files) >= 3
    for file in files:
        assert_same_end(run(file, **flags), uninterrupted)


@pytest.mark.parametrize("batch_idx", [0, 2, 4])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_from_the_checkpoint_of_a_fault_elsewhere(hook, batch_idx):
    class Fault(Callback):
        pass

    def fail(self, trainer, *args):
        if trainer.global_step == 5 + batch_idx:
            raise ConnectionError

    setattr(Fault, hook, fail)
    uninterrupted = run(accumulate=1)
    run(callbacks=[Fault(), OnExceptionCheckpoint(".", "fault")])
    assert_same_end(run("fault.ckpt"), uninterrupted)


def test_same_module_goes_on_after_an_exception():
    """With batches of the interrupted update still in it."""
    uninterrupted, models = run(accumulate=3), []

    class Failing(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            models.append(pl_module)
            if trainer.global_step == 2 and batch_idx == 1:
                assert len(pl_module._SharpnessAwareMixin__step.pending) == 1
                raise ConnectionError

    run(accumulate=3, callbacks=[Failing(), OnExceptionCheckpoint(".", "fault")])
    assert_same_end(run("fault.ckpt", accumulate=3, model=models[0]), uninterrupted)


def test_scheduler_of_accumulation_in_the_middle_of_an_epoch():
    def scheduler():
        return GradientAccumulationScheduler({0: 1, 1: 3})

    uninterrupted = run(callbacks=[scheduler()])
    run(callbacks=[scheduler(), checkpoints(every_n_train_steps=1)])
    for file in Path("checkpoints").iterdir():
        assert_same_end(run(file, callbacks=[scheduler()]), uninterrupted)


@pytest.mark.parametrize("workers", [0, 1])
def test_with_a_shuffled_loader_from_the_end_of_an_epoch(workers):
    def loader():
        x, y = classification_batch(40)
        return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, num_workers=workers)

    torch.manual_seed(0)
    examples = loader()
    uninterrupted = run(loader=examples)
    for options in ({"every_n_epochs": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}):
        run(callbacks=[checkpoints(f"workers-{workers}", **options)], loader=examples)
    files = list(Path(f"workers-{workers}").iterdir())
    assert len(files) == 6
    for file in files:
        assert_same_end(run(file, loader=examples), uninterrupted)


def test_with_the_stateful_loader_of_torchdata():
    x, y = classification_batch(40)

    def loader():
        # It draws the seed of its order when it is made.
        torch.manual_seed(7)
        return StatefulDataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)

    uninterrupted = run(loader=loader())
    for options in ({"every_n_train_steps": 1}, {"every_n_epochs": 1}, {"save_on_train_epoch_end": True}):
        run(callbacks=[checkpoints(**options)], loader=loader())
    for fault in range(1, uninterrupted.calls + 1, 3):
        run(fault=fault, callbacks=[OnExceptionCheckpoint("checkpoints", f"at-{fault}")], loader=loader())
    files = list(Path("checkpoints").iterdir())
    assert len(files) >= 30
    for file in files:
        assert_same_end(run(file, loader=loader()), uninterrupted)


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_with_a_sampler_for_several_processes(kind):
    """Which Lightning puts in under DDP: its order depends on the number of the epoch."""
    x, y = classification_batch(40)

    def loader():
        torch.manual_seed(7)
        dataset = TensorDataset(x, y)
        return kind(dataset, batch_size=8, sampler=DistributedSampler(dataset, num_replicas=1, rank=0))

    every = {"every_n_train_steps": 1} if kind is StatefulDataLoader else {"every_n_epochs": 1}
    uninterrupted = run(loader=loader())
    for options in (every, {"every_n_epochs": 1, "save_on_train_epoch_end": True}):
        run(callbacks=[checkpoints(**options)], loader=loader())
    for file in Path("checkpoints").iterdir():
        assert_same_end(run(file, loader=loader()), uninterrupted)


def test_with_a_generator_of_the_loaders_own():
    x, y = classification_batch(40)

    def loader():
        generator = torch.Generator().manual_seed(7)
        return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=generator)

    uninterrupted = run(loader=loader())
    for options in ({"every_n_epochs": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}):
        run(callbacks=[checkpoints(**options)], loader=loader())
    for file in Path("checkpoints").iterdir():
        assert_same_end(run(file, loader=loader()), uninterrupted)


@pytest.mark.parametrize("limit", [None, 3])
def test_data_without_length_in_a_stateful_loader(limit):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(x[0], y[0]) for x, y in data()] * 8)

    def loader():
        return StatefulDataLoader(Endless(), batch_size=8)

    flags = {"max_steps": 10, "max_epochs": -1, "limit_train_batches": limit}
    run(callbacks=[checkpoints(every_n_train_steps=2)], loader=loader(), **flags)
    for file in Path("checkpoints").iterdir():
        assert run(file, loader=loader(), **flags).trainer.global_step == 10


@pytest.mark.parametrize("number", range(7))
def test_checkpoint_that_is_written_within_a_pass(number):
    """As by the handler of a signal, which SLURM sends."""

    class Saving(Random):
        def sample_losses(self, batch):
            if self.calls == number:
                self.trainer.save_checkpoint("signal.ckpt", weights_only=number == 0)
                self.trainer.save_checkpoint("signal.ckpt")
            return super().sample_losses(batch)

    seed(3)
    model = Saving()
    uninterrupted = run(model=model)
    assert_same_end(run("signal.ckpt"), uninterrupted)


def test_plain_module_after_one_with_the_mixin():
    """On the same Trainer: its checkpoints are its own."""
    torch.manual_seed(0)
    batches = batches_loader([classification_batch() for _ in range(5)])
    saved = []
    for first in (Model, Automatic):
        one = trainer(enable_checkpointing=True, callbacks=[checkpoints(first.__name__, every_n_train_steps=1)])
        one.fit(first(), batches)
        one.fit_loop.max_epochs = 2
        one.fit(Automatic(), batches)
        paths = sorted(Path(first.__name__).glob("epoch=1-*"))
        saved.append([torch.load(path, weights_only=True) for path in paths])
    for ours, plain in zip(*saved, strict=True):
        progress = [state["loops"]["fit_loop"]["epoch_loop.batch_progress"] for state in (ours, plain)]
        assert progress[0] == progress[1]
        assert ours["callbacks"].keys() == plain["callbacks"].keys()
    assert len(saved[0]) == 5


def run_until_killed():
    class Killed(Random):
        def sample_losses(self, batch):
            if self.calls == 24:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().sample_losses(batch)

    globals()["Random"] = Killed
    run(callbacks=[checkpoints(every_n_train_steps=2)], accumulate=2)


def test_killed_process():
    """Not an exception: the process is gone at once, in the middle of a pass."""
    process = start_process(run_until_killed)
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    newest = max(Path("checkpoints").iterdir(), key=os.path.getmtime)
    assert_same_end(run(newest, accumulate=2), run(accumulate=2))


class TestContents:
    def checkpoint(self, model, path, **kwargs):
        batches = [classification_batch() for _ in range(4)]
        return fit(model, batches, **kwargs).save_checkpoint(path)

    def test_nothing_private_but_plain_values(self):
        self.checkpoint(Model(objective=SSESAM(SPLIT)), "mixin.ckpt")
        self.checkpoint(Automatic(), "plain.ckpt")
        ours, plain = (torch.load(f"{name}.ckpt", weights_only=True) for name in ("mixin", "plain"))
        assert ours.keys() == plain.keys()
        assert ours["state_dict"].keys() == plain["state_dict"].keys()
        assert ours["callbacks"].keys() == {"TrainerSupport", "ExactResume"}
        assert ours["callbacks"]["TrainerSupport"].keys() == {"skipped_updates"}
        assert ours["callbacks"]["ExactResume"].keys() == {"random_states"}
        assert str(ours["optimizer_states"][0]["state"].keys()) == str(plain["optimizer_states"][0]["state"].keys())
        size = Path("mixin.ckpt").stat().st_size - Path("plain.ckpt").stat().st_size
        assert size < 20_000

    @pytest.mark.parametrize("kinds", [(Model, Automatic), (Automatic, Model)])
    def test_loads_with_and_without_the_mixin(self, kinds):
        first, second = kinds
        model = first()
        self.checkpoint(model, "first.ckpt")
        state = torch.load("first.ckpt", weights_only=True)["state_dict"]
        other = second()
        other.load_state_dict(state, strict=True)
        assert_same_bits(other.state_dict().values(), model.state_dict().values())
        assert_same_bits(second.load_from_checkpoint("first.ckpt", strict=True).parameters(), model.parameters())

    @pytest.mark.parametrize("kinds", [(Model, Automatic), (Automatic, Model)])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_training_goes_on_with_and_without_the_mixin(self, kinds, accumulate):
        """Momentum, counters and learning rates too."""

        def scheduler(optimizer):
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        torch.manual_seed(0)
        net, batches = mlp(), [classification_batch() for _ in range(4)]
        first, second = (kind(copy.deepcopy(net), scheduler=scheduler) for kind in kinds)
        options = {"accumulate_grad_batches": accumulate}
        fit(first, batches, max_epochs=2, **options).save_checkpoint("first.ckpt")
        resumed = fit(second, batches, max_epochs=3, ckpt_path="first.ckpt", **options)
        whole = Automatic(net, scheduler=scheduler)
        expected = fit(whole, batches, max_epochs=3, **options)
        torch.testing.assert_close(second.net.state_dict(), whole.net.state_dict(), rtol=0, atol=1e-6)
        assert resumed.global_step == expected.global_step
        assert resumed.optimizers[0].param_groups[0]["lr"] == expected.optimizers[0].param_groups[0]["lr"]

    def test_weights_of_an_exception_in_a_perturbed_pass_are_clean(self):
        class Faulty(Model):
            def sample_losses(self, batch):
                if self.global_step == 2 and not self.in_clean_pass:
                    raise ConnectionError
                return super().sample_losses(batch)

        batches = [classification_batch() for _ in range(4)]
        net = mlp()
        model, twin = Faulty(copy.deepcopy(net), SSESAM(SPLIT, 5.0, 5.0)), Model(net, SSESAM(SPLIT, 5.0, 5.0))
        with pytest.raises(ConnectionError):
            fit(model, batches, callbacks=[OnExceptionCheckpoint(".", "fault")], enable_checkpointing=True)
        fit(twin, batches[:2])
        saved = torch.load("fault.ckpt", weights_only=True)
        assert_same_bits(saved["state_dict"].values(), twin.state_dict().values())
        assert saved["global_step"] == 2


def test_logged_steps_go_on():
    def rows(logger):
        with Path(logger.log_dir, "metrics.csv").open() as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]

    for options in ({"callbacks": [checkpoints(every_n_train_steps=1)]}, {"fault": 16}, {"fault": 20}):
        if "fault" in options:
            options["callbacks"] = [OnExceptionCheckpoint("checkpoints", f"at-{options['fault']}")]
        run(**options)
    for file in Path("checkpoints").iterdir():
        logger = CSVLogger("logs", name=file.stem)
        begun = torch.load(file, weights_only=True)["global_step"]
        run(file, logger=logger, log_every_n_steps=1)
        if begun < 15:
            assert rows(logger) == list(range(begun, 15)), file


def test_checkpoint_that_is_only_looked_at_leaves_the_next_run_alone():
    """`Trainer.test(ckpt_path=...)` hands the callbacks their states too."""

    class Tested(Model):
        def test_step(self, batch, batch_idx):
            return self.sample_losses(batch).mean()

    torch.manual_seed(0)
    batches = batches_loader([classification_batch() for _ in range(2)])
    model, one = Tested(nn.Sequential(nn.Dropout(0.5), mlp()), SSESAM(SPLIT)), trainer()
    one.fit(model, batches)
    one.save_checkpoint("end.ckpt")
    before, ends = copy.deepcopy(model.state_dict()), []
    for look in (False, True):
        model.load_state_dict(before)
        if look:
            one.test(model, batches, ckpt_path="end.ckpt", verbose=False)
        torch.manual_seed(1)
        one.fit_loop.max_epochs += 1
        one.fit(model, batches)
        ends.append(copy.deepcopy(model.state_dict()))
    assert_same_bits(ends[0].values(), ends[1].values())


def numpys_own_state():
    name, keys, *counters = np.random.get_state()
    return name, keys.tolist(), *counters


@pytest.mark.parametrize("reads_in_between", [True, False])
def test_state_of_numpy_is_that_of_now(reads_in_between):
    state, kept = _NumPyState(), np.random.get_state()
    draws = [
        lambda: None,
        np.random.random,
        # Every other normal number comes without a change of that memory.
        np.random.standard_normal,
        np.random.standard_normal,
        lambda: np.random.standard_normal(3),
        lambda: np.random.standard_normal(1),
        lambda: np.random.shuffle([1, 2, 3]),
        lambda: np.random.seed(5),
        lambda: np.random.random(700),
        lambda: np.random.set_state(("MT19937", np.arange(624, dtype=np.uint32), 3, 1, 0.25)),
        np.random.standard_normal,
        lambda: np.random.set_state(("MT19937", np.arange(624, dtype=np.uint32), 3)),
        lambda: np.random.random(2),
    ]
    bits = np.random.get_bit_generator()
    try:
        for draw in [*draws, lambda: np.random.set_bit_generator(np.random.MT19937(3)), *draws]:
            draw()
            if reads_in_between:
                state.read()
            name, keys, *counters = state.read()
            assert (name, keys.tolist(), *counters) == numpys_own_state()
    finally:
        np.random.set_bit_generator(bits)
        np.random.set_state(kept)


def test_state_of_numpy_is_read_once_while_nobody_draws(monkeypatch):
    state, reads = _NumPyState(), []
    read = np.random.get_state
    np.random.seed(1)
    monkeypatch.setattr(np.random, "get_state", lambda: reads.append(1) or read())
    states = [state.read(), state.read()]
    np.random.random()
    states += [state.read(), state.read()]
    assert len(reads) == 2
    assert [s[2] for s in states] == [624, 624, 2, 2]
