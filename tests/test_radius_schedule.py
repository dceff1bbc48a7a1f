"""A radius that moves with the training's progress."""

import copy
import csv
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    REFERENCE,
    SPLIT,
    STRICT,
    Automatic,
    KillAt,
    Killed,
    Model,
    assert_same_bits,
    batches,
    convbn,
    fit,
    mlp,
    trainer,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ssesam import ERM, SAM, SSESAM, ImbSAM, RadiusSchedule, Staged, StageSwitch
from lightning_ssesam.errors import ArgumentError

pytestmark = [STRICT, pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]


class Radii(Model):
    """Notes the radii of the terms of every batch."""

    def __init__(self, objective=None, **kwargs):
        super().__init__(objective=objective or SAM(0.7), **kwargs)

    def on_train_start(self):
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(tuple(term.rho for term in self.objective.terms(batch[1])))
        return super().training_step(batch, batch_idx)


def values(schedule, steps):
    return [schedule.value_at(step / steps) for step in range(steps)]


# Values.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.05 * (1 - step / 8) for step in range(9)]),
        ({"start": 0.0, "end": 0.4}, [0.05 * step for step in range(9)]),
        ({"start": 0.1, "end": 0.3, "begin": 0.25, "finish": 0.75}, [0.1] * 3 + [0.15, 0.2, 0.25] + [0.3] * 3),
        ({"start": 0.2, "end": 0.2}, [0.2] * 9),
        (
            {"start": 0.3, "end": 0.1, "shape": "cosine"},
            [0.2 + 0.1 * math.cos(math.pi * step / 8) for step in range(9)],
        ),
        (
            {"start": 0.3, "end": 0.1, "shape": "cosine", "begin": 0.5},
            [0.3] * 4 + [0.2 + 0.1 * math.cos(math.pi * step / 4) for step in range(5)],
        ),
        ({"start": 0.0, "end": 0.1, "shape": "steps"}, [0.0] * 4 + [0.05] * 2 + [0.1] * 3),
        (
            {"start": 0.8, "end": 0.2, "shape": "steps", "points": [0.1, 0.5, 0.8]},
            [0.8] + [0.6] * 3 + [0.4] * 3 + [0.2] * 2,
        ),
        ({"start": 0.8, "end": 0.2, "shape": "steps", "points": (0.3,)}, [0.8] * 3 + [0.2] * 6),
    ],
)
def test_values(arguments, expected):
    schedule = RadiusSchedule(**arguments)
    assert [schedule.value_at(step / 8) for step in range(9)] == pytest.approx(expected, rel=0, abs=1e-15)
    # Both ends are exact, and nothing comes after the end.
    assert (schedule.value_at(0), schedule.value_at(1)) == (schedule.start, schedule.end)
    assert schedule.value_at(7.5) == schedule.end


@pytest.mark.parametrize("shape", ["linear", "cosine", "steps"])
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.0), (0.0, 0.3), (0.7, 0.1)])
def test_values_lie_between_the_ends_in_order(shape, start, end):
    found = [RadiusSchedule("rho", start, end, shape).value_at(step / 997) for step in range(1100)]
    assert min(found) == min(start, end)
    assert max(found) == max(start, end)
    assert found == sorted(found, reverse=end < start)


