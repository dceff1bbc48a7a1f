"""Files of others: a checkpoint runs no code, and a class path makes the kind of object that is asked for."""

import os
import pickle
import shutil
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import STRICT
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.utils.data import RandomSampler, Sampler

from lightning_ssesam import ERM, DigitsLT, LongTailClassifier
from lightning_ssesam.cli import main
from lightning_ssesam.compare import Method
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.checkpoints import find_config
from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.experiments.trust import check_functions, guard_loading, read_checkpoint
from lightning_ssesam.models import SmallConvNet

pytestmark = STRICT

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=2",
    "--trainer.log_every_n_steps=1",
    "--model.objective=ERM",
]
ONE_FOLDER = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.version=mine"]


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.makedirs, ("ran", 0o777, True)


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training with the file a.ckpt, after the first of two epochs."""
    folder, before = tmp_path_factory.mktemp("trained"), Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-ssesam"])
        main(["fit", *QUIET, "--trainer.max_epochs=1"])
    os.chdir(before)
    (checkpoint,) = folder.rglob("*.ckpt")
    return checkpoint


def changed(trained, name="theirs.ckpt", **entries):
    """A checkpoint with other entries, in the current folder, beside its configuration."""
    content = torch.load(trained, weights_only=True)
    torch.save({**content, **entries}, name)
    shutil.copy(trained.parent.parent / "config.yaml", ".")
    return name


def refusal(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    assert str(stop.value).startswith("error: ")
    assert "\n" not in str(stop.value)
    return str(stop.value).removeprefix("error: ")


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("fit", "callbacks"),
        ("validate", "hyper_parameters"),
        ("test", "datamodule_hyper_parameters"),
        ("curvature", "theirs"),
    ],
)
def test_a_payload_does_not_run(command, place, trained, monkeypatch):
    """Not even if the environment allows it to all programs. Nothing is written."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    checkpoint = changed(trained, **{place: {"a": Payload()}})
    before = sorted(Path().rglob("*"))
    given = [command, checkpoint] if command == "curvature" else [command, "--ckpt_path", checkpoint, *QUIET]
    assert refusal(*given) == (
        "The checkpoint 'theirs.ckpt' holds os.makedirs, which is no plain data and could run code when it is"
        " loaded. If you trust whoever made the file, add `--trust_checkpoint true`."
    )
    assert [path for path in sorted(Path().rglob("*")) if path.name != "curvature"] == before
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


@pytest.mark.parametrize("name", ["last", "other"])
def test_a_payload_does_not_run_as_the_last_checkpoint(name, trained):
    """Whether Lightning finds the file, or the newest is taken."""
    folder = Path("runs/lightning_logs/mine/checkpoints")
    folder.mkdir(parents=True)
    shutil.move(changed(trained, theirs=Payload()), folder / f"{name}.ckpt")
    assert f"checkpoints/{name}.ckpt' holds " in refusal("fit", *QUIET, *ONE_FOLDER, "--ckpt_path=last")
    assert not Path("ran").exists()


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_that_is_trusted_may_hold_anything(command, trained):
    main([command, *QUIET, "--ckpt_path", changed(trained, theirs=Payload()), "--trust_checkpoint=true"])
    assert Path("ran").is_dir()
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ


def test_curvature_of_a_checkpoint_that_is_trusted(trained, capsys):
    """A line names the configuration, which nobody has named."""
    quick = ["--groups=head", "--samples=2", "--probes=0", "--max_iterations=1", "--landscape=false"]
    main(["curvature", changed(trained, theirs=Payload()), *quick, "--trust_checkpoint=true"])
    assert Path("ran").is_dir()
    assert f"Model and data come from '{Path('config.yaml').resolve()}'." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["best_model_path", "kth_best_model_path", "last_model_path"])
