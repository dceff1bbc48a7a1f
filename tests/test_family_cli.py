"""Ascents, objectives and schedules in the commands: by class path, in YAML, by name, in a search; refusals."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers import planned_runs
from torch import nn

from lightning_ssesam import (
    CCSAM,
    ERM,
    LESAM,
    SAM,
    SSESAM,
    Adaptive,
    Ascent,
    DeferredReweighting,
    Direction,
    Friendly,
    Gradient,
    ImbSAM,
    InverseNorm,
    Momentum,
    MomentumSAM,
    RadiusSchedule,
    RandomSAM,
    Scale,
    Staged,
    StageSwitch,
)
from lightning_ssesam.cli import main
from lightning_ssesam.compare import METHODS, Method
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments import experiment as experiment_module
from lightning_ssesam.experiments.choices import find_choices, notes
from lightning_ssesam.experiments.methods import RADII, make_methods
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.experiments.search import check_bounds, find_candidates

OBJECTIVE = "--model.objective"
ASCENT = f"{OBJECTIVE}.ascent"
OPTIONS = {"sam_rho": 0.2, "imbsam_rho": 0.2, "head_rho": 0.05, "tail_rho": 0.2, "gamma": 0.7}
BOUNDS = check_bounds(
    {**dict.fromkeys(("sam_rho", "imbsam_rho", "head_rho", "tail_rho"), (0.01, 0.5)), "gamma": (0.3, 0.9)}
)

PARTS = """
from dataclasses import dataclass

import torch

from lightning_ssesam import Direction, Objective, Radius, Scale, Term


class Twice(Scale):
    def factors(self, weights):
        return [torch.full_like(p, 2.0) for p in weights.values]


class Against(Direction):
    def __init__(self, share: float = 1.0) -> None:
        self.share = share

    def find(self, gradient, weights, state):
        return [None if g is None else -self.share * g for g in gradient], state


@dataclass(frozen=True)
class Fixed(Radius):
    length: float = 0.1

    def __call__(self, norms):
        return torch.full_like(norms.direction, self.length)


def fifth(norms) -> torch.Tensor:
    return torch.full_like(norms.direction, 0.2)


def is_weight(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim > 1


def fails(name: str, parameter: torch.Tensor) -> bool:
    raise ValueError("boom")


def unannotated(name, parameter):
    open("called", "w")
    return True


def make_selection(least: int = 1):
    open("called", "w")
    return lambda name, parameter: True


class Larger:
    def __init__(self, least: int = 1) -> None:
        self.least = least

    def __call__(self, name: str, parameter: torch.Tensor) -> bool:
        return parameter.ndim > self.least


class Mine(Objective):
    term_names = ("all",)
    radius_names = ("length",)

    def __init__(self, length: float = 0.1) -> None:
        super().__init__()
        self.length = length

    def terms(self, targets):
        return (Term(self._mean_weights(targets), self.length),)
"""


@pytest.fixture
def parts(monkeypatch):
    """A module of the user's, in the working folder."""
    Path("parts.py").write_text(PARTS)
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    yield
    sys.modules.pop("parts", None)


def objectives(monkeypatch, methods):
    """The objectives of a comparison, by the name of the method."""
    Path("methods.yaml").write_text(yaml.safe_dump({"methods": methods, "seeds": 1}))
    return {e.method: e.objective() for e, *_ in planned_runs(monkeypatch, ["--config=methods.yaml"])}


def spec(name, **arguments):
    return {"class_path": name, "init_args": arguments}


ASCENTS = {
    "names": (
        {"direction": "Friendly", "scale": "Adaptive", "only": "norm"},
        Ascent(Friendly(), Adaptive(), only="norm"),
    ),
    "values": (
        {"direction": spec("Friendly", sigma=0.5), "scale": spec("Adaptive", eta=0.1), "only": "no_bias_no_norm"},
        Ascent(Friendly(0.5), Adaptive(0.1), only="no_bias_no_norm"),
    ),
    "radius": ({"radius": spec("InverseNorm", sigma=0.1, rho_max=0.2)}, Ascent(radius=InverseNorm(0.1, 0.2))),
    "class path": (
        spec("lightning_ssesam.Ascent", scale=spec("lightning_ssesam.Adaptive", eta=0)),
        Ascent(scale=Adaptive(0)),
    ),
    "nothing": (None, Ascent()),
}


def test_ascents_in_yaml(monkeypatch):
    """The same for the objective in a comparison and for one within a Staged."""
    methods = {}
    for name, (ascent, _) in ASCENTS.items():
        sam = spec("SAM", rho=0.3, ascent=ascent)
        methods[name] = {"objective": sam}
    methods["late"] = {"objective": spec("Staged", objectives=["ERM", *(m["objective"] for m in methods.values())])}
    methods["late"]["callbacks"] = [spec("StageSwitch", at=[0.1, 0.2, 0.3, 0.4, 0.5])]
    found = objectives(monkeypatch, methods)
    for name, (_, ascent) in ASCENTS.items():
        assert (found[name].rho, found[name].ascent) == (0.3, ascent)
    assert found["late"].ascents() == (Ascent(), *(ascent for _, ascent in ASCENTS.values()))


def fitted(monkeypatch, *options):
    """The objective and the callbacks that ``fit`` starts with."""
    seen = []
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda trainer, model, **_: seen.extend([trainer, model]))
    monkeypatch.setattr("lightning_ssesam.experiments.training_commands.TrainingCLI._check_training", lambda _: None)
    main(["fit", "--trainer.accelerator=cpu", *options])
    trainer, model = seen
    return model.objective, [callback for callback in trainer.callbacks if isinstance(callback, StageSwitch)]