def test_jump_at_a_decimal_share():
    """7 of 100 steps are 0.07 of them, and 0.07 * 100 is 7.000000000000001 in floating point."""
    schedule = RadiusSchedule("rho", 0.0, 1.0, "steps", points=[0.07])
    assert values(schedule, 100) == [0.0] * 7 + [1.0] * 93


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "`name` to be the name of a radius, such as 'rho', but got ''"),
        ({"name": None}, "`name` to be the name of a radius"),
        ({"name": "head rho"}, "`name` to be the name of a radius"),
        ({"start": -0.1}, "`start` to be a finite number >= 0, but got -0.1"),
        ({"end": math.inf}, "`end` to be a finite number >= 0, but got inf"),
        ({"end": "0"}, "`end` to be a finite number >= 0, but got '0'"),
        ({"shape": "exponential"}, "`shape` to be one of 'linear', 'cosine', 'steps', but got 'exponential'"),
        ({"begin": -0.5}, r"`begin` to be a number in \[0, 1\], but got -0.5"),
        ({"finish": 1.5}, r"`finish` to be a number in \[0, 1\], but got 1.5"),
        ({"finish": math.nan}, r"`finish` to be a number in \[0, 1\], but got nan"),
        ({"begin": 0.5, "finish": 0.5}, "`finish` to be greater than `begin`, which is 0.5, but got 0.5"),
        ({"points": [0.5]}, r"`points` to be None with shape='linear', .*, but got \[0.5\]"),
        ({"shape": "steps", "begin": 0.1}, "`begin` to be 0.0 with shape='steps', which takes `points`, but got 0.1"),
        ({"shape": "steps", "finish": 0.9}, "`finish` to be 1.0 with shape='steps', which takes `points`, but got 0.9"),
        ({"shape": "steps", "points": []}, r"`points` to be a strictly increasing list .*, but got \[\]"),
        ({"shape": "steps", "points": 0.5}, "`points` to be a strictly increasing list .*, but got 0.5"),
        ({"shape": "steps", "points": [0.5, 0.2]}, r"`points` to be a strictly increasing list"),
        ({"shape": "steps", "points": [0, 0.2]}, r"`points` to be a strictly increasing list"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        RadiusSchedule(**arguments)


@pytest.mark.parametrize("progress", [-0.1, math.nan, math.inf, "0"])
def test_bad_progress(progress):
    with pytest.raises(ArgumentError, match="`progress` to be a finite number >= 0, but got"):
        RadiusSchedule().value_at(progress)


# In a training.


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("net", ["mlp", "convbn"])
@pytest.mark.parametrize("way", ["schedule", "stages"])
def test_published_trajectory(net, way):
    """No perturbation in four steps, radius 0.05 in two and 0.1 in two, by the published SAM."""
    # The inputs are those of all methods.
    data = {**np.load(REFERENCE / f"{net}_sgd.npz"), **np.load(REFERENCE / f"{net}_sam_schedule.npz")}
    objective = SAM(0.7) if way == "schedule" else Staged([ERM(), SAM(0.05), SAM(0.1)])
    schedule = RadiusSchedule("rho", 0.0, 0.1, shape="steps", points=[0.5, 0.75])
    callback = schedule if way == "schedule" else StageSwitch(at=[0.5, 0.75])
    after, clean_loss = {}, []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            after[trainer.global_step] = copy.deepcopy(dict(pl_module.net.named_parameters()))
            clean_loss.append(trainer.callback_metrics["train/loss"].item())

    model = Model({"mlp": mlp, "convbn": convbn}[net](), objective)
    with torch.no_grad():
        for name, p in model.net.named_parameters():
            p.copy_(torch.from_numpy(data[f"init/{name}"]))
    steps = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in zip(data["x"], data["y"], strict=True)]
    fit(model, steps, callbacks=[callback, Recorder()])
    for key in data:
        if key.startswith("after/"):
            _, step, name = key.split("/", 2)
            np.testing.assert_allclose(after[int(step)][name].detach(), data[key], rtol=0, atol=1e-12)
    np.testing.assert_allclose(clean_loss, data["clean_loss"], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_trains_as_with_the_radius_set_by_hand(shape):
    class ByHand(Model):
        def on_train_batch_start(self, batch, batch_idx):
            share = self.trainer.global_step / 10
            cosine = (1 + math.cos(math.pi * share)) / 2
            self.objective.tail_rho = 0.4 * (1 - share if shape == "linear" else cosine)

    weights, data = [], batches(5, 12)
    for kind, callbacks in [(Model, [RadiusSchedule("tail_rho", 0.4, 0.0, shape)]), (ByHand, [])]:
        torch.manual_seed(1)
        model = kind(objective=SSESAM(SPLIT, 0.2, 0.9))
        fit(model, data, max_epochs=2, callbacks=callbacks)
        weights.append(model.net.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "steps_of_batches"),
    [
        ({"max_epochs": 2}, range(10)),
        ({"max_epochs": 100, "max_steps": 7}, range(7)),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]),
        ({"max_epochs": 2, "limit_train_batches": 3}, range(6)),
    ],
)
def test_radius_of_every_step(options, steps_of_batches):
    model, steps = Radii(), [*steps_of_batches]
    schedule = RadiusSchedule("rho", 0.1, 0.3)
    fit(model, batches(5, 6), callbacks=[schedule], **options)
    expected = values(schedule, steps[-1] + 1)
    assert model.seen == [(expected[step],) for step in steps]


