"""Curvature over a training: at the right times, of the right weights, and without a trace in the training."""

import csv
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT, Automatic, KillAt, Killed, Model, assert_same_bits, convbn, mlp, trainer
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ssesam import ERM, SSESAM, ClassSplit, CurvatureMonitor, StageSwitch
from lightning_ssesam.curvature import measure_curvature

pytestmark = STRICT

LABELS = torch.tensor([0] * 20 + [1] * 16 + [2] * 12 + [3] * 6 + [4] * 4)
SPLIT = ClassSplit.from_labels(LABELS, tail_below=8)
QUICK = {"tolerance": 0.3, "max_iterations": 20}


def training_set(shape=(8,)):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(len(LABELS), *shape, generator=generator), LABELS)


def run(make_net, *callbacks, epochs=6, loader=None, objective=None, **kwargs):
    """Train with two stages on 58 samples, 4 steps an epoch."""
    torch.manual_seed(3)
    model = Model(make_net(), objective or SSESAM(SPLIT, 0.05, 0.1))
    fit = trainer(max_epochs=epochs, callbacks=list(callbacks), num_sanity_val_steps=0, **kwargs)
    fit.fit(model, DataLoader(training_set(), 16, shuffle=True) if loader is None else loader)
    return model, fit


@pytest.mark.parametrize("make_net", [lambda: nn.Sequential(mlp(), nn.Dropout(0.3)), convbn], ids=["dropout", "norm"])
def test_training_is_the_same_to_the_bit(make_net):
    shape = (3, 5, 5) if make_net is convbn else (8,)
    results = []
    for callbacks in ([], [CurvatureMonitor(2, samples=10, **QUICK)]):
        loader = DataLoader(training_set(shape), 16, shuffle=True)
        model, fit = run(make_net, StageSwitch(epoch=3), *callbacks, loader=loader)
        momenta = [state["momentum_buffer"] for state in fit.optimizers[0].state.values()]
        results.append([*model.state_dict().values(), *momenta, torch.get_rng_state()])
        assert model.training
    assert_same_bits(*results)


class Weights(L.Callback):
    """Keeps the weights from before and after every update."""

    def __init__(self):
        self.at = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.at.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_end(self, trainer, pl_module):
        self.on_train_batch_start(trainer, pl_module, None, 0)


@pytest.mark.parametrize("switch_first", [True, False])
def test_times_and_weights(switch_first):
    weights, monitor, switch = Weights(), CurvatureMonitor(2, samples=1000, rho=0.1), StageSwitch(step=10)
    model, _ = run(mlp, weights, *([switch, monitor] if switch_first else [monitor, switch]))
    seen = [(row["step"], row["epoch"], row["stage"], row["when"], row["group"]) for row in monitor.history]
    expected = [
        (8, 2.0, 1, "epoch"),
        (10, 2.5, 2, "before"),
        (11, 2.75, 2, "after"),
        (16, 4.0, 2, "epoch"),
        (24, 6.0, 2, "epoch"),
    ]
    assert seen == [(*time, group) for time in expected for group in ("head", "tail")]
    data = [training_set().tensors]
    for row in monitor.history:
        model.load_state_dict(weights.at[row["step"]])
        options = {"rho": 0.1, "tolerance": 0.05, "trace_samples": 0, "probes": 0}
        (curvature,) = measure_curvature(model, data, SPLIT, [row["group"]], **options).values()
        assert curvature.samples == (48 if row["group"] == "head" else 10)
        for name, value in curvature.numbers().items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (row["when"], name)