@pytest.mark.parametrize(
    "path",
    ["local://{here}/precious", "{here}/lightning_logs/version_0/checkpoints/../../../precious"],
)
def test_a_checkpoint_deletes_nothing_of_the_user(path, name, trained):
    """A callback of Lightning deletes what it takes for an earlier checkpoint, even a folder."""
    precious = Path("precious/thesis.ckpt")
    precious.parent.mkdir()
    precious.touch()
    path = path.format(here=Path.cwd())
    states = torch.load(trained, weights_only=True)["callbacks"]
    (key,) = [key for key in states if key.startswith("ModelCheckpoint")]
    state = {**states[key], "dirpath": f"{Path.cwd()}/lightning_logs/version_0/checkpoints", name: path}
    own = {"best": [], "last": ["save_last=true"], "kth": ["monitor=val/acc_all", "mode=max"]}[name.split("_")[0]]
    if name == "kth_best_model_path":
        key = key.replace("'monitor': None", "'monitor': 'val/acc_all'").replace("'mode': 'min'", "'mode': 'max'")
        state |= {"best_k_models": {path: torch.tensor(-1.0)}, "kth_value": torch.tensor(-1.0)}
    options = ["--trainer.callbacks+=ModelCheckpoint", *(f"--trainer.callbacks.{option}" for option in own)]
    checkpoint = changed(trained, callbacks={key: state})
    main(["fit", *QUIET, *options, f"--ckpt_path={checkpoint}"])
    assert precious.is_file()