def test_logs_the_radius(tmp_path):
    logger = CSVLogger(tmp_path)
    schedules = [RadiusSchedule("head_rho", 0.25, 0.0), RadiusSchedule("tail_rho", 0.5, 1.0, "steps", points=[0.5])]
    model = Radii(SSESAM(SPLIT))
    options = {"max_epochs": 2, "logger": logger, "log_every_n_steps": 1}
    fit(model, batches(4, 6), callbacks=[*schedules, StageSwitch(at=0.75)], **options)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    head, tail = values(schedules[0], 8), [0.5] * 4 + [1.0] * 4
    assert [float(row["radius/head_rho"]) for row in rows] == head
    assert [float(row["radius/tail_rho"]) for row in rows] == tail
    # In stage 2, nothing is perturbed for the head.
    assert model.seen == list(zip([*head[:6], 0.0, 0.0], tail, strict=True))


def test_radius_of_several_stages():
    model = Radii(Staged([SAM(0.7), ERM(), ImbSAM(SPLIT, 0.7)]))
    schedule = RadiusSchedule("rho", 0.0, 0.8)
    fit(model, batches(8, 6), callbacks=[schedule, StageSwitch(step=[2, 4])])
    radii = values(schedule, 8)
    assert model.seen == [*((r,) for r in radii[:2]), (0.0,), (0.0,), *((0.0, r) for r in radii[4:])]


def test_radius_named_by_somebody():
    class Own(SAM):
        radius_names = ("far",)
        far = 0.7

        def terms(self, targets):
            return tuple(term._replace(rho=self.far) for term in super().terms(targets))

    model = Radii(Own())
    fit(model, batches(2, 6), callbacks=[RadiusSchedule("far", 0.4, 0.0)])
    assert model.seen == [(0.4,), (0.2,)]


def test_one_object_serves_several_runs():
    schedule = RadiusSchedule("rho", 0.3, 0.1)
    for epochs in (2, 1, 3):
        model = Radii()
        fit(model, batches(4, 6), max_epochs=epochs, callbacks=[schedule])
        assert model.seen == [(value,) for value in values(schedule, 4 * epochs)]
    for copied in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert vars(copied).keys() == vars(RadiusSchedule()).keys()
        assert copied.value_at(0.5) == schedule.value_at(0.5)
    assert [schedule.start, schedule.end, schedule.begin, schedule.finish, schedule.points] == [0.3, 0.1, 0, 1, None]


# Resumed.


def new():
    torch.manual_seed(1)
    return Radii(SSESAM(SPLIT, 0.2, 0.4))