def test_dotted_options(monkeypatch):
    given = [
        f"{ASCENT}.scale=Adaptive",
        f"{ASCENT}.scale.eta=0.1",
        f"{ASCENT}.direction=Friendly",
        f"{ASCENT}.only=norm",
    ]
    objective, _ = fitted(monkeypatch, f"{OBJECTIVE}=SSESAM", *given)
    assert objective.ascent == Ascent(Friendly(), Adaptive(0.1), only="norm")
    assert isinstance(objective, SSESAM)


def test_an_objective_as_one_value(monkeypatch):
    sam = "{class_path: SAM, init_args: {ascent: {scale: Adaptive}}}"
    late = f"{{class_path: Staged, init_args: {{objectives: [ERM, {sam}]}}}}"
    objective, (switch,) = fitted(monkeypatch, f"{OBJECTIVE}={late}")
    assert repr(objective) == repr(Staged([ERM(), SAM(ascent=Ascent(scale=Adaptive()))]))
    assert switch.at == 0.7


@pytest.mark.usefixtures("parts")
def test_parts_of_the_users_own(monkeypatch):
    """T = 2 doubles the radius: e = rho 4 g / ||2 g||. The weights are those of SAM with 2 rho, to the bit."""
    ascents = {
        "SAM": (0.2, None),
        "scale": (0.1, {"scale": "parts.Twice"}),
        "radius": (0.7, {"radius": spec("parts.Fixed", length=0.2)}),
        "function": (0.7, {"radius": "parts.fifth"}),
        "only": (0.2, {"only": "parts.is_weight"}),
        "direction": (0.2, {"direction": "parts.Against"}),
    }
    methods = {name: {"objective": spec("SAM", rho=rho, ascent=ascent)} for name, (rho, ascent) in ascents.items()}
    methods["objective"] = {"objective": spec("parts.Mine", length=0.2)}
    trainer = {"accelerator": "cpu", "limit_train_batches": 2, "limit_val_batches": 0}
    Path("mine.yaml").write_text(yaml.safe_dump({"methods": methods, "epochs": 1, "seeds": 1, "trainer": trainer}))
    weights = {}
    for experiment, *_ in planned_runs(monkeypatch, ["--config=mine.yaml"]):
        _, model, _ = experiment.fit(0)
        weights[experiment.method] = nn.utils.parameters_to_vector(model.parameters()).detach()
    sam = weights.pop("SAM")
    equal = {name for name, found in weights.items() if torch.equal(found, sam)}
    assert equal == {"scale", "radius", "function", "objective"}
    assert len({tuple(weights[name].tolist()) for name in ("only", "direction")}) == 2