def test_the_same_weights_are_measured_once(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return measure_curvature(*args, **kwargs)

    monkeypatch.setattr("lightning_ssesam.callbacks.curvature_monitor.measure_curvature", counted)
    monitor = CurvatureMonitor(1, samples=5, **QUICK)
    run(mlp, StageSwitch(step=8), monitor, epochs=3)
    seen = [(row["step"], row["when"]) for row in monitor.history if row["group"] == "tail"]
    assert seen == [(4, "epoch"), (8, "epoch"), (8, "before"), (9, "after"), (12, "epoch")]
    assert len(calls) == 4
    at_8 = [{**row, "when": "", "stage": 0} for row in monitor.history if row["step"] == 8]
    assert at_8[:2] == at_8[2:]


def test_settings_of_a_measurement():
    data = [training_set((3, 5, 5)).tensors]
    settings = {"rho": 0.2, "probes": 1, "dtype": "float64", "batch_norm": "batch", **QUICK}
    monitor = CurvatureMonitor(1, groups=["tail"], batches=data, seed=4, **settings)
    loader = DataLoader(training_set((3, 5, 5)), 16)
    model, _ = run(convbn, monitor, epochs=1, loader=loader)
    (curvature,) = measure_curvature(model, data, SPLIT, ["tail"], trace_samples=0, seed=4, **settings).values()
    numbers = {name: value for name, value in monitor.history[0].items() if name in curvature.numbers()}
    assert numbers == pytest.approx(curvature.numbers(), rel=1e-6)
    assert "negative_share" in numbers


def test_default_settings():
    parser = ArgumentParser()
    parser.add_class_arguments(CurvatureMonitor, "monitor", skip={"batches", "split", "sample_losses"})
    defaults = vars(parser.get_defaults().monitor)
    own = {"every_n_epochs": 10, "groups": ("head", "tail"), "samples": 512, "batch_size": 256, "progress": False}
    settings = {"rho": 0.05, "tolerance": 0.05, "max_iterations": 100, "trace_samples": 0, "probes": 0, "seed": 0}
    assert defaults == {**own, **settings, "dtype": None, "batch_norm": "eval"}
    assert vars(CurvatureMonitor().settings) == {**settings, "dtype": None, "batch_norm": "eval"}


class Collected(Logger):
    name, version = "collected", 0

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged += [(step, name, value) for name, value in metrics.items() if name.startswith("curvature/")]

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_goes_to_every_logger():
    monitor, mine = CurvatureMonitor(1, groups=["tail", "class_0"], trace_samples=2, **QUICK), Collected()
    torch.manual_seed(3)
    model = Model(mlp(), SSESAM(SPLIT))
    fit = trainer(max_epochs=2, callbacks=[monitor], logger=[mine, CSVLogger("logs")])
    fit.fit(model, DataLoader(training_set(), 16, shuffle=True))
    names = set(monitor.history[0]) - {"step", "epoch", "stage", "when", "group"}
    assert {"largest", "smallest", "ratio", "trace", "sharpness", "loss"} < names
    flat = [
        (row["step"], f"curvature/{row['group']}/{name}", row[name])
        for row in monitor.history
        for name in sorted(names)
    ]
    assert sorted(mine.logged) == sorted(flat)
    with next(Path("logs").rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("curvature/tail/smallest")]
    assert [(int(row["step"]), float(row["curvature/tail/smallest"])) for row in rows] == [
        (row["step"], row["smallest"]) for row in monitor.history if row["group"] == "tail"
    ]


@pytest.mark.parametrize("kill_at", [9, 12, 13])
def test_resumed(kill_at):
    """Stage 2 begins at step 12, the start of an epoch."""

    def callbacks():
        return StageSwitch(step=12), CurvatureMonitor(1, samples=5, **QUICK)

    whole = callbacks()
    run(mlp, *whole, logger=False)
    first, second = callbacks(), callbacks()
    checkpoint = L.pytorch.callbacks.ModelCheckpoint("kept", save_last=True, save_on_train_epoch_end=True)
    with pytest.raises(Killed):
        run(mlp, *first, KillAt(kill_at), checkpoint, enable_checkpointing=True)
    model = Model(mlp(), SSESAM(SPLIT, 0.05, 0.1))
    fit = trainer(max_epochs=6, callbacks=[*second])
    fit.fit(model, DataLoader(training_set(), 16, shuffle=True), ckpt_path="kept/last.ckpt")
    assert second[1].history == whole[1].history
    # One object serves another run.
    run(mlp, *second)
    assert second[1].history == whole[1].history


def test_nothing_of_an_interrupted_run_is_taken_for_another():
    monitor = CurvatureMonitor(1, samples=5, **QUICK)
    with pytest.raises(Killed):
        run(mlp, monitor, KillAt(5))
    whole = CurvatureMonitor(1, samples=5, **QUICK)
    wider = lambda: nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 5))  # noqa: E731
    run(wider, whole, epochs=1)
    run(wider, monitor, epochs=1)
    assert monitor.history == whole.history


def test_averaged_weights_are_measured_anew():
    monitor = CurvatureMonitor(1, samples=5, **QUICK)
    average = L.pytorch.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2)
    loader = DataLoader(training_set((3, 5, 5)), 16, shuffle=True)
    run(convbn, average, monitor, epochs=4, loader=loader)
    rows = [row for row in monitor.history if row["group"] == "tail"]
    assert [row["step"] for row in rows[-2:]] == [16, 16]
    assert rows[-1]["loss"] != rows[-2]["loss"]


def test_keeps_nothing_of_the_model():
    class Sized(L.Callback):
        def on_train_end(self, trainer, pl_module):
            assert len(pickle.dumps(monitor)) < 2000

    monitor = CurvatureMonitor(6, groups=["tail"], **QUICK)
    run(mlp, monitor, Sized())
    assert monitor._data is None
    assert len(pickle.dumps(monitor)) < 2000


def test_epochs_with_accumulated_batches():
    monitor = CurvatureMonitor(1, groups=["tail"], samples=5, **QUICK)
    run(mlp, StageSwitch(step=2), monitor, epochs=2, accumulate_grad_batches=2)
    seen = [(row["step"], row["epoch"], row["when"]) for row in monitor.history]
    assert seen == [(2, 1.0, "epoch"), (2, 1.0, "before"), (3, 1.5, "after"), (4, 2.0, "epoch")]