def test_a_checkpoint_knows_its_earlier_ones_and_no_other_files(trained):
    """Those of its own folder and of the folder of the run, in which there are checkpoints alone."""
    kept = [str(trained), str(Path("runs/a.ckpt").absolute())]
    for file in ("runs/a.ckpt", "runs/notes.txt", "a.ckpt"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    Path("runs/link.ckpt").symlink_to(Path("a.ckpt").absolute())
    lost = [f"{Path.cwd()}/{file}" for file in ("runs/notes.txt", "a.ckpt", "runs/link.ckpt", "runs", "runs/no.ckpt")]
    content = torch.load(trained, weights_only=True)
    trainer = Trainer(logger=False, callbacks=[ModelCheckpoint("runs")])
    guard_loading(trainer, trust=False)
    for path in [*kept, *lost, f"local::{kept[1]}", f"local://{kept[1]}", 3]:
        state = {"best_model_path": path, "best_k_models": {path: 1.0}}
        torch.save({**content, "callbacks": {"ModelCheckpoint": state, "other": 3}}, trained.parent / "theirs.ckpt")
        loaded = trainer.strategy.load_checkpoint(trained.parent / "theirs.ckpt")["callbacks"]["ModelCheckpoint"]
        assert loaded == (state if path in kept else {"best_model_path": "", "best_k_models": {}})
    (trained.parent / "theirs.ckpt").unlink()


def loaded_model(monkeypatch, *arguments):
    seen = []

    def fit(self, model, datamodule, ckpt_path: str | None = None):
        seen.append(model)
        self.strategy.load_checkpoint(ckpt_path)

    monkeypatch.setattr(Trainer, "fit", fit)
    main(["fit", *QUIET, *arguments])
    return seen[0]


def width(model):
    return len(next(model.backbone.parameters()))


HYPERPARAMETERS = {"tail_below": 30, "backbone": {"class_path": "SmallConvNet", "init_args": {"width": 16}}}


@pytest.mark.parametrize("extra", [{}, {"_instantiator": "os.mkdir", "_class_path": "os.mkdir"}])
def test_hyperparameters_of_a_checkpoint(extra, trained, monkeypatch, capsys):
    """They are left alone, which a line says; with --trust_checkpoint they change the configuration."""
    given = f"--ckpt_path={changed(trained, hyper_parameters={**HYPERPARAMETERS, **extra})}"
    model = loaded_model(monkeypatch, given)
    assert width(model) == 32
    assert not model.split.tail.equal(model.split.class_counts < 30)
    assert capsys.readouterr().err.count("The hyperparameters in 'theirs.ckpt' are not used") == 1
    model = loaded_model(monkeypatch, given, "--trust_checkpoint=true")
    assert width(model) == 16
    assert model.split.tail.equal(model.split.class_counts < 30)
    assert "not used" not in capsys.readouterr().err


def test_hyperparameters_of_whom_one_trusts_name_no_other_functions(trained):
    """Trust in the file is no reason to call what makes no network."""
    evil = {"backbone": {"class_path": "os.mkdir", "init_args": {"path": "ran"}}}
    checkpoint = changed(trained, hyper_parameters=evil)
    assert refusal("fit", *QUIET, f"--ckpt_path={checkpoint}", "--trust_checkpoint=true")
    assert not Path("ran").exists()


def test_strategies_that_read_by_other_ways_get_plain_data_alone(trained):
    """FSDP unpickles by itself, without torch.load."""

    class Unpickling(SingleDeviceStrategy):
        def load_checkpoint(self, checkpoint_path, *args, **kwargs):
            reader = torch.PyTorchFileReader(str(checkpoint_path))
            pickle.loads(reader.get_record("data.pkl"))

    trainer = Trainer(strategy=Unpickling(torch.device("cpu")), logger=False)
    guard_loading(trainer, trust=False)
    with pytest.raises(ArgumentError, match="is no plain data"):
        trainer.strategy.load_checkpoint(changed(trained, theirs=Payload()))
    Path("sharded").mkdir()
    with pytest.raises(ArgumentError, match=r"'sharded' is a folder, which may hold a sharded model\. Loading it"):
        trainer.strategy.load_checkpoint("sharded")
    assert not Path("ran").exists()


OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, Optimizer)
    # The base class, and those that cannot train a bias with this step.
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
}
SCHEDULERS = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=1),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[1, 2]),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.5**epoch),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=3),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=5, cycle_momentum=False),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.2, cycle_momentum=False),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], milestones=[1]
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_optimizers_are_plain_data(name):
    net = nn.Linear(2, 2)
    optimizer = OPTIMIZERS[name](net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}, "a.ckpt")
    assert read_checkpoint("a.ckpt")["optimizer_states"][0]["state"].keys() == optimizer.state_dict()["state"].keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_states_of_schedulers_are_plain_data(name):
    scheduler = SCHEDULERS[name](SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    torch.save({"state_dict": {}, "lr_schedulers": [scheduler.state_dict()]}, "a.ckpt")
    assert read_checkpoint("a.ckpt")["lr_schedulers"][0]["last_epoch"] == scheduler.last_epoch


def test_an_honest_training_needs_no_trust(capsys):
    """With all callbacks of this package, some of Lightning, random state and all, resumed within an epoch."""
    kinds = ["StageSwitch", "DeferredReweighting", "LearningRateMonitor", "EarlyStopping"]
    callbacks = [f"--trainer.callbacks+={kind}" for kind in kinds]
    callbacks += ["--trainer.callbacks.monitor=val/loss", "--trainer.callbacks+=ModelCheckpoint"]
    callbacks += ["--trainer.callbacks.every_n_train_steps=3", "--trainer.callbacks.save_top_k=-1"]
    rest = ["--model.loss=lightning_ssesam.losses.LDAMLoss", "--model.objective=SSESAM", "--trainer.max_epochs=4"]
    main(["fit", *QUIET, *callbacks, *rest])
    (checkpoint,) = Path().rglob("*step=3.ckpt")
    main(["fit", *QUIET, *callbacks, *rest, f"--ckpt_path={checkpoint}"])
    assert "not used" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"hello world, this is text", b"<html>" * 50, pickle.dumps(Payload()), [1, 2], {"weights": 1}, 0.5]
)
@pytest.mark.parametrize("trust", [False, True])
def test_files_that_are_no_checkpoint(trust, content, trained):
    """Empty ones, texts, other objects, the first half of a checkpoint."""
    if isinstance(content, bytes):
        Path("a.ckpt").write_bytes(content)
    elif isinstance(content, float):
        whole = trained.read_bytes()
        Path("a.ckpt").write_bytes(whole[: int(len(whole) * content)])
    else:
        torch.save(content, "a.ckpt")
    with pytest.raises(ArgumentError, match=r"^'a\.ckpt' is no checkpoint of `lightning-ssesam fit`\.$"):
        read_checkpoint("a.ckpt", trust)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("name", "value"), [("epoch", "a"), ("global_step", 1.5), ("state_dict", [1])])