WRONG = {
    f"{ASCENT}.scale=Friendly": f"Expected `{ASCENT}.scale` to be Adaptive or the path of a class, but got 'Friendly'.",
    f"{ASCENT}.scale=lightning_ssesam.Friendly": "Adaptive or the path of a Scale, but got 'lightning_ssesam.F",
    f"{ASCENT}.direction=Frendly": "to be one of Friendly, Gradient, Momentum, Noise, or the path of a class, but got "
    "'Frendly'. Did you mean 'Friendly'?",
    f"{ASCENT}.scales=Adaptive": f"Ascent has no argument `{ASCENT}.scales`. Did you mean '{ASCENT}.scale'?",
    f"{ASCENT}.only=norms": f"Expected `{ASCENT}.only` to be one of 'norm', 'classifier', 'no_bias_no_norm' or",
    f"{ASCENT}.only=os.nothing": f"Expected `{ASCENT}.only` to be a class or a function that can be imported, but got",
    f"{ASCENT}.radius=InverseNorm": f"InverseNorm` needs `{ASCENT}.radius.sigma` and `{ASCENT}.radius.rho_max`",
    f"{ASCENT}.radius=0.1": f"Expected `{ASCENT}.radius` to be one of InverseNorm, PACBayesRadius, or the path of",
    f"{ASCENT}=Adaptive": f"Expected `{ASCENT}` to be arguments of Ascent or null, but got 'Adaptive'.",
    f"{ASCENT}.scale=Adaptive {ASCENT}.scale.eta=x": f"Expected `{ASCENT}.scale.eta` to be float, but got 'x'.",
    f"{ASCENT}.scale=Adaptive {ASCENT}.scale.eta=-1": "argument `eta` to be a finite number >= 0, but got -1.0.",
    f"{OBJECTIVE}=ASAM {ASCENT}.scale=Adaptive": "`ascent` to be an Ascent without `scale`, which ASAM sets, but got",
    f"{OBJECTIVE}=ERM {ASCENT}.scale=Adaptive": f"ERM has no argument `{ASCENT}.scale`.",
    f"{OBJECTIVE}=Staged {OBJECTIVE}.objectives=[ERM,SAM] {ASCENT}.scale=Adaptive": "Staged has no argument",
    f"{ASCENT}s.scale=Adaptive": f"SAM has no argument `{ASCENT}s.scale`. Did you mean '{ASCENT}'?",
    f"{ASCENT}.only=torch.nn.Linear": "'no_bias_no_norm' or the path of a function or null, but got 'torch.nn.Linear'.",
    f"{ASCENT}.direction=Direction": "Momentum, Noise, or the path of a class, but got 'Direction', which is abstract.",
    f"{OBJECTIVE}=LookSAM": "but got 'LookSAM'. LookSAM is SAM with the step options `interval` and `reuse`.",
}


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    line = capsys.readouterr().err
    assert (stop.value.code, line.count("\n")) == (2, 1)
    assert line.startswith("error: ")
    assert len(line) < 400
    return line


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_refused_in_one_line(options, capsys):
    assert WRONG[options] in refusal(capsys, "fit", "--trainer.accelerator=cpu", f"{OBJECTIVE}=SAM", *options.split())


PLAIN_SGD = "--model.optimizer=torch.optim.SGD --model.optimizer.lr=0.1"
SCHEDULE = "{class_path: RadiusSchedule, init_args: {end: 1}}"
CANNOT_FIT = {
    f"{OBJECTIVE}=MomentumSAM {PLAIN_SGD}": "`--model.optimizer`: Expected argument `optimizer` to be one with a",
    f"{OBJECTIVE}=SAM {ASCENT}.only=norm --model.backbone=test_family_cli.Flat": f"`{ASCENT}.only`: Expected argument",
    f"{OBJECTIVE}=SAM {ASCENT}.only=parts.fails": f"`{ASCENT}.only`: Expected argument `only` to be a function that",
    f"{OBJECTIVE}=Staged {OBJECTIVE}.objectives+=ERM {OBJECTIVE}.objectives+=SAM {OBJECTIVE}.objectives.ascent.only="
    "parts.fails": "`--model.objective`: Expected argument `only` to be a function that takes a name and a parameter",
    f"{OBJECTIVE}=SAM --model.optimizer=torch.optim.LBFGS": "error: LBFGS evaluates the loss several",
    f"{OBJECTIVE}=SSESAM --trainer.callbacks=[StageSwitch,StageSwitch]": "`--trainer.callbacks`: There are several Sta",
    f"{OBJECTIVE}=SAM --trainer.callbacks=[RadiusSchedule,{SCHEDULE}]": "Several RadiusSchedules move `rho`: leave one",
}


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("options", CANNOT_FIT)
def test_fit_writes_nothing_before_it_refuses(options, capsys):
    given = re.split(r" (?=--)", options)
    assert CANNOT_FIT[options] in refusal(capsys, "fit", "--trainer.accelerator=cpu", "--data=DigitsLT", *given)
    assert {path.name for path in Path().iterdir()} <= {"parts.py", "__pycache__"}


NO_PROMISE = "`only` to be one of 'norm', 'classifier', 'no_bias_no_norm', or a function whose annotation says"
TOUCH = "{class_path: os.system, init_args: {command: touch called}}"
WITHOUT_PROMISE = {
    "only: os.system": f"{NO_PROMISE} that it returns a bool, but got posix.system, which has no such annotation.",
    "only: builtins.print": NO_PROMISE,
    "only: parts.unannotated": f"{NO_PROMISE} that it returns a bool, but got parts.unannotated, which has no such",
    "only: parts.fifth": NO_PROMISE,
    f"only: {TOUCH}": NO_PROMISE,
    "only: {class_path: parts.make_selection, init_args: {least: 1}}": NO_PROMISE,
    f"radius: {TOUCH}": "`radius` to be a class, or a function whose annotation says that it returns a Radius, but",
    f"direction: {TOUCH}": "system does not correspond to a subclass of Direction.",
}


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("part", WITHOUT_PROMISE)
@pytest.mark.parametrize("command", ["fit", "compare"])
def test_a_function_without_a_promise_is_not_called(part, command, capsys):
    objective = f"{{objective: {{class_path: SAM, init_args: {{ascent: {{{part}}}}}}}}}"
    late = f"{{class_path: Staged, init_args: {{objectives: [ERM, {objective[12:-1]}]}}}}"
    text = f"model: {objective}" if command == "fit" else f"methods: {{A: {{objective: {late}}}}}"
    Path("wrong.yaml").write_text(text)
    given = ["--trainer.accelerator=cpu", "--data=DigitsLT"] if command == "fit" else []
    assert WITHOUT_PROMISE[part] in refusal(capsys, command, "--config=wrong.yaml", *given)
    assert not Path("called").exists()


