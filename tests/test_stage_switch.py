import csv
import warnings
from pathlib import Path

import pytest
import torch
from helpers import (
    SPLIT,
    STRICT,
    Automatic,
    KillAt,
    Killed,
    Model,
    assert_same_bits,
    batches_loader,
    classification_batch,
    fit,
    trainer,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_ssesam import ERM, SAM, SSESAM, Staged, StageSwitch
from lightning_ssesam.callbacks import DeferredReweighting, Switch

pytestmark = STRICT


class Stages(Model):
    """Notes the stage in which every batch was trained."""

    def __init__(self, objective=None, **kwargs):
        super().__init__(objective=objective or SSESAM(SPLIT), **kwargs)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.objective.stage)
        return super().training_step(batch, batch_idx)

    def on_train_start(self):
        self.seen = []


def batches(number=5):
    torch.manual_seed(0)
    return [classification_batch(6) for _ in range(number)]


def stages(first, second):
    return [1] * first + [2] * second


@pytest.mark.parametrize(
    ("switch", "options", "expected"),
    [
        ({}, {"max_epochs": 10}, stages(35, 15)),
        ({"at": 0.7}, {"max_epochs": 2}, stages(7, 3)),
        ({"at": 0.7}, {"max_epochs": 3}, stages(11, 4)),
        ({"at": 0.01}, {"max_epochs": 2}, stages(1, 9)),
        ({"at": 0.99}, {"max_epochs": 2}, stages(10, 0)),
        ({"at": 0.5}, {"max_epochs": 100, "max_steps": 12}, stages(6, 6)),
        ({"at": 0.5}, {"max_epochs": -1, "max_steps": 12}, stages(6, 6)),
        ({"at": 0.5}, {"max_epochs": 2, "limit_train_batches": 3}, stages(3, 3)),
        ({"at": 0.5}, {"max_epochs": 4, "overfit_batches": 1}, stages(2, 2)),
        ({"epoch": 1}, {"max_epochs": 3}, stages(5, 10)),
        ({"epoch": 2}, {"max_epochs": -1, "max_steps": 12}, stages(10, 2)),
        ({"step": 7}, {"max_epochs": 3}, stages(7, 8)),
        ({"step": 5}, {"max_epochs": 1}, stages(5, 0)),
    ],
)
def test_switches_at(switch, options, expected):
    model = Stages()
    with warnings.catch_warnings():
        # Where no step is left for stage 2, it says so.
        warnings.filterwarnings("ignore", message="The training ended at step")
        fit(model, batches(), callbacks=[StageSwitch(**switch)], **options)
    assert model.seen == expected


def test_first_batch_of_epoch_140_of_200():
    class Epochs(Callback):
        switched = None

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.objective.stage == 2 and self.switched is None:
                self.switched = trainer.current_epoch, batch_idx

    epochs = Epochs()
    fit(Stages(), batches(3), max_epochs=200, callbacks=[StageSwitch(at=0.7), epochs])
    assert epochs.switched == (140, 0)


@pytest.mark.parametrize(
    ("at", "total", "switch_step"), [(0.07, 100, 7), (0.07, 300, 21), (0.7, 200, 140), (0.7, 9, 7)]
)
def test_share_is_that_of_the_decimal_number(at, total, switch_step):
    """0.07 * 100 is 7.000000000000001 in floating point."""
    switch, model = StageSwitch(at=at), Stages()
    switch.on_train_start(_attached(trainer(max_steps=total, max_epochs=-1), model), model)
    assert not switch.should_switch(switch_step - 1, 0)
    assert switch.should_switch(switch_step, 0)


def _attached(run, model):
    run.strategy.connect(model)
    model.trainer = run
    return run


class Endless(IterableDataset):
    def __iter__(self):
        yield from batches(8)


def test_data_without_length():
    loader = DataLoader(Endless(), batch_size=None)
    with pytest.raises(MisconfigurationException, match=r"StageSwitch\(epoch=\.\.\.\), StageSwitch\(step=\.\.\.\)"):
        trainer(callbacks=[StageSwitch(at=0.5)]).fit(Stages(), loader)
    for switch, options in [
        ({"at": 0.5}, {"max_steps": 6, "max_epochs": -1}),
        ({"step": 3}, {"max_epochs": 1}),
    ]:
        model = Stages()
        trainer(callbacks=[StageSwitch(**switch)], **options).fit(model, loader)
        assert model.seen[:6] == stages(3, 3)