def test_plain_data_of_wrong_types_are_refused(name, value):
    torch.save({"state_dict": {}, "epoch": 1, "global_step": 2, name: value}, "a.ckpt")
    with pytest.raises(ArgumentError, match=r"^'a\.ckpt' is no checkpoint of `lightning-ssesam fit`"):
        read_checkpoint("a.ckpt")


@pytest.mark.parametrize("trust", [False, True])
def test_a_program_of_torchscript_is_no_checkpoint(trust):
    torch.jit.script(nn.Linear(1, 1)).save("a.ckpt")
    with pytest.raises(ArgumentError, match="is no checkpoint"):
        read_checkpoint("a.ckpt", trust)


def untyped(*args, **kwargs):
    Path("ran").mkdir()
    return 3


def typed(*args, **kwargs) -> int:
    Path("ran").mkdir()
    return 3


def network(num_classes: int = 10, width: int = 8) -> nn.Module:
    return SmallConvNet(num_classes, width=width)


def sampler(labels) -> "Sampler[int]":
    return RandomSampler(labels)


def perhaps(num_classes: int = 10) -> nn.Module | None:
    return None


class Maker:
    """Objects that are called, with an annotation."""

    def __call__(self, *args, **kwargs) -> Optimizer:
        Path("ran").mkdir()


COUNTS = [40, 30, 4]


def classifier(**parts):
    return LongTailClassifier(COUNTS, **{"backbone": SmallConvNet, **parts})


WRONG = {
    "a class": lambda: Path,
    "a class within a partial": lambda: partial(partial(nn.Parameter, 3), 4),
    "an annotated function": lambda: typed,
    "an annotated function within a partial": lambda: partial(typed, 3),
    "a callable object": Maker,
    "a text": lambda: "SmallConvNet",
    "a number": lambda: 3,
}
PLACES = {
    "classifier, backbone": ("backbone", lambda part: classifier(backbone=part)),
    "classifier, optimizer": ("optimizer", lambda part: classifier(optimizer=part)),
    "classifier, scheduler": ("scheduler", lambda part: classifier(scheduler=part)),
    "data, sampler": ("sampler", lambda part: DigitsLT(sampler=part)),
    **{
        f"{kind.__name__}, {name}": (name, lambda part, kind=kind, name=name: kind(**{name: part}))
        for kind, names in {
            Recipe: ("data", "backbone", "optimizer", "loss"),
            Method: ("data", "backbone", "optimizer", "loss", "objective"),
        }.items()
        for name in names
    },
    "Experiment, objective": ("objective", lambda part: Experiment(method="a", objective=part)),
}


@pytest.mark.parametrize(
    ("place", "wrong"),
    # The callable object promises an optimizer.
    [pair for pair in product(PLACES, WRONG) if not (pair[1] == "a callable object" and "optimizer" in pair[0])],
)
def test_parts_of_another_kind_are_refused_before_they_are_called(place, wrong):
    name, make = PLACES[place]
    with pytest.raises(ArgumentError, match=rf"^Expected argument `{name}` to be a class or a function that makes it"):
        make(WRONG[wrong]())
    assert not Path("ran").exists()


MADE_WRONG = {
    "backbone": lambda: classifier(backbone=untyped),
    "backbone, perhaps": lambda: classifier(backbone=perhaps),
    "optimizer": lambda: classifier(optimizer=untyped).configure_optimizers(),
    "scheduler": lambda: classifier(scheduler=untyped).configure_optimizers(),
    "sampler": lambda: DigitsLT(sampler=untyped).train_dataloader(),
    "data": lambda: Experiment(method="a", objective=ERM, data=untyped).fit(0),
    "objective": lambda: Experiment(method="a", objective=untyped).make_model(DigitsLT()),
    "loss": lambda: Experiment(method="a", objective=ERM, loss=untyped).make_model(DigitsLT()),
}