@pytest.mark.usefixtures("parts")
def test_a_selection_with_arguments(monkeypatch):
    path = {"class_path": "parts.Larger", "init_args": {"least": 1}}
    found = objectives(monkeypatch, {"A": {"objective": spec("SAM", ascent={"only": path})}})
    assert [found["A"].ascent.only("w", torch.zeros(size)) for size in ((2,), (2, 2))] == [False, True]


KNOWN = "ASAM, CCSAM, ERM, GSAM, LESAM, PGN, SAM, SSESAM, WSAM, FocalSAM, FriendlySAM, ImbSAM, MomentumSAM, RandomSAM,"
NO_OBJECTIVE = f"objective.objectives` to be one of {KNOWN} Staged, or the path of a class, but got"
WRONG_STAGES = {
    "[ERM, SAMM]": f"{NO_OBJECTIVE} 'SAMM'. Did you mean 'SAM'?",
    "[ERM, F-SAM]": f"{NO_OBJECTIVE} 'F-SAM'. Did you mean 'FriendlySAM'?",
    "[ERM, Friendly]": f"{NO_OBJECTIVE} 'Friendly'. Did you mean",
    "[ERM, {class_path: LESAMM}]": f"{NO_OBJECTIVE} 'LESAMM'. Did you mean 'LESAM'?",
    "[3]": f"{NO_OBJECTIVE} '3'.",
    "[ERM, null]": f"{NO_OBJECTIVE} 'None'.",
    "[ERM, lightning_ssesam.Objective]": f"{NO_OBJECTIVE} 'lightning_ssesam.Objective', which is abstract.",
    "[ERM, parts.Nothing]": "objective.objectives` to be a class that can be imported, but got 'parts.Nothing': module",
    "[ERM, lightning_ssesam.Friendly]": "`: Friendly does not correspond to a subclass of Objective.\n",
    "ERM": "objective.objectives` to be a list, but got 'ERM'.",
}


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("stages", WRONG_STAGES)
def test_wrong_objectives_of_a_staged(stages, capsys):
    """The text is the innermost value, also among several methods."""
    staged = f"{{class_path: Staged, init_args: {{objectives: {stages}}}}}"
    Path("wrong.yaml").write_text(f"methods: {{A: {{objective: ERM}}, B: {{objective: {staged}}}}}")
    assert WRONG_STAGES[stages] in refusal(capsys, "compare", "--config=wrong.yaml")
    given = [f"{OBJECTIVE}=Staged", f"{OBJECTIVE}.objectives={stages.replace(' ', '')}"]
    if "{" in stages:
        given = [f"{OBJECTIVE}={staged}"]
    line = refusal(capsys, "fit", "--trainer.accelerator=cpu", *given)
    assert WRONG_STAGES[stages] in line


CALLBACKS = "--trainer.callbacks"
WRONG_CALLBACKS = {
    "[{class_path: StageSwitch, init_args: {when: 1}}]": f"StageSwitch has no argument `{CALLBACKS}.when`.",
    "[StageSwitch, {class_path: RadiusSchedule, init_args: {name: rho, stop: 1}}]": "RadiusSchedule has no argument",
    "{class_path: DeferredReweighting, init_args: {att: 0.5}}": f"argument `{CALLBACKS}.att`. Did you mean",
    "RadiusSchedule shape=cos": f"Expected `{CALLBACKS}.shape` to be one of 'linear', 'cosine', 'steps', but got",
    "RadiusSchedule points=0.5": f"Expected `{CALLBACKS}.points` to be a list or null, but got '0.5'.",
    "RadiusSchedule start=[1]": f"Expected `{CALLBACKS}.start` to be float, but got '[1]'.",
    "RadiusSchedule stop=1": f"RadiusSchedule has no argument `{CALLBACKS}.stop`.",
    "DeferredReweighting beta=x": f"Expected `{CALLBACKS}.beta` to be float",
}