def test_does_not_end_a_training_that_diverges():
    class Diverging(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[0].weight.data.fill_(torch.nan)

    monitor = CurvatureMonitor(1, samples=5, **QUICK)
    with pytest.warns(UserWarning, match="measures nothing at step 8. The loss or its gradient is infinite"):
        _, fit = run(mlp, Diverging(), monitor, epochs=2)
    assert fit.global_step == 8
    assert {row["step"] for row in monitor.history} == {4}


def test_two_in_one_training():
    monitors = [CurvatureMonitor(1, groups=[group], samples=5, **QUICK) for group in ("head", "tail")]
    run(mlp, *monitors, epochs=1, enable_checkpointing=True)
    (path,) = Path().rglob("*.ckpt")
    states = torch.load(path, weights_only=True)["callbacks"]
    assert [states[monitor.state_key]["history"][0]["group"] for monitor in monitors] == ["head", "tail"]


class Augmented(Dataset):
    targets = LABELS

    def __init__(self):
        self.asked = []

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        self.asked.append(index)
        return torch.randn(8), self.targets[index]


def test_chosen_samples():
    dataset = Augmented()
    chosen = CurvatureMonitor(1, ["head", "tail", "all"], samples=30, batch_size=7, seed=5)._choose(
        DataLoader(dataset, 16), SPLIT
    )
    sizes = {group: [len(targets) for _, targets in parts] for group, parts in chosen.items()}
    assert sizes == {"head": [7, 7, 7, 7, 2], "tail": [7, 3], "all": [7, 7, 7, 7, 2]}
    assert len(set(dataset.asked[:30])) == 30
    assert {int(LABELS[i]) for i in dataset.asked[:30]} == {0, 1, 2}
    assert dataset.asked[30:40] == list(range(48, 58))
    again = CurvatureMonitor(1, ["head"], samples=30, batch_size=7, seed=5)._choose(DataLoader(Augmented(), 16), SPLIT)
    for (inputs, _), (same, _) in zip(chosen["head"], again["head"], strict=True):
        assert inputs.equal(same)


def test_a_module_without_the_mixin():
    class Quiet(Automatic):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    def losses(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")

    data = [training_set().tensors]
    monitor = CurvatureMonitor(1, split=SPLIT, sample_losses=losses, batches=data, **QUICK)
    model = Quiet()
    trainer(callbacks=[monitor]).fit(model, DataLoader(training_set(), 16))
    assert [row["group"] for row in monitor.history] == ["head", "tail"]
    measured = measure_curvature(model, data, SPLIT, ["head"], losses, **QUICK)
    assert monitor.history[0]["largest"] == pytest.approx(measured["head"].eigenvalues.largest)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from training_set()


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"every_n_epochs": 0}, "`every_n_epochs` to be an integer >= 1, but got 0"),
            ({"samples": 0}, "`samples` to be an integer >= 1"),
            ({"batch_size": 0}, "`batch_size` to be an integer >= 1"),
            ({"rho": -1}, "`rho` to be a finite number >= 0"),
            ({"tolerance": 0}, "`tolerance` to be a finite number > 0"),
            ({"max_iterations": 0}, "`max_iterations` to be an integer >= 1"),
            ({"trace_samples": -1}, "`trace_samples` to be an integer >= 0"),
            ({"batch_norm": "train"}, "`batch_norm` to be one of 'eval', 'batch'"),
            ({"seed": -1}, "`seed` to be an integer >= 0"),
            ({"batches": iter([])}, "`batches` to be an iterable that can be iterated again and again"),
        ],
    )
    def test_arguments(self, change, message):
        with pytest.raises(ValueError, match=message):
            CurvatureMonitor(**change)

    def test_no_split(self):
        with pytest.raises(MisconfigurationException, match=r"which classes are head and tail. Give it `split=...`"):
            run(mlp, CurvatureMonitor(), objective=ERM())

    def test_no_such_group(self):
        with pytest.raises(ValueError, match="`groups` to be any of 'head', 'tail'"):
            run(mlp, CurvatureMonitor(groups=["heads"]))

    def test_no_data_of_a_group(self):
        with pytest.raises(ValueError, match="`batches` to be data of every group, but got none of tail"):
            run(mlp, CurvatureMonitor(batches={"head": [training_set().tensors]}), epochs=1)

    def test_no_losses(self):
        with pytest.raises(MisconfigurationException, match="Use SharpnessAwareMixin, or give `sample_losses`"):
            trainer(callbacks=[CurvatureMonitor(split=SPLIT)]).fit(Automatic(), DataLoader(training_set(), 16))

    def test_no_labels(self):
        loader = DataLoader(Stream(), 16)
        with pytest.raises(
            MisconfigurationException, match=r"cannot find the classes of the training samples.*`batches=...`"
        ):
            run(mlp, CurvatureMonitor(), loader=loader)
        data = [training_set().tensors]
        monitor = CurvatureMonitor(1, batches=data, **QUICK)
        run(mlp, monitor, loader=loader, epochs=1)
        assert len(monitor.history) == 2
