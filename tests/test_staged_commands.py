"""Stages and schedules on the command line and in comparisons."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import STRICT, assert_same_bits, planned_runs
from lightning.pytorch import Trainer

from lightning_ssesam import ERM, SAM, SSESAM, ImbSAM, RadiusSchedule, Staged, StageSwitch
from lightning_ssesam.callbacks import Switch
from lightning_ssesam.cli import main
from lightning_ssesam.compare import Method
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.choices import find_choices
from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.experiments.search import find_candidates

pytestmark = STRICT

METHODS = """
epochs: 2
methods:
  Late:
    objective: {class_path: Staged, init_args: {objectives: [ERM, {class_path: SAM, init_args: {rho: 0.1}}]}}
  Three:
    objective: {class_path: lightning_ssesam.Staged, init_args: {objectives: [SAM, {class_path: SSESAM}]}}
    callbacks:
      - {class_path: StageSwitch, init_args: {at: [0.4, 0.6]}}
      - {class_path: RadiusSchedule, init_args: {name: head_rho, start: 0.2, end: 0.1, shape: cosine}}
"""


def weights(experiment, seed):
    _, model, _ = experiment.fit(seed)
    return [p.detach().clone() for p in model.parameters()]


def test_runs_of_a_comparison_share_nothing(monkeypatch):
    """What jsonargparse has built once makes the same weights as parts that are new for every run."""
    Path("mine.yaml").write_text(METHODS)
    tasks = planned_runs(monkeypatch, ["--config=mine.yaml", "--seeds=1"])
    late, three = (task.experiment for task in tasks)
    callbacks = [StageSwitch(at=[0.4, 0.6]), RadiusSchedule("head_rho", 0.2, 0.1, "cosine")]
    options = vars(late) | {"gamma": 0.7}
    twins = [
        Experiment(**options | {"objective": lambda: Staged([ERM(), SAM(0.1)])}),
        Experiment(**options | {"objective": lambda: Staged([SAM(), SSESAM()]), "callbacks": callbacks}),
    ]
    for experiment, twin in zip((late, three), twins, strict=True):
        before = repr(experiment.objective())
        runs = [weights(experiment, seed) for seed in (0, 1, 0)]
        assert_same_bits(runs[0], weights(twin, 0))
        assert_same_bits(runs[0], runs[2])
        assert not torch.equal(runs[0][0], runs[1][0])
        objective = experiment.objective()
        assert repr(objective) == before == repr(twin.objective())
        assert objective.split is None
        assert objective.stage == 1
    assert [type(callback).__name__ for callback in late.make_callbacks(late.make_model(late.data()))] == [
        "StageSwitch"
    ]


def test_fingerprint_knows_the_objectives_within():
    experiments = [
        Experiment("name", partial(Staged, objectives), callbacks=callbacks)
        for objectives, callbacks in [
            ([ERM(), SAM(0.1)], []),
            ([ERM(), SAM(0.2)], []),
            ([SAM(0.1), ERM()], []),
            ([ERM(), SAM(0.1)], [StageSwitch(at=0.8)]),
            ([ERM(), SAM(0.1)], [StageSwitch(at=[0.7])]),
            ([ERM(), SAM(0.1)], [RadiusSchedule("rho", 0.1)]),
            ([ERM(), SAM(0.1)], [RadiusSchedule("rho", 0.2)]),
        ]
    ]
    data = experiments[0].make_data()
    found = [experiment.fingerprint(experiment.make_split(data)) for experiment in experiments]
    assert len(set(found)) == len(found)
    assert experiments[0].fingerprint(experiments[0].make_split(data)) == found[0]


def started(monkeypatch, *args):
    """Return the callbacks and the model that `fit` starts with."""
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer, model, datamodule, **_: seen.extend([trainer, model]))
    main(["fit", *args])
    return seen[0].callbacks, seen[1]


def test_fit_by_options(monkeypatch, capsys):
    callbacks, model = started(
        monkeypatch,
        "--model.objective=Staged",
        "--model.objective.objectives=[ERM, SSESAM, {class_path: SAM, init_args: {rho: 0.3}}]",
        "--trainer.callbacks+=StageSwitch",
        "--trainer.callbacks.epoch=[10,20,30]",
        "--trainer.callbacks+=RadiusSchedule",
        "--trainer.callbacks.name=tail_rho",
        "--trainer.callbacks.shape=steps",
        "--trainer.callbacks.points=[0.2,0.4]",
    )
    (switch,) = (callback for callback in callbacks if isinstance(callback, StageSwitch))
    (schedule,) = (callback for callback in callbacks if isinstance(callback, RadiusSchedule))
    assert (switch.at, switch.epoch, switch.step) == (None, [10, 20, 30], None)
    assert (schedule.name, schedule.shape, schedule.points) == ("tail_rho", "steps", [0.2, 0.4])
    assert repr(model.objective) == repr(Staged([ERM(), SSESAM(), SAM(0.3)]))
    assert {id(objective.split) for objective in model.objective.objectives} == {id(model.split)}
    assert "StageSwitch is attached" not in capsys.readouterr().err


def test_fit_attaches_a_switch_to_two_stages(monkeypatch):
    callbacks, model = started(monkeypatch, "--model.objective=Staged", "--model.objective.objectives=[ERM, SAM]")
    assert [callback.at for callback in callbacks if isinstance(callback, StageSwitch)] == [0.7]
    assert repr(model.objective) == "Staged([ERM(), SAM(rho=0.05)])"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.objective.objectives=[ERM,SSESAM]"],
            "Staged has 3 stages and needs a StageSwitch with 2 points, such as StageSwitch(at=[0.33, 0.67])",
        ),
        (
            [
                "--model.objective.objectives=[ERM,SAM]",
                "--trainer.callbacks=StageSwitch",
                "--trainer.callbacks.at=[0.2,0.5]",
            ],
            "StageSwitch(at=[0.2, 0.5]) has 2 points, but Staged has 2 stages and needs 1 point, such as",
        ),
        (["--model.objective.objectives=[]"], "`objectives` to be a list of at least one Objective"),
        (
            [
                "--model.objective.objectives=[SAM]",
                "--trainer.callbacks=StageSwitch",
                "--trainer.callbacks.at=[0.5,0.2]",
            ],
            "`at` to be a strictly increasing list of numbers",
        ),
        (
            ["--model.objective.objectives=[SAM]", "--trainer.callbacks=RadiusSchedule", "--trainer.callbacks.end=-1"],
            "`end` to be a finite number >= 0, but got -1",
        ),
        (
            [
                "--model.objective.objectives=[SAM]",
                "--trainer.callbacks=RadiusSchedule",
                "--trainer.callbacks.name=tau",
            ],
            "RadiusSchedule(name='tau') cannot move a radius of Staged, whose radii are rho",
        ),
    ],
)
def test_fit_refuses_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--model.objective=Staged", *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            Method(lambda: Staged([ERM(), SSESAM()])),
            r"method 'Mine' cannot be trained\. Staged has 3 stages and needs a StageSwitch with 2 points",
        ),
        (
            Method(lambda: Staged([ERM(), SAM()]), callbacks=[StageSwitch(epoch=[1, 2])]),
            r"method 'Mine' cannot be trained\. StageSwitch\(epoch=\[1, 2\]\) has 2 points, but Staged has 2 stages",
        ),
        (Method(SSESAM, callbacks=[StageSwitch(step=[1, 2])]), r"has 2 points, but SSESAM has 2 stages"),
        (
            Method(SAM, callbacks=[RadiusSchedule("tail_rho")]),
            r"method 'Mine' cannot be trained\. RadiusSchedule\(name='tail_rho'\) cannot move a radius of SAM",
        ),
    ],
)
def test_compare_refuses_before_training(method, message):
    experiment = method.experiment("Mine", Recipe(), 0.7)
    with pytest.raises(ArgumentError, match=message):
        experiment.check(experiment.make_split(experiment.make_data()))


def test_a_switch_of_somebody_leads_through_the_stages():
    class Own(Switch):
        switches_stages = takes_several = True

        def apply(self, pl_module, switched):
            pl_module.objective.stage = 1 + self.num_switched

    experiment = Method(lambda: Staged([ERM(), SSESAM()]), callbacks=[Own(step=[1, 2])]).experiment(
        "Mine", Recipe(), 0.7
    )
    experiment.check(experiment.make_split(experiment.make_data()))


def test_values_of_a_comparison():
    methods = {
        "Late": Method(lambda: Staged([ERM(), SAM(0.1)])),
        "Three": Method(lambda: Staged([SAM(0.3), SSESAM()]), callbacks=[StageSwitch(at=[0.2, 0.6])]),
        "Moved": Method(
            lambda: Staged([ERM(), SSESAM()]), callbacks=[StageSwitch(epoch=[1, 2]), RadiusSchedule("head_rho")]
        ),
    }
    experiments = [method.experiment(name, Recipe(), 0.7) for name, method in methods.items()]
    found = find_choices(experiments, {"gamma": 0.7}, {}, None, is_shipped=False)
    assert [(choice.name, choice.value) for choice in found] == [
        ("Late.rho", 0.1),
        ("gamma", 0.7),
        ("Three.rho", 0.3),
        ("Three.head_rho", 0.05),
        ("Three.tail_rho", 0.1),
        ("Three.gamma_1", 0.2),
        ("Three.gamma_2", 0.6),
        ("Moved.tail_rho", 0.1),
    ]


def test_what_is_searched():
    class Own(ImbSAM):
        radius_names = ("rho", "reach")
        reach = 0.5

    bounds = {"sam_rho": (0.1, 1.0), "imbsam_rho": (0.2, 2.0), "head_rho": (0.3, 3.0), "tail_rho": (0.4, 4.0)}
    methods = {
        "Own": Method(Own),
        "Moved": Method(SSESAM, callbacks=[RadiusSchedule("tail_rho")]),
        "Late": Method(lambda: Staged([ERM(), SAM()])),
    }
    found = find_candidates(methods, bounds | {"gamma": (0.5, 0.9)}, is_shipped=False)
    assert [candidate.bounds for candidate in found] == [
        {"rho": (0.2, 2.0), "reach": (0.005, 5.0)},
        {"head_rho": (0.3, 3.0), "gamma": (0.5, 0.9)},
        {"rho": (0.1, 1.0), "gamma": (0.5, 0.9)},
    ]