@pytest.mark.parametrize("given", WRONG_CALLBACKS)
def test_wrong_arguments_of_callbacks(given, capsys):
    if "{" in given:
        Path("wrong.yaml").write_text(f"trainer: {{callbacks: {given}}}")
        options = ["--config=wrong.yaml"]
    else:
        name, argument = given.split()
        options = [f"{CALLBACKS}={name}"]
        options += [f"{CALLBACKS}.name=rho"] * (name == "RadiusSchedule") + [f"{CALLBACKS}.{argument}"]
    assert WRONG_CALLBACKS[given] in refusal(capsys, "fit", "--trainer.accelerator=cpu", *options)


OF_A_METHOD = {
    "{objective: {class_path: SAM, init_args: {rho: -1}}}": "`rho` to be a finite number >= 0, but got -1.0.",
    "{objective: {class_path: ASAM, init_args: {ascent: {scale: Adaptive}}}}": "`ascent` to be an Ascent without `scal",
    "{objective: {class_path: SAM, init_args: {ascent: {scale: {class_path: Adaptive, init_args: {eta: -1}}}}}}": "",
    "{objective: {class_path: Staged, init_args: {objectives: [{class_path: SAM, init_args: {rho: -1}}]}}}": "",
    "{objective: SSESAM, callbacks: [{class_path: StageSwitch, init_args: {at: 2}}]}": "`at` to be a number",
    "{objective: SAM, model: {step_options: {reuse: 0.5}}}": "`interval` to be an integer >= 2 with `reuse`",
}


@pytest.mark.parametrize("method", OF_A_METHOD)
def test_an_error_names_the_method(method, capsys):
    Path("wrong.yaml").write_text(f"methods: {{A: {{objective: ERM}}, my method: {method}}}")
    for command in ("compare", "sweep"):
        line = refusal(capsys, command, "--config=wrong.yaml")
        assert line.startswith(f"error: The method 'my method': Expected argument {OF_A_METHOD[method]}")


def test_an_error_of_all_methods_names_none(capsys):
    Path("wrong.yaml").write_text("methods: {A: {objective: ERM}}\ndata: {class_path: DigitsLT, init_args: {seed: -1}}")
    assert refusal(capsys, "compare", "--config=wrong.yaml").startswith("error: Expected argument `seed` to be")


WRONG_IN_YAML = {
    "{radius: 0.1}": "to be one of InverseNorm, PACBayesRadius, or the path of a class, but got '0.1'.",
    "{only: torch.nn.Linear}": "'no_bias_no_norm' or the path of a function or null, but got 'torch.nn.Linear'.",
    "{direction: Direction}": "Momentum, Noise, or the path of a class, but got 'Direction', which is abstract.",
    "{scale: Scale}": "to be Adaptive or the path of a class, but got 'Scale'.",
    "{direction: Frendly}": "but got 'Frendly'. Did you mean 'Friendly'?",
    "{scales: Adaptive}": "Ascent has no argument `--methods.objective.ascent.scales`. Did you mean",
    "{scale: {class_path: Adaptive, init_args: {eta: -1}}}": "`eta` to be a finite number >= 0, but got -1.0.",
    "{scale: {class_path: Adaptive, init_args: {etas: 1}}}": "Adaptive has no argument `--methods.objective.asc",
    "{radius: os.getcwd}": "or the path of a Radius or of a function that is annotated to return a Tensor, but got",
    "{radius: InverseNorm}": "InverseNorm` needs `--methods.objective.ascent.radius.sigma` and",
}


@pytest.mark.parametrize("ascent", WRONG_IN_YAML)
@pytest.mark.parametrize("where", ["file", "command"])
def test_wrong_methods_are_refused_in_one_line(ascent, where, capsys):
    method = f"{{E: {{objective: ERM}}, A: {{objective: {{class_path: SAM, init_args: {{ascent: {ascent}}}}}}}}}"
    Path("wrong.yaml").write_text(f"methods: {method}")
    given = ["--config=wrong.yaml"] if where == "file" else ["--methods", method]
    assert WRONG_IN_YAML[ascent] in refusal(capsys, "compare", *given)