def run(model, data, ckpt_path=None, callbacks=(), **options):
    schedules = [RadiusSchedule("head_rho", 0.5, 0.1), RadiusSchedule("tail_rho", 0.1, 0.5, "cosine", finish=0.8)]
    made = trainer(**{"max_epochs": 2, "callbacks": [*schedules, *callbacks], **options})
    made.fit(model, StatefulDataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    return made


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("accumulate", "stop_at"), [(1, 2), (1, 7), (2, 1), (2, 4)])
def test_resumes_bit_for_bit(accumulate, stop_at, tmp_path):
    data, options = batches(6, 12), {"accumulate_grad_batches": accumulate}
    whole, resumed = new(), new()
    run(whole, data, **options)
    every_step = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(Killed):
        run(new(), data, None, [every_step, KillAt(stop_at)], enable_checkpointing=True, **options)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == stop_at
    names = [f"RadiusSchedule(name={name!r})" for name in ("head_rho", "tail_rho")]
    assert [saved["callbacks"][name] for name in names] == [{"total_steps": 12 // accumulate}] * 2
    run(resumed, data, tmp_path / "last.ckpt", **options)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert len(resumed.seen) == 12 - accumulate * stop_at
    assert_same_bits(resumed.parameters(), whole.parameters())


@pytest.mark.parametrize("limit", [{"max_epochs": 4}, {"max_epochs": -1, "max_time": {"hours": 9}, "max_steps": 20}])
def test_another_length_follows_the_schedule_that_was_begun(limit, tmp_path):
    data = batches(5, 6)
    run(new(), data).save_checkpoint(tmp_path / "end.ckpt")
    whole, resumed = new(), new()
    stop = ModelCheckpoint(tmp_path, "middle", every_n_train_steps=7, enable_version_counter=False)
    run(whole, data, None, [stop], enable_checkpointing=True)
    run(resumed, data, tmp_path / "middle.ckpt", **limit)
    assert resumed.seen == [*whole.seen[7:], *[(0.1, 0.5)] * 10]
    later = new()
    run(later, data, tmp_path / "end.ckpt", max_epochs=3)
    assert later.seen == [(0.1, 0.5)] * 5
    # The same Trainer that goes on.
    model, schedule = new(), RadiusSchedule("head_rho", 0.5, 0.1)
    made = fit(model, data, callbacks=[schedule])
    made.fit_loop.max_epochs = 2
    made.fit(model, StatefulDataLoader(data, batch_size=None))
    assert [head for head, _ in model.seen] == [0.1] * 5


# Refused.


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (ERM(), "cannot move a radius of ERM, which has no radius: leave it away"),
        (SSESAM(SPLIT), "cannot move a radius of SSESAM, whose radii are head_rho, tail_rho: name one of them"),
        (Staged([ERM(), SSESAM(SPLIT)]), "cannot move a radius of Staged, whose radii are head_rho, tail_rho"),
    ],
)
def test_no_such_radius(objective, message):
    model = Radii(objective)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(MisconfigurationException, match=rf"RadiusSchedule\(name='rho'\) {message}"):
        fit(model, batches(2, 6), callbacks=[RadiusSchedule("rho"), StageSwitch(at=[0.3, 0.6])])
    assert_same_bits(model.parameters(), before)


def test_module_without_objective():
    with pytest.raises(MisconfigurationException, match="RadiusSchedule needs a module with an `objective`"):
        fit(Automatic(), batches(2, 6), callbacks=[RadiusSchedule()])


def test_two_schedules_of_one_radius():
    class Own(RadiusSchedule):
        pass

    with pytest.raises(RuntimeError, match="Found more than one stateful callback of type `RadiusSchedule`"):
        trainer(callbacks=[RadiusSchedule("rho"), RadiusSchedule("rho", shape="cosine")])
    with pytest.raises(MisconfigurationException, match="Several RadiusSchedules move `rho`"):
        fit(Radii(), batches(2, 6), callbacks=[RadiusSchedule("rho"), Own("rho")])


class Endless(IterableDataset):
    def __iter__(self):
        yield from batches(8, 6)


def test_length_that_is_not_known(tmp_path):
    loader = DataLoader(Endless(), batch_size=None)
    with pytest.raises(MisconfigurationException, match=r"RadiusSchedule needs the number of steps .* is unknown"):
        trainer(callbacks=[RadiusSchedule()]).fit(Radii(), loader)
    with pytest.raises(MisconfigurationException, match=r"RadiusSchedule needs .* Use Trainer\(max_steps=\.\.\.\)"):
        fit(Radii(), batches(2, 6), max_epochs=-1, max_time={"seconds": 60}, callbacks=[RadiusSchedule()])
    model = Radii()
    trainer(callbacks=[RadiusSchedule("rho", 0.4, 0.0)], max_steps=4, max_epochs=-1).fit(model, loader)
    assert [rho for (rho,) in model.seen] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    with pytest.warns(UserWarning, match=r"takes max_steps=6 for the length .* max_epochs=3 ends it earlier"):
        trainer(callbacks=[RadiusSchedule()], max_steps=6, max_epochs=3).fit(Radii(), loader)


def test_fast_dev_run():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*RadiusSchedule.*")
        model = Radii()
        fit(model, batches(2, 6), callbacks=[RadiusSchedule("rho", 0.4)], fast_dev_run=True)
    assert model.seen == [(0.4,)]