def test_data_without_length_and_two_limits():
    with pytest.warns(UserWarning, match=r"takes max_steps=6 for the length .* max_epochs=3 ends it earlier"):
        trainer(callbacks=[StageSwitch(at=0.5)], max_steps=6, max_epochs=3).fit(
            Stages(), DataLoader(Endless(), batch_size=None)
        )


def test_run_limited_by_time_alone():
    with pytest.raises(MisconfigurationException, match="number of steps that the training will make"):
        fit(Stages(), batches(), max_epochs=-1, max_time={"seconds": 60}, callbacks=[StageSwitch(at=0.5)])


@pytest.fixture(scope="module", params=[{"at": 0.4}, {"epoch": 1}, {"step": 6}], ids=str)
def switch_and_stages(request):
    whole = Stages()
    fit(whole, batches(), max_epochs=3, callbacks=[StageSwitch(**request.param)])
    return request.param, whole.seen


@pytest.mark.parametrize("stop_at", [2, 5, 6, 9])
def test_resume_continues_in_the_right_stage(switch_and_stages, stop_at, tmp_path):
    switch, seen = switch_and_stages
    every_step = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)
    callbacks = [StageSwitch(**switch), every_step, KillAt(stop_at)]
    with pytest.raises(Killed):
        fit(Stages(), batches(), max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == stop_at

    resumed = Stages()
    fit(resumed, batches(), max_epochs=3, callbacks=[StageSwitch(**switch)], ckpt_path=tmp_path / "last.ckpt")
    assert resumed.seen == seen[stop_at:]


def test_a_longer_run_does_not_fall_back_to_stage_1(tmp_path):
    run = fit(Stages(), batches(), max_epochs=2, callbacks=[StageSwitch(at=0.5)])
    run.save_checkpoint(tmp_path / "end.ckpt")
    resumed = Stages()
    fit(resumed, batches(), max_epochs=10, callbacks=[StageSwitch(at=0.5)], ckpt_path=tmp_path / "end.ckpt")
    assert resumed.seen == stages(0, 40)
    run.fit_loop.max_epochs = 10
    run.fit(run.lightning_module, batches_loader(batches()))
    assert run.lightning_module.seen == stages(0, 40)


def test_callback_and_objective_serve_several_runs():
    switch, objective = StageSwitch(at=0.6), SSESAM(SPLIT)
    models = [Stages(objective) for _ in range(3)]
    for model, epochs in zip(models, (2, 1, 4), strict=True):
        fit(model, batches(), max_epochs=epochs, callbacks=[switch])
    assert [model.seen for model in models] == [stages(6, 4), stages(3, 2), stages(12, 8)]
    assert switch.at == 0.6


def test_same_weights_as_switching_by_hand():
    class ByHand(Model):
        def on_train_batch_start(self, batch, batch_idx):
            self.objective.stage = 1 if batch_idx < 3 else 2

    torch.manual_seed(1)
    model = Model(objective=SSESAM(SPLIT, 0.2, 0.4))
    torch.manual_seed(1)
    twin = ByHand(objective=SSESAM(SPLIT, 0.2, 0.4))
    fit(model, batches(), callbacks=[StageSwitch(at=0.6)])
    fit(twin, batches())
    assert_same_bits(model.parameters(), twin.parameters())


def test_logs_stage_and_says_so_once(tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    with caplog.at_level("INFO"):
        fit(Stages(), batches(), max_epochs=2, logger=logger, log_every_n_steps=1, callbacks=[StageSwitch(at=0.5)])
    with Path(logger.log_dir, "metrics.csv").open() as file:
        assert [float(row["stage"]) for row in csv.DictReader(file)] == stages(5, 5)
    said = [record.getMessage() for record in caplog.records if "StageSwitch" in record.getMessage()]
    assert said == ["StageSwitch: stage 2 from step 5 (epoch 1)."]


def test_warns_where_it_never_switched():
    with pytest.warns(UserWarning, match="training ended at step 5 without the second stage, .* set for step 9"):
        fit(Stages(), batches(), callbacks=[StageSwitch(step=9)])
    with pytest.warns(UserWarning, match="set for epoch 3"):
        fit(Stages(), batches(), callbacks=[StageSwitch(epoch=3)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*second stage.*")
        fit(Stages(), batches(), callbacks=[StageSwitch(at=0.7)], fast_dev_run=True)


def test_objective_with_a_single_stage():
    model = Stages(SAM(0.1))
    with pytest.warns(UserWarning, match="StageSwitch has no effect: SAM has a single stage"):
        fit(model, batches(), callbacks=[StageSwitch(at=0.5)])
    assert model.seen == stages(5, 0)


def test_own_policy():
    class Early(StageSwitch):
        def should_switch(self, step_idx, epoch_idx):
            return step_idx >= 2

    model = Stages()
    fit(model, batches(), callbacks=[Early()])
    assert model.seen == stages(2, 3)


def test_only_a_stage_switch_switches_stages():
    assert [kind.switches_stages for kind in (Switch, DeferredReweighting, StageSwitch)] == [False, False, True]


def test_module_without_objective():
    with pytest.raises(MisconfigurationException, match="StageSwitch needs a module with an `objective`"):
        fit(Automatic(), batches(), callbacks=[StageSwitch()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": 0}, "`at` to be a number strictly between 0 and 1, but got 0"),
        ({"at": 1.0}, "`at` to be a number strictly between 0 and 1, but got 1.0"),
        ({"at": -0.5}, "`at` to be a number strictly between 0 and 1"),
        ({"at": float("nan")}, "`at` to be a number strictly between 0 and 1, but got nan"),
        ({"at": "half"}, "`at` to be a number strictly between 0 and 1, but got 'half'"),
        ({"epoch": 0}, "`epoch` to be an integer >= 1, but got 0"),
        ({"epoch": 1.5}, "`epoch` to be an integer >= 1, but got 1.5"),
        ({"step": -3}, "`step` to be an integer >= 1, but got -3"),
        ({"step": True}, "`step` to be an integer >= 1, but got True"),
        ({"at": 0.5, "epoch": 3}, "at most one of the arguments `at`, `epoch` and `step`, but got at=0.5, epoch=3"),
        ({"epoch": 3, "step": 3}, "at most one of the arguments"),
        ({"at": []}, r"`at` to be a strictly increasing list of numbers strictly between 0 and 1, but got \[\]"),
        ({"at": [0.8, 0.5]}, r"`at` to be a strictly increasing list of numbers .*, but got \[0.8, 0.5\]"),
        ({"at": [0.5, 0.5]}, r"`at` to be a strictly increasing list"),
        ({"at": [0.5, 1]}, r"`at` to be a strictly increasing list"),
        ({"at": [0.5, None]}, r"`at` to be a strictly increasing list"),
        ({"at": {0.5: 0.8}}, "`at` to be a number strictly between 0 and 1"),
        ({"epoch": [2, 1]}, r"`epoch` to be a strictly increasing list of integers >= 1, but got \[2, 1\]"),
        ({"epoch": (0, 1)}, r"`epoch` to be a strictly increasing list of integers >= 1, but got \(0, 1\)"),
        ({"step": [3, 7.5]}, r"`step` to be a strictly increasing list of integers >= 1, but got \[3, 7.5\]"),
        ({"epoch": [1, 2], "step": [3, 4]}, "at most one of the arguments"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StageSwitch(**arguments)


# Several points.


class Three(ERM):
    """An objective of somebody's own with three stages."""

    num_stages = 3


def three():
    return Staged([ERM(), SSESAM(SPLIT)])


@pytest.mark.parametrize("objective", [three, Three])
@pytest.mark.parametrize(
    ("switch", "options", "expected"),
    [
        ({"at": [0.5, 0.8]}, {"max_epochs": 2}, [1] * 5 + [2] * 3 + [3] * 2),
        ({"at": (0.3, 0.55)}, {"max_epochs": 2}, [1] * 3 + [2] * 3 + [3] * 4),
        ({"epoch": [1, 2]}, {"max_epochs": 3}, [1] * 5 + [2] * 5 + [3] * 5),
        ({"step": [2, 3]}, {"max_epochs": 1}, [1] * 2 + [2] + [3] * 2),
        # Both points are one step.
        ({"at": [0.5, 0.51]}, {"max_epochs": 1}, [1] * 3 + [3] * 2),
        ({"at": [0.1, 0.2, 0.3][:2]}, {"max_steps": 3}, [1] + [3] * 2),
        ({"at": [0.2, 0.9]}, {"max_epochs": 2, "accumulate_grad_batches": 2}, [1] * 4 + [2] * 6),
    ],
)
def test_switches_at_several_points(objective, switch, options, expected):
    model = Stages(objective())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The training ended at step")
        fit(model, batches(), callbacks=[StageSwitch(**switch)], **options)
    assert model.seen == expected


def test_each_switch_is_announced_and_logged(tmp_path, caplog):
    logger, switch = CSVLogger(tmp_path), StageSwitch(at=[0.2, 0.4])
    with caplog.at_level("INFO"):
        fit(Stages(three()), batches(), logger=logger, log_every_n_steps=1, callbacks=[switch])
    with Path(logger.log_dir, "metrics.csv").open() as file:
        assert [float(row["stage"]) for row in csv.DictReader(file)] == [1, 2, 3, 3, 3]
    said = [record.getMessage() for record in caplog.records if "StageSwitch" in record.getMessage()]
    assert said == ["StageSwitch: stage 2 from step 1 (epoch 0).", "StageSwitch: stage 3 from step 2 (epoch 0)."]
    assert switch.state_dict() == {"switched_at": [1, 2]}
    assert (switch.at, switch.num_points, switch.num_switched) == ([0.2, 0.4], 2, 2)


@pytest.mark.parametrize(
    ("points", "missed"),
    [
        ({"step": [2, 9]}, "stage 3, which StageSwitch had set for step 9"),
        ({"step": [8, 9]}, "stage 2 and stage 3, which StageSwitch had set for step 8 and step 9"),
        ({"epoch": [1, 4]}, "stage 2 and stage 3, which StageSwitch had set for epoch 1 and epoch 4"),
        ({"at": [0.5, 0.99]}, "stage 3, which StageSwitch had set for step 5"),
    ],
)
def test_names_the_stages_that_were_missed(points, missed):
    with pytest.warns(UserWarning, match=f"The training ended at step 5 without {missed}"):
        fit(Stages(three()), batches(), callbacks=[StageSwitch(**points)])


@pytest.mark.parametrize(
    ("objective", "switch", "message"),
    [
        (
            three,
            {},
            r"StageSwitch\(at=0.7\) has 1 point, but Staged has 3 stages and needs 2 points, such as"
            r" StageSwitch\(at=\[0.33, 0.67\]\)",
        ),
        (Three, {"step": 4}, r"StageSwitch\(step=4\) has 1 point, but Three has 3 stages and needs 2 points"),
        (three, {"epoch": [1, 2, 3]}, r"has 3 points, but Staged has 3 stages and needs 2 points"),
        (
            lambda: SSESAM(SPLIT),
            {"at": [0.5, 0.8]},
            r"StageSwitch\(at=\[0.5, 0.8\]\) has 2 points, but SSESAM has 2"
            r" stages and needs 1 point, such as StageSwitch\(at=0.7\)",
        ),
    ],
)
def test_number_of_points_fits_the_stages(objective, switch, message):
    model = Stages(objective())
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, batches(), callbacks=[StageSwitch(**switch)])
    assert_same_bits(model.parameters(), before)


def test_one_point_in_a_list_and_a_single_stage():
    model = Stages()
    switch = StageSwitch(at=[0.6])
    fit(model, batches(), callbacks=[switch])
    assert model.seen == stages(3, 2)
    assert switch.state_dict() == {"switched_at": 3}
    with pytest.warns(UserWarning, match="no effect: Staged has a single stage"):
        fit(Stages(Staged([ERM()])), batches(), callbacks=[StageSwitch(at=[0.5, 0.8])])


@pytest.mark.parametrize("stop_at", [1, 2, 3, 7])
@pytest.mark.parametrize("switch", [{"at": [0.2, 0.4]}, {"epoch": [1, 2]}])
def test_resume_between_several_switches(switch, stop_at, tmp_path):
    whole = Stages(three())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The training ended at step")
        fit(whole, batches(), max_epochs=2, callbacks=[StageSwitch(**switch)])
        every_step = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)
        callbacks = [StageSwitch(**switch), every_step, KillAt(stop_at)]
        with pytest.raises(Killed):
            fit(Stages(three()), batches(), max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
        resumed = Stages(three())
        fit(resumed, batches(), max_epochs=2, callbacks=[StageSwitch(**switch)], ckpt_path=tmp_path / "last.ckpt")
    assert resumed.seen == whole.seen[stop_at:]


def test_a_longer_run_stays_in_its_stage_and_finds_the_later_points_anew(tmp_path):
    switch, stopped = StageSwitch(at=[0.2, 0.8]), Stages(three())
    with pytest.warns(UserWarning, match="without stage 3"):
        run = fit(stopped, batches(), max_epochs=2, callbacks=[switch, Stop(7)])
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["StageSwitch"] == {"switched_at": [2]}
    resumed = Stages(three())
    fit(resumed, batches(), max_epochs=8, callbacks=[StageSwitch(at=[0.2, 0.8])], ckpt_path=tmp_path / "end.ckpt")
    # The second point is step 32 of 40 now, and the first one would be step 8. The epoch that was stopped is over.
    assert resumed.seen == [2] * (32 - 7) + [3] * 5


class Stop(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.parametrize(
    ("saved", "points", "made", "kept"),
    [
        (-1, 0.5, 0, -1),
        (7, 0.5, 1, 7),
        (-1, [0.5, 0.8], 0, []),
        (7, [0.5, 0.8], 1, [7]),
        ([], [0.5, 0.8], 0, []),
        ([3, 7], [0.5, 0.8], 2, [3, 7]),
        ([3, 7], 0.5, 1, 3),
        ([1, 3, 7], [0.5, 0.8], 2, [1, 3]),
        ([], 0.5, 0, -1),
    ],
)
def test_state_of_another_number_of_points(saved, points, made, kept):
    switch = StageSwitch(at=points)
    switch.load_state_dict({"switched_at": saved})
    assert (switch.num_switched, switch.state_dict()) == (made, {"switched_at": kept})
    for kind in (DeferredReweighting, StageSwitch):
        assert kind(epoch=3).state_dict() == {"switched_at": -1}


def test_one_switch_with_several_points_serves_several_runs():
    switch, objective = StageSwitch(at=[0.2, 0.6]), three()
    models = [Stages(objective) for _ in range(2)]
    for model, epochs in zip(models, (2, 1), strict=True):
        fit(model, batches(), max_epochs=epochs, callbacks=[switch])
    assert [model.seen for model in models] == [[1] * 2 + [2] * 4 + [3] * 4, [1] + [2] * 2 + [3] * 2]


def test_own_policy_with_several_points():
    class Policy(StageSwitch):
        def should_switch(self, step_idx, epoch_idx):
            return step_idx >= (1, 4)[self.num_switched]

    model = Stages(three())
    fit(model, batches(), callbacks=[Policy(step=[1, 4])])
    assert model.seen == [1, 2, 2, 2, 3]


def test_own_switch_with_several_points():
    class Widths(Switch):
        takes_several = True

        def apply(self, pl_module, switched):
            pl_module.width = self.num_switched if switched else 0

    class Widening(Model):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), self.width]
            return super().training_step(batch, batch_idx)

    model = Widening()
    fit(model, batches(), callbacks=[Widths(step=[1, 2])])
    assert model.seen == [0, 1, 2, 2, 2]
    with pytest.raises(ValueError, match=r"`at` to be a number strictly between 0 and 1, but got \[0.5, 0.8\]"):
        DeferredReweighting(at=[0.5, 0.8])
    with pytest.raises(ValueError, match=r"`epoch` to be an integer >= 1, but got \[1, 2\]"):
        DeferredReweighting(epoch=[1, 2])


def test_late_start_without_a_wrong_message(caplog):
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.filterwarnings("error", message=".*(stage|StageSwitch).*")
        model = Stages(Staged([ERM(), SAM(0.1)]))
        fit(model, batches(), max_epochs=2, callbacks=[StageSwitch(at=0.8)])
    assert model.seen == stages(8, 2)
    assert not [record for record in caplog.records if "stage" in record.getMessage().lower()]