class Flat(nn.Sequential):
    """A network without normalization layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))


def none_of(name, parameter):
    return False


def failing(name, parameter):
    raise LookupError("boom")


def of_a_name(name):
    return True


def several(name, parameter):
    return parameter > 0


def lazy_network(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


CANNOT_TRAIN = {
    "momentum": (
        Method(MomentumSAM, optimizer=sgd),
        "`optimizer` to be one with a momentum (SGD with momentum > 0",
    ),
    "direction": (
        Method(partial(SSESAM, ascent=Ascent(Momentum())), optimizer=torch.optim.Adagrad),
        "which Momentum() perturbs along, but got Adagrad without.",
    ),
    "staged": (
        Method(lambda: Staged([ERM(), MomentumSAM()]), optimizer=torch.optim.RMSprop),
        "which Momentum() perturbs along, but got RMSprop without.",
    ),
    "norm": (
        Method(partial(SAM, ascent=Ascent(only="norm")), backbone=Flat),
        "parameters that are trained, but got 'norm'.",
    ),
    "none": (Method(partial(SAM, ascent=Ascent(only=none_of))), "trained, but got test_family_cli.none_of."),
    "raises": (
        Method(partial(ImbSAM, ascent=Ascent(only=failing))),
        "`only` to be a function that takes a name and a parameter, and returns whether it moves, but got"
        " test_family_cli.failing, which raised LookupError (boom) for 'backbone.features.0.weight'.",
    ),
    "arguments": (Method(partial(SAM, ascent=Ascent(only=of_a_name))), "TypeError (of_a_name() takes 1 positional"),
    "no bool": (Method(partial(SAM, ascent=Ascent(only=several))), "which raised RuntimeError (Boolean value of"),
    "LBFGS": (Method(SAM, optimizer=torch.optim.LBFGS), "LBFGS evaluates the loss several times a step"),
    "schedules": (
        Method(
            SSESAM, callbacks=[RadiusSchedule("tail_rho"), RadiusSchedule("head_rho"), RadiusSchedule("tail_rho", 1)]
        ),
        "Several RadiusSchedules move `tail_rho`: leave one of them, or name another radius.",
    ),
    "switches": (
        Method(SSESAM, callbacks=[StageSwitch(), StageSwitch(at=0.2)]),
        "There are several StageSwitches: ",
    ),
    "callbacks": (
        Method(SAM, callbacks=[DeferredReweighting(), DeferredReweighting(at=0.1)]),
        "There are several DeferredReweighting callbacks with the same settings: leave one of them.",
    ),
}


@pytest.mark.parametrize("case", CANNOT_TRAIN)
def test_a_method_that_cannot_be_trained_is_refused_before_all_others(case):
    method, text = CANNOT_TRAIN[case]
    experiment = method.experiment("X", Recipe(), 0.7)
    with pytest.raises(ArgumentError) as caught:
        experiment.check(experiment.make_split(experiment.make_data()))
    assert str(caught.value).startswith("The method 'X' cannot be trained. ")
    assert text in str(caught.value)


def test_methods_that_can_be_trained_pass_the_check():
    adam = Method(MomentumSAM, optimizer=torch.optim.Adam)
    norm = Method(partial(SAM, ascent=Ascent(only="norm")))
    moved = Method(SSESAM, callbacks=[RadiusSchedule("tail_rho"), RadiusSchedule("head_rho"), StageSwitch()])
    lazy = Method(partial(SAM, ascent=Ascent(only="norm")), backbone=lazy_network)
    for method in (adam, Method(MomentumSAM), norm, moved, lazy):
        experiment = method.experiment("X", Recipe(), 0.7)
        experiment.check(experiment.make_split(experiment.make_data()))


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_nothing_is_written_before_a_method_is_refused(command, capsys):
    method = "{objective: MomentumSAM, optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}}"
    Path("late.yaml").write_text(f"methods: {{ERM: {{objective: ERM}}, late: {method}}}")
    line = refusal(capsys, command, "--config=late.yaml")
    assert line.startswith("error: The method 'late' cannot be trained. Expected argument `optimizer` to be one with a")
    assert [path.name for path in Path().iterdir()] == ["late.yaml"]


def test_methods_by_name(monkeypatch):
    """Radii are the options of the command, or the defaults of the objectives."""
    planned = planned_runs(monkeypatch, ["--methods", ",".join(METHODS), "--seeds=1", "--sam_rho=0.3"], ["--seeds=1"])
    named, default = planned[: len(METHODS)], planned[len(METHODS) :]
    found = {e.method: e.objective() for e, *_ in named}
    assert list(found) == list(METHODS)
    assert all(type(objective).__name__ == name for name, objective in found.items())
    for name, objective in found.items():
        if name not in RADII:
            assert repr(objective) == repr(type(objective)())
    assert found["SAM"].rho == 0.3
    assert [e.method for e, *_ in default] == ["ERM", "SAM", "ImbSAM", "SSESAM"]


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("SSE-SAM", "Did you mean 'SSESAM'?"),
        ("Focal-SAM", "Did you mean 'FocalSAM'?"),
        ("F-SAM", "Did you mean 'FriendlySAM'?"),
        ("le_sam", "Did you mean 'LESAM'?"),
        ("Adaptive SAM", "Did you mean 'ASAM'?"),
        ("WSMA", "Did you mean 'WSAM'?"),
        ("LookSAM", "LookSAM is SAM with the step options `interval` and `reuse`."),
        ("SAM-ON", "SAM-ON is SAM with `ascent: {only: norm}`."),
        ("late SAM", "late SAM is Staged with the objectives ERM and SAM."),
        ("x" * 500, "..."),
    ],
)
def test_other_spellings_of_a_method(name, guess):
    with pytest.raises(ArgumentError, match="Expected argument `methods` to be some of ERM, SAM,") as caught:
        make_methods(f"ERM,{name}", OPTIONS)
    assert guess in str(caught.value)
    assert len(str(caught.value)) < 390


def test_fit_takes_every_method_by_name(monkeypatch, capsys):
    assert repr(fitted(monkeypatch, "--method=LESAM")[0]) == repr(LESAM())
    assert "Did you mean 'FriendlySAM'?" in refusal(capsys, "fit", "--method=F-SAM")


def test_a_comparison_says_where_radii_come_from():
    experiments = [m.experiment(n, Recipe(), 0.7) for n, m in make_methods("SAM,ASAM,LESAM", OPTIONS).items()]
    choices = find_choices(experiments, OPTIONS, OPTIONS, None, is_shipped=True)
    assert [str(choice) for choice in choices] == [
        "sam_rho = 0.2 (a default, chosen on 8x8 digits)",
        "ASAM.rho = 0.5 (a default, the objective's)",
        "LESAM.sigma = 0.1 (a default, the objective's)",
        "LESAM.rho_max = 0.05 (a default, the objective's)",
    ]
    others = "The radii of ASAM and LESAM are defaults that were chosen on no data. Search with"
    assert [note.startswith(others) for note in notes(choices, ["SAM", "ASAM", "LESAM"], is_digits=True)] == [True]
    on_digits, on_none = notes(choices, ["SAM", "ASAM", "LESAM"], is_digits=False)
    assert "8x8 digits were compared: sam_rho = 0.2. " in on_digits
    assert on_none.startswith(others)


def test_what_a_search_looks_at():
    """Options for the four; a hundredth to ten times of the others' own radii; bounds that are given before all."""
    methods = make_methods("ERM,SAM,SSESAM,ASAM,LESAM,CCSAM,RandomSAM", OPTIONS)
    given = check_bounds({"ASAM.rho": [0.1, 2], "SAM.rho": [0.2, 0.3]})
    found = {c.name: c for c in find_candidates(methods, BOUNDS, is_shipped=True, given=given)}
    assert {name: candidate.bounds for name, candidate in found.items()} == {
        "ERM": {},
        "SAM": {"sam_rho": (0.2, 0.3)},
        "SSESAM": {"head_rho": (0.01, 0.5), "tail_rho": (0.01, 0.5), "gamma": (0.3, 0.9)},
        "ASAM": {"rho": (0.1, 2)},
        "LESAM": {"sigma": (0.001, 1.0), "rho_max": (0.0005, 0.5)},
        "CCSAM": {"radius": (CCSAM().radius / 100, 10 * CCSAM().radius)},
        "RandomSAM": {"rho": (RandomSAM().rho / 100, 10 * RandomSAM().rho)},
    }
    assert {name for name, candidate in found.items() if candidate.needs_entry} == {
        "ASAM",
        "LESAM",
        "CCSAM",
        "RandomSAM",
    }
    expected = r"`radii` to be bounds of radii \(SAM.rho, .*RandomSAM.rho\), but got ASAM.rh."
    with pytest.raises(ArgumentError, match=expected):
        find_candidates(methods, BOUNDS, True, check_bounds({"ASAM.rh": [1, 2]}))
    with pytest.raises(
        ArgumentError, match=r"Expected argument `ASAM.rho` to be the smallest and the largest value, in"
    ):
        check_bounds({"ASAM.rho": [2, 1]})