@pytest.mark.parametrize("name", MADE_WRONG)
def test_what_a_function_without_annotation_makes_is_checked(name):
    with pytest.raises(ArgumentError, match=rf"^Expected argument `{name.split(',')[0]}` .* but got one that makes "):
        MADE_WRONG[name]()


@pytest.mark.parametrize("loss", [torch.optim.SGD, nn.CrossEntropyLoss, 3, "mean"])
def test_a_loss_is_a_module(loss):
    with pytest.raises(ArgumentError, match="argument `loss` to be a module with reduction='none'"):
        classifier(loss=loss)


def test_right_parts_are_taken():
    """Annotated functions, lambdas, partials, ready networks."""
    model = classifier(
        backbone=network, optimizer=lambda parameters: SGD(parameters, lr=0.3), scheduler=SCHEDULERS["SequentialLR"]
    )
    configured = model.configure_optimizers()
    assert configured["optimizer"].defaults["lr"] == 0.3
    assert isinstance(configured["lr_scheduler"]["scheduler"], lr_scheduler.SequentialLR)
    assert width(classifier(backbone=SmallConvNet(3, width=16))) == 16
    assert isinstance(DigitsLT(sampler=sampler).train_dataloader().sampler, RandomSampler)
    assert Recipe(backbone=partial(network, width=16), loss=lambda: nn.Identity()).loss is not None


@pytest.mark.parametrize("place", ["backbone", "optimizer", "scheduler", "loss", "objective", "sampler"])
@pytest.mark.parametrize("function", ["untyped", "typed"])
def test_functions_of_a_configuration_are_refused_before_they_are_called(place, function):
    """jsonargparse calls a function that has arguments, whatever it promises."""
    part = {"class_path": f"test_trust.{function}", "dict_kwargs": {"x": 1}}
    with pytest.raises(ArgumentError, match=rf"^Expected argument `{place}` to be a class"):
        check_functions({"model": {"x": [{place: part}]}})
    if place in ("backbone", "sampler"):
        option = "--data.sampler" if place == "sampler" else "--model.backbone"
        assert f"argument `{place}`" in refusal("fit", *QUIET, f"{option}={part}")
    assert not Path("ran").exists()


def test_a_function_that_promises_the_kind_may_have_arguments(monkeypatch):
    part = {"class_path": "test_trust.network", "init_args": {"width": 16}}
    check_functions({"backbone": part})
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, **_: seen.append(model))
    main(["fit", *QUIET, f"--model.backbone={part}"])
    assert width(seen[0]) == 16


def test_compare_refuses_functions_before_they_are_called():
    part = {"class_path": "test_trust.typed", "dict_kwargs": {"x": 1}}
    assert "argument `optimizer`" in refusal("compare", f"--optimizer={part}", "--epochs=1", "--seeds=1")
    assert "argument `backbone`" in refusal("sweep", f"--backbone={part}", "--epochs=1")
    assert not Path("ran").exists()


def test_the_configuration_of_a_checkpoint():
    """The newest that is not newer than the checkpoint. A copy that has lost its times gets the first."""
    Path("checkpoints").mkdir()
    for age, name in enumerate(["config.yaml", "checkpoints/a.ckpt", "config-1.yaml", "checkpoints/b.ckpt"]):
        Path(name).touch()
        os.utime(name, (age, age))
    assert find_config(Path("checkpoints/a.ckpt")).name == "config.yaml"
    assert find_config(Path("checkpoints/b.ckpt")).name == "config-1.yaml"
    for age, name in enumerate(["checkpoints/a.ckpt", "config.yaml", "config-1.yaml"]):
        os.utime(name, (age, age))
    assert find_config(Path("checkpoints/a.ckpt")).name == "config.yaml"