def test_radii_of_a_staged_objective_are_searched():
    late = Method(partial(Staged, [ERM(), SAM(0.1), SSESAM(head_rho=0.2)]), callbacks=[StageSwitch(at=[0.2, 0.4, 0.6])])
    (candidate,) = find_candidates({"late": late}, BOUNDS, is_shipped=False)
    candidate.check(Recipe())
    values = {"rho": 0.03, "head_rho": 0.04, "tail_rho": 0.05}
    assert candidate.experiment(Recipe(), values).objective().radius_values == values
    assert candidate.bounds == dict.fromkeys(values, (0.01, 0.5))


@pytest.mark.usefixtures("parts")
def test_a_search_and_a_comparison_with_what_it_found(monkeypatch):
    methods = {
        "ASAM": {"objective": "ASAM"},
        "late": {"objective": spec("Staged", objectives=["ERM", "SAM", spec("SSESAM", ascent={"scale": "Adaptive"})])},
        "mine": {"objective": "parts.Mine"},
    }
    methods["late"]["callbacks"] = [spec("StageSwitch", at=[0.4, 0.6, 0.8])]
    Path("search.yaml").write_text(yaml.safe_dump({"methods": methods, "epochs": 1, "trials": 1}))
    main(["sweep", "--config=search.yaml", "--radii={mine.length: [0.3, 0.4]}", "--trainer={accelerator: cpu}"])
    planned = planned_runs(monkeypatch, ["--config=sweep/best.yaml", "--seeds=1"])
    found = {e.method: e.objective() for e, *_ in planned}
    searched = dict(item.split("=") for item in yaml.safe_load(Path("sweep/best.yaml").read_text())["searched"])
    names = ["ASAM.rho", "late.rho", "late.head_rho", "late.tail_rho", "mine.length"]
    assert list(searched) == names
    radii = [found[method].radius_values[radius] for method, radius in (name.split(".") for name in names)]
    assert radii == [float(value) for value in searched.values()]
    assert [type(part) for part in found["late"].objectives] == [ERM, SAM, SSESAM]
    assert found["late"].ascents()[-1] == Ascent(scale=Adaptive())
    assert 0.005 <= radii[0] <= 5
    assert 0.3 <= radii[-1] <= 0.4


class Thick(Scale):
    """A scale whose ``repr`` does not show its value."""

    def __init__(self, factor):
        self.factor = factor

    def factors(self, weights):
        return [torch.full_like(p, self.factor) for p in weights.values]


class Mixed(Direction):
    def __init__(self, parts):
        self.parts = parts

    def find(self, gradient, weights, state):
        return gradient, state


def is_large(name, parameter, least=10):
    return parameter.numel() > least


def fingerprint(objective):
    experiment = Method(objective).experiment("A", Recipe(), 0.7)
    return experiment.fingerprint(experiment.make_split(experiment.make_data()), contents="")


def of(*args, **parts):
    return partial(SAM, ascent=Ascent(*args, **parts))


def test_ascents_count_for_the_fingerprint():
    kinds = [
        SAM,
        of(scale=Adaptive()),
        of(scale=Adaptive(0.1)),
        of(scale=Thick(1.0)),
        of(scale=Thick(2.0)),
        of(Mixed({"a": Thick(1.0)})),
        of(Mixed({"a": Thick(2.0)})),
        of(only="norm"),
        of(only=is_large),
        of(only=partial(is_large, least=5)),
        of(only=lambda name, parameter: parameter.numel() > 3),
        of(only=lambda name, parameter: parameter.numel() > 4),
        of(radius=lambda norms: norms.weights / 10),
        of(radius=lambda norms: norms.weights / 20),
        lambda: Staged([ERM(), SAM(ascent=Ascent(scale=Thick(1.0)))]),
        lambda: Staged([ERM(), SAM(ascent=Ascent(scale=Thick(2.0)))]),
    ]
    first, again = ([fingerprint(kind) for kind in kinds] for _ in range(2))
    assert first == again
    assert len(set(first)) == len(kinds)


def test_a_plain_ascent_is_no_part_of_the_fingerprint(monkeypatch):
    """Runs that were made before there were ascents are found."""
    seen = []
    monkeypatch.setattr(experiment_module, "digest", lambda parts: seen.append(parts) or "")
    for objective in (SAM, of(Gradient()), of(scale=Adaptive())):
        fingerprint(objective)
    assert ["ascents" in parts for parts in seen] == [False, False, True]
    assert seen[0]["objective"] == "SAM(rho=0.05)"
    assert list(seen[0]) == [
        *("contents", "version", "data", "counts", "tail", "model", "loss", "objective", "optimizer", "made_by"),
        *("callbacks", "settings", "code"),
    ]


def test_the_shipped_family_is_what_it_says(monkeypatch):
    seen = planned_runs(monkeypatch, ["--config", "compare_family"])
    experiments = {experiment.method: experiment for experiment, *_ in seen}
    assert len(experiments) == 17
    found = {name: experiment.objective() for name, experiment in experiments.items()}
    plain, unpublished = found["plain training"], found["late Friendly adaptive SSE-SAM"]
    assert repr(plain) == "ERM()"
    assert {type(objective).__name__ for objective in found.values()} == {*METHODS, "Staged"}
    assert [type(part) for part in found["late SAM"].objectives] == [ERM, SAM]
    assert [callback.at for callback in experiments["late SAM"].callbacks] == [0.8]
    assert unpublished.ascents() == (Ascent(), Ascent(Friendly(), Adaptive()))
    assert [callback.at for callback in experiments["late Friendly adaptive SSE-SAM"].callbacks] == [[0.5, 0.8]]
    options = experiments["LookSAM"].model_arguments["step_options"]
    assert (options.interval, options.reuse > 0) == (5, True)
    data = experiments["SAM"].make_data()
    assert isinstance(experiments["SAM"].make_model(data).backbone, nn.Module)
    assert sum(data.class_counts) == 276


def test_help_stays_short(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    for command in ("compare", "sweep"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert len(text.splitlines()) < 100
        assert all(name in text for name in METHODS)
