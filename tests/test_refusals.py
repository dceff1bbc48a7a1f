"""Whatever is wrong with a command is said in one line, before anything is trained."""

import builtins
import errno
import importlib
import logging
import multiprocessing
import random
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from logging.handlers import MemoryHandler
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from helpers import SHIPPED_COMPARISONS, SHIPPED_FITS, STRICT

from lightning_ssesam import DigitsLT
from lightning_ssesam.cli import COMMANDS, main
from lightning_ssesam.compare import compare
from lightning_ssesam.experiments.class_names import closest, known_classes
from lightning_ssesam.experiments.console import held_back
from lightning_ssesam.experiments.parser_messages import shorten
from lightning_ssesam.experiments.refusals import refuse, without_traceback

pytestmark = STRICT

NET = "--model.backbone=SmallConvNet"
FIT = ["fit", "--data=DigitsLT", NET, "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
COMPARE = ["compare", "--methods=ERM", "--seeds=1", "--epochs=1", "--jobs=1"]
SWEEP = ["sweep", "--trials=1", "--epochs=1"]
SHIPPED = "Expected `--config` to be a YAML file or one of"
LOSSES = "BalancedSoftmaxLoss, ClassBalancedLoss, FocalLoss, LDAMLoss, LogitAdjustedLoss, VSLoss"
DATA = "CIFAR10LT, CIFAR100LT, DigitsLT, ImageFolderLT, ImageListLT, ImageShardsLT, ImageTableLT, TinyImageNetLT"
NETWORKS = "CIFARResNet, SmallConvNet, TimmModel, TorchvisionResNet"

FILES = {
    "options.yaml": b"seeds: 5\n",
    "malformed.yaml": b"a: [1\nb: }",
    "latin.yaml": b"seeds: \xff\xfe",
    "empty.yaml": b"",
    "comment.yaml": b"# nothing\n",
    "list.yaml": b"- 1\n",
    "number.yaml": b"3\n",
    "twice.yaml": b"seeds: 5\nepochs: 2\nseeds: 6\n",
    "deep_twice.yaml": b"data:\n  class_path: DigitsLT\n  init_args: {seed: 1, seed: 2}\n",
    "tabs.yaml": b"data:\n\tseed: 3\n",
    "binary.yaml": b"\x00\x01",
    "tag.yaml": b"a: !!python/object/apply:os.system ['touch hacked']\n",
    "alias.yaml": b"a: *nope\n",
    "deep.yaml": b"a: " + b"[" * 5000,
    "bomb.yaml": b"a0: &a0 [1]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (n + 1, n + 1, b", ".join([b"*a%d" % n] * 10)) for n in range(6)),
    "circle.yaml": b"methods: &a {A: *a}\n",
    "no_data.yaml": b"data: null\n",
    "no_backbone.yaml": b"backbone: null\n",
    "no_optimizer.yaml": b"optimizer: null\n",
    "no_output.yaml": b"output: ''\n",
    "long_names.yaml": b"methods: {%s: {objective: ERM}}\n" % (b"x" * 500),
    "key.yaml": b"? [1, 2]\n: 3\n",
    "unknown.yaml": b"sedes: 3\n",
    "unknown_class.yaml": b"data: {class_path: DigitLT}\n",
    "nested.yaml": b"data: {class_path: DigitsLT, init_args: {sed: 1}}\n",
    "method.yaml": b"methods: {A: {objectiv: SAM}}\n",
    "fit.yaml": b"trainer: {max_epochs: 1}\nmodel: {backbone: SmallConvNet}\ndata: DigitsLT\n",
    "file": b"no folder",
    "text.ckpt": b"no checkpoint",
    "empty.ckpt": b"",
    "raising.py": b"x = 1\nraise RuntimeError('out of coffee')\n",
    "unfinished.py": b"def f(:\n",
    "importing.py": b"import missing_package\n",
    "mine.py": b"""
import torch

def number(num_classes):
    return 3

class Net(torch.nn.Module):
    def __init__(self, num_classes, width: int):
        super().__init__()

class Untyped(torch.nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()

class Picky(torch.nn.Module):
    def __init__(self, num_classes):
        raise ValueError("a width of 3 is bad luck")

class Broken(torch.nn.Module):
    def __init__(self, num_classes):
        raise RuntimeError("shapes")

class Asserting(torch.nn.Module):
    def __init__(self, num_classes):
        assert num_classes < 3

class Ending(torch.nn.Module):
    def __init__(self, num_classes):
        raise SystemExit(0)

class Empty(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()

    def forward(self, x):
        return torch.zeros(len(x), 10)

class Reduced(torch.nn.Module):
    def forward(self, logits, targets):
        return torch.nn.functional.cross_entropy(logits, targets)

X = 3
""",
}


@pytest.fixture(autouse=True)
def _files(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    Path("folder.yaml").mkdir()
    yield
    for name in ("raising", "unfinished", "importing", "mine"):
        sys.modules.pop(name, None)


def refusal(arguments, capsys):
    """The one line that a command prints when it refuses."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert len(line) < 400
    assert "Traceback" not in line
    assert line == f"{stop.value}\n"
    return line.removeprefix("error: ").rstrip("\n")


WRONG_COMMANDS = [
    (["trian"], f"Expected a command, one of {', '.join(COMMANDS)}, but got 'trian'."),
    (["comparre"], "but got 'comparre'. Did you mean 'compare'?"),
    (["FIT"], "Did you mean 'fit'?"),
    (["--nope"], "but got '--nope'."),
    (["help", "compar"], "Did you mean 'compare'?"),
    (["completion"], "Expected `completion` to be followed by one of bash, zsh, fish, but got nothing."),
    (["completion", "powershell"], "one of bash, zsh, fish, but got 'powershell'."),
]

WRONG_OPTIONS = [
    (["validate"], "`validate` needs a checkpoint: give --ckpt_path PATH."),
    (["fit", "--nope"], "There is no option `--nope`."),
    (["test", "--modle.tta=hflip"], "There is no option `--modle.tta`. Did you mean '--model.tta'?"),
    ([*FIT, "surplus"], "Expected options that begin with --, but got 'surplus'."),
    # The shell has replaced a pattern by two names.
    ([*FIT, "--ckpt_path", "a.ckpt", "b.ckpt"], "but got 2 files: 'a.ckpt', 'b.ckpt'."),
    # An abbreviation was taken for the option in silence.
    ([*FIT, "--trainer.max_epoch=3"], "There is no option `--trainer.max_epoch`. Did you mean '--trainer.max_epochs'?"),
    ([*FIT, "--trainer.max_epochs=abc"], "Expected `--trainer.max_epochs` to be int or null, but got 'abc'."),
    (["fit", "--trainer.max_epochs"], "`--trainer.max_epochs` needs a value."),
    ([*FIT, "--seed_everything=abc"], "Expected `--seed_everything` to be bool or int, but got 'abc'."),
    ([*FIT, "--trainer.precision=17"], "Expected `--trainer.precision` to be one of 64, 32, 16 or"),
    ([*FIT, "--trainer.devices=abc"], "`devices` selected with `CPUAccelerator`"),
    ([*FIT, "--trainer.accelerator=nope"], "`accelerator='nope'`"),
    ([*FIT, "--trainer.strategy=nope"], "`strategy='nope'`"),
    ([*FIT, "--data.seed=abc"], "Expected `--data.seed` to be int, but got 'abc'."),
    ([*FIT, "--model.tta=vflip"], "Expected `--model.tta` to be one of 'none', 'hflip', but got 'vflip'."),
    ([*FIT, "--model.step_options.passes=all"], "Expected `--model.step_options.passes` to be one of 'auto'"),
    ([*FIT, "--model.step_options.passses=full"], "Did you mean '--model.step_options.passes'?"),
    ([*FIT, "--model.many_above=many"], "Expected `--model.many_above` to be int, but got 'many'."),
    ([*COMPARE, "--nope=1"], "There is no option `--nope`."),
    ([*COMPARE, "--seed=1"], "There is no option `--seed`. Did you mean '--seeds'?"),
    ([*COMPARE, "surplus"], "but got 'surplus'."),
    (["compare", "--seeds=abc"], "Expected `--seeds` to be int, but got 'abc'."),
    (["compare", "--seeds=0"], "Expected argument `seeds` to be an integer from 1 to 10000, but got 0."),
    (["compare", "--seeds"], "`--seeds` needs a value."),
    (["compare", "--methods=ERM,Sam"], "each once, but got 'ERM,Sam'. Did you mean 'SAM'?"),
    (["compare", "--methods=ERM,SSE-SAM"], "Did you mean 'SSESAM'?"),
    ([*COMPARE, "--gamma=2"], "Expected argument `gamma` to be a number strictly between 0 and 1, but got 2.0."),
    ([*COMPARE, "--epochs=1.5"], "Expected `--epochs` to be int, but got '1.5'."),
    ([*COMPARE, "--threads=x"], "Expected `--threads` to be int, but got 'x'."),
    ([*COMPARE, "--trainer=3"], "Expected `--trainer` to be a mapping or null, but got '3'."),
    ([*COMPARE, "--trainer.devices=4"], "Expected argument `trainer` to be settings with a single device"),
    ([*COMPARE, "--trainer.precision=17"], "Precision 17 is invalid."),
    ([*COMPARE, "--trainer.accelerator=nope"], "`accelerator='nope'`"),
    ([*COMPARE, "--optimizer.lr=abc"], "Expected `--optimizer.lr` to be float, but got 'abc'."),
    ([*COMPARE, f"--seeds={10**20}"], "Expected argument `seeds` to be an integer from 1 to 10000, but got 1000"),
    ([*COMPARE, "--jobs=10001"], "Expected argument `jobs` to be an integer from 1 to 10000, but got 10001."),
    ([*SWEEP, "--trials=10001"], "Expected argument `trials` to be an integer from 1 to 10000, but got 10001."),
    ([*COMPARE, "--output="], "Expected `--output` to be a folder, but got nothing."),
    ([*SWEEP, "--output", ""], "Expected `--output` to be a folder, but got nothing."),
    (["curvature", "x.ckpt", "--output="], "Expected `--output` to be a folder, but got nothing."),
    ([*COMPARE, "--output=/"], "Expected argument `output` to be a folder in another one, but got '/'."),
    ([*COMPARE, f"--output={'x' * 300}"], "(File name too long), but got 'xxx"),
    ([*COMPARE, "--output=file"], "Expected argument `output` to be a folder that can be made"),
    (
        [*SWEEP, "--metric=nope"],
        "Expected `--metric` to be one of 'all', 'tail', 'mean_of_head_and_tail', but got 'nope'.",
    ),
    ([*SWEEP, "--head_rho=3"], "Expected `--head_rho` to be a list, but got '3'."),
    ([*SWEEP, "--head_rho=[1,2,3]"], "Expected `--head_rho` to be a list of 2 values, but got '[1, 2, 3]'."),
    ([*SWEEP, "--prune=maybe"], "Expected `--prune` to be bool, but got 'maybe'."),
    ([*SWEEP, "--trial=3"], "Did you mean '--trials'?"),
    (["curvature"], "Expected one or more checkpoints, but got none."),
    (["curvature", "--points=abc", "x.ckpt"], "Expected `--points` to be int, but got 'abc'."),
    (
        ["curvature", "x.ckpt", "--dtype=float16"],
        "Expected `--dtype` to be one of 'float32', 'float64', but got 'float16'.",
    ),
    (["curvature", "x.ckpt", "--landscap=false"], "Did you mean '--landscape'?"),
    (["curvature", "x.ckpt", "--device=nope"], "Expected argument `device` to be 'auto' or a device of this machine"),
]

WRONG_CLASSES = [
    (
        [*FIT, "--model.objective=Sam"],
        "or the path of a class, but got 'Sam'. Did you mean 'SAM'?",
    ),
    ([*FIT, "--model.objective=SAM", "--model.objective.rh=1"], "Did you mean '--model.objective.rho'?"),
    (
        [*FIT, "--model.objective=SAM", "--model.objective.rho=abc"],
        "Expected `--model.objective.rho` to be float, but got 'abc'.",
    ),
    (
        [*FIT, "--model.loss=lightning_ssesam.losses.LDAM"],
        "but got 'lightning_ssesam.losses.LDAM': module 'lightning_ssesam.losses' has no attribute 'LDAM'. "
        "Did you mean 'lightning_ssesam.losses.LDAMLoss'?",
    ),
    (
        [*FIT, "--model.loss=LDAMLos"],
        "Expected `--model.loss` to be one of AsymmetricLoss, BalancedSoftmaxLoss, BinaryCrossEntropyLoss, ",
    ),
    ([*FIT, "--model.loss=LDAMLos"], ", VSLoss, or the path of a class, but got 'LDAMLos'. Did you mean 'LDAMLoss'?"),
    (
        [*FIT, "--model.loss=missing.Loss"],
        "Expected `--model.loss` to be a class that can be imported, but got 'missing.Loss'",
    ),
    ([*FIT, "--model.optimizer=SDG"], "but got 'SDG'. Did you mean 'SGD'?"),
    ([*FIT, "--model.optimizer=SGD", "--model.optimizer.momentun=1"], "Did you mean '--model.optimizer.momentum'?"),
    ([*FIT, "--model.scheduler=StepLR"], "`--model.scheduler StepLR` needs `--model.scheduler.step_size`."),
    (
        [*FIT, "--model.scheduler=StepLr"],
        "Expected `--model.scheduler` to be the path of a class, but got 'StepLr'. Did",
    ),
    ([*FIT, "--trainer.callbacks=StageSwich"], "Did you mean 'StageSwitch'?"),
    ([*FIT, "--trainer.callbacks=EarlyStoping"], "Did you mean 'EarlyStopping'?"),
    (
        [*FIT, "--trainer.callbacks=StageSwitch", "--trainer.callbacks.att=0.5"],
        "Did you mean '--trainer.callbacks.at'?",
    ),
    ([*FIT, "--trainer.logger=CVSLogger"], "Did you mean 'CSVLogger'?"),
    ([*FIT, "--data=SmallConvNet"], f"Expected `--data` to be one of {DATA}, or the path of a class"),
    ([*FIT, "--data=ImageFolderLT"], "`--data ImageFolderLT` needs `--data.root`."),
    (
        [*FIT, "--model.backbone=raising.Net"],
        "Cannot use `--model.backbone`: RuntimeError: out of coffee (raising.py, line 2).",
    ),
    ([*FIT, "--model.backbone", "raising.Net"], "Cannot use `--model.backbone`: RuntimeError: out of coffee"),
    ([*FIT, "--model.backbone=unfinished.Net"], "Cannot use `--model.backbone`: SyntaxError: "),
    ([*FIT, "--model.backbone=importing.Net"], "but got 'importing.Net': No module named 'missing_package'."),
    ([*FIT, "--model.backbone=mine.X"], "Expected `--model.backbone` to be a class or a function, but got 'mine.X'."),
    ([*FIT, "--model.backbone=mine.Picky"], "ValueError: a width of 3 is bad luck (mine.py, line 17)"),
    ([*FIT, "--model.backbone=mine.Broken"], "RuntimeError: shapes (mine.py, line 21)"),
    ([*COMPARE, "--backbone=mine.Broken"], "RuntimeError: shapes (mine.py, line 21)"),
    ([*COMPARE, "--backbone=mine.Asserting"], "AssertionError (mine.py, line 25)"),
    ([*FIT, "--model.backbone=mine.Ending"], "Your code ended the program by sys.exit(0) (mine.py, line 29)."),
    ([*COMPARE, "--backbone=mine.Ending"], "Your code ended the program by sys.exit(0) (mine.py, line 29)."),
    ([*COMPARE, "--data=Nope"], f"Expected `--data` to be one of {DATA}, or the path of a class, but got 'Nope'."),
    ([*COMPARE, "--data.seeed=1"], "DigitsLT has no argument `--data.seeed`. Did you mean '--data.seed'?"),
    ([*COMPARE, "--data=ImageFolderLT"], "`--data ImageFolderLT` needs `--data.root`."),
    ([*COMPARE, "--data=ImageFolderLT", "--data.root=nowhere"], "Expected argument `root` to be a folder"),
    (
        [*COMPARE, "--backbone=timm"],
        f"one of {NETWORKS}, or the path of a class, but got 'timm'. Did you mean 'TimmModel'?",
    ),
    (
        [*COMPARE, "--backbone.widht=3"],
        "SmallConvNet has no argument `--backbone.widht`. Did you mean '--backbone.width'?",
    ),
    (
        [*COMPARE, "--loss=LDAM"],
        f"Expected `--loss` to be one of {LOSSES}, or the path of a class, but got 'LDAM'. Did you",
    ),
    (
        [*COMPARE, "--loss=torch.nn.functional.cross_entropy"],
        "`--loss`: Expected 'torch.nn.functional.cross_entropy' to be",
    ),
    ([*COMPARE, "--optimizer=AdamW", "--optimizer.momentum=1"], "AdamW has no argument `--optimizer.momentum`."),
    ([*COMPARE, "--backbone=mine.Nett"], "module 'mine' has no attribute 'Nett'. Did you mean 'mine.Net'?"),
    ([*COMPARE, "--backbone=mine.Net"], "`--backbone Net` needs `--backbone.width`."),
    ([*COMPARE, "--backbone=mine.Untyped"], "'width' from 'mine.Untyped.__init__' does not specify a type."),
    (
        [*COMPARE, "--backbone=mine.number"],
        "`--backbone`: Expected 'mine.number' to be a function that returns Module.",
    ),
    ([*COMPARE, "--backbone=mine.Picky"], "ValueError: a width of 3 is bad luck (mine.py, line 17)"),
    (
        [*COMPARE, "--backbone=raising.Net"],
        "Cannot use `--backbone`: RuntimeError: out of coffee (raising.py, line 2).",
    ),
    (["compare", "--config=unknown_class.yaml"], "but got 'DigitLT'. Did you mean 'DigitsLT'?"),
]

WRONG_FILES = [
    ("malformed.yaml", "'malformed.yaml' is none: expected ',' or ']', but got ':', line 2."),
    ("latin.yaml", "'latin.yaml' is none: its byte 7 is not UTF-8."),
    ("empty.yaml", "'empty.yaml' has nothing."),
    ("comment.yaml", "'comment.yaml' has nothing."),
    ("list.yaml", "'list.yaml' has a list."),
    ("number.yaml", "'number.yaml' has a single value."),
    ("twice.yaml", "'twice.yaml' has `seeds` twice in one place (line 3)."),
    ("deep_twice.yaml", "'deep_twice.yaml' has `seed` twice in one place (line 3)."),
    ("tabs.yaml", "found character '\\t' that cannot start any token, line 2."),
    ("binary.yaml", "special characters are not allowed."),
    ("tag.yaml", "could not determine a constructor for the tag"),
    ("alias.yaml", "found undefined alias 'nope', line 1."),
    ("deep.yaml", "'deep.yaml' is none"),
    ("bomb.yaml", "'bomb.yaml' is none: its aliases stand for more than 100,000 values."),
    ("circle.yaml", "'circle.yaml' is none: a part contains itself, line 1."),
    ("key.yaml", "'key.yaml' is none: found unhashable key, line 1."),
    ("folder.yaml", "'folder.yaml' is none: Is a directory."),
    ("missing.yaml", SHIPPED),
    pytest.param("x" * 5000, SHIPPED, id="long name"),
    ("", "Expected `--config` to be a YAML file"),
]

WRONG_CONFIGURATIONS = [
    (["fit", "--config"], "`--config` needs a value."),
    (["compare", "--config"], "`--config` needs a value."),
    (["fit", "--config=digits"], f"{SHIPPED} {', '.join(SHIPPED_FITS)}, but got 'digits'. Did you mean 'digits_lt'?"),
    (["compare", "--config=compare_cifar"], "Did you mean 'compare_cifar10_lt'?"),
    (
        ["compare", "--config", "digits_lt"],
        f"{SHIPPED} {', '.join(SHIPPED_COMPARISONS)}, but got 'digits_lt'.",
    ),
    (["sweep", "--config=digits_lt"], "Expected `--config` to be a YAML file, but got 'digits_lt'."),
    (
        ["fit", "-c", "options.yaml"],
        "'options.yaml' is a comparison of several methods. Choose one with --method: ERM,",
    ),
    (["compare", "--config=fit.yaml"], "Expected argument `model` to be arguments of LongTailClassifier"),
    (
        ["compare", "--config=unknown.yaml"],
        "The configuration has `sedes`, but there is no option of this name. Did you",
    ),
    (["compare", "--config=nested.yaml"], "DigitsLT has no argument `--data.sed`. Did you mean '--data.seed'?"),
    (["compare", "--config=method.yaml"], "objectiv"),
    (["compare", "--config=no_data.yaml"], "Expected argument `data` to be a class or a function, but got None."),
    (["compare", "--config=no_backbone.yaml"], "argument `backbone` to be a class or a function, but got None."),
    (["compare", "--config=no_optimizer.yaml"], "argument `optimizer` to be a class or a function, but got None."),
    (["compare", "--config=no_output.yaml"], "Expected `--output` to be a folder, but got nothing."),
    (["fit", "--config=long_names.yaml"], "Choose one with --method: xxx"),
    (["fit", "--config=long_names.yaml", "--method=y"], "Expected argument `method` to be one of 'xxx"),
    (["fit", "--config=long_names.yaml", f"--method={'y' * 500}"], "Expected argument `method` to be one of 'xxx"),
    (["curvature", "text.ckpt", "--config=fit.yaml"], "'text.ckpt' is no checkpoint of `lightning-ssesam fit`."),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), [*WRONG_COMMANDS, *WRONG_OPTIONS, *WRONG_CLASSES, *WRONG_CONFIGURATIONS]
)
def test_a_refusal_is_one_line(arguments, expected, capsys):
    assert expected in refusal(arguments, capsys)


ALONE = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
WRONG_TRAININGS = [
    (["--trainer.check_val_every_n_epoch=0"], "`check_val_every_n_epoch` to be an integer >= 1, but got 0."),
    (["--trainer.accumulate_grad_batches=0"], "`accumulate_grad_batches` to be an integer >= 1, but got 0."),
    (["--model.optimizer.lr=-1"], "Invalid learning rate: -1"),
    (["--model.scheduler=OneCycleLR", "--model.scheduler.max_lr=0.1"], "You must define either total_steps OR"),
    (["--model.backbone=mine.Empty"], "optimizer got an empty parameter list"),
    (["--model.backbone=torch.nn.Identity"], "`backbone` to be a network with logits (N, 10)"),
    (["--model.backbone=torchvision.models.squeezenet1_1"], "for inputs of shape (1, 8, 8), but got"),
    (["--model.loss=mine.Reduced"], "`loss` to be a module that returns a loss for each sample"),
    (["--model.loss=torch.nn.MSELoss", "--model.loss.reduction=none"], "an output of shape (1, 10) for one sample."),
    (["--ckpt_path=hpc"], "Cannot load the checkpoint 'hpc': "),
    (["--ckpt_path=s3://foo/bar.ckpt"], "Cannot load the checkpoint 's3://foo/bar.ckpt': "),
    (["--data.seed=99999999999999999999999"], "`seed` to be an integer of at most 64 bits, but got"),
    (["--trainer.default_root_dir=file/runs"], "Cannot make the folder 'file/runs' of the run: Not a directory."),
]


@pytest.mark.parametrize(("options", "expected"), WRONG_TRAININGS)
def test_what_would_fail_in_the_training_is_refused_before(options, expected, capsys):
    assert expected in refusal([*FIT, *ALONE, *options], capsys)


@pytest.mark.parametrize("command", ["test", "validate"])
@pytest.mark.parametrize("options", [[], ALONE])
def test_an_untrained_network_is_not_evaluated(command, options, capsys):
    line = refusal([command, *FIT[1:], *options, "--ckpt_path=last"], capsys)
    assert f"`{command} --ckpt_path last`: there is no checkpoint in '" in line


def test_the_last_checkpoint_is_found_without_a_logger(monkeypatch):
    for name in ("last.ckpt", "later.ckpt"):
        Path("checkpoints").mkdir(exist_ok=True)
        Path("checkpoints", name).touch()
    seen = []

    def test(self, model, datamodule, ckpt_path: str | None = None):
        seen.append(ckpt_path)

    monkeypatch.setattr("lightning.pytorch.Trainer.test", test)
    main(["test", *FIT[1:], *ALONE, "--ckpt_path=last"])
    assert seen == [str(Path("checkpoints/last.ckpt").absolute())]


def test_the_checks_before_a_training_change_no_number(monkeypatch):
    """Not even if the data sets are drawn from the global random state."""

    def numbers():
        weights = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning.pytorch.Trainer.fit", lambda *args, **options: trained(weights, *args, **options))
            main([*FIT, *ALONE, "--data=test_refusals.Drawn"])
        return weights

    def trained(weights, trainer, model, datamodule, **_):
        datamodule.prepare_data()
        datamodule.setup("fit")
        weights += [*model.state_dict().values(), datamodule.noise, torch.rand(3), torch.tensor(random.random())]
        weights += [torch.tensor([module.training for module in model.modules()])]

    with_checks = numbers()
    monkeypatch.setattr("lightning_ssesam.experiments.training_commands.TrainingCLI._check_training", lambda self: None)
    for found, expected in zip(with_checks, numbers(), strict=True):
        assert torch.equal(found, expected)


class Drawn(DigitsLT):
    """A data module that draws from the global random states."""

    def make_sets(self):
        self.noise = torch.randn(3)
        return super().make_sets()


@pytest.mark.parametrize("command", ["fit", "compare"])
@pytest.mark.parametrize(("name", "expected"), WRONG_FILES)
def test_a_file_that_is_no_configuration(name, expected, command, capsys):
    assert expected in refusal([command, f"--config={name}"], capsys)
    assert not Path("hacked").exists()


def test_a_file_without_permission(monkeypatch, capsys):
    def read(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", read)
    assert "'fit.yaml' is none: Permission denied." in refusal(["fit", "--config=fit.yaml"], capsys)


@pytest.mark.parametrize("name", ["text.ckpt", "empty.ckpt", "truncated.ckpt", "foreign.ckpt", "missing.ckpt"])
@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_file_that_is_no_checkpoint(name, command, capsys):
    torch.save({"a": torch.ones(100)}, "foreign.ckpt")
    Path("truncated.ckpt").write_bytes(Path("foreign.ckpt").read_bytes()[:300])
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--seed_everything=0"]
    line = refusal([command, *FIT[1:], *quiet, "--trainer.enable_progress_bar=false", f"--ckpt_path={name}"], capsys)
    assert name in line
    assert "checkpoint" in line.lower()


def fails(error):
    def fail(*_, **__):
        raise error

    return fail


def test_no_network(monkeypatch, capsys):
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fails(URLError("Name not known")))
    line = refusal([*COMPARE, "--data=CIFAR10LT", "--data.root=images", "--backbone.in_channels=3"], capsys)
    assert line == "Cannot download: <urlopen error Name not known> Check the network, or put the files there yourself."


def test_a_full_disk_during_training(monkeypatch, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "comparison/results.csv")
    monkeypatch.setattr("lightning_ssesam.experiments.experiment.Experiment.run", fails(full))
    with pytest.raises(SystemExit):
        main(COMPARE)
    # The progress stands above.
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: Cannot write 'comparison/results.csv': No space left on device."


@pytest.mark.parametrize(("package", "arguments"), [("timm", [*COMPARE, "--backbone=TimmModel", "--backbone.name=x"])])
def test_a_package_that_is_not_installed(package, arguments, monkeypatch, capsys):
    import_module = builtins.__import__

    def find(name, *others, **options):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return import_module(name, *others, **options)

    monkeypatch.setattr(builtins, "__import__", find)
    assert f"pip install {package}" in refusal(arguments, capsys)


@pytest.mark.parametrize(
    ("option", "flags", "expected"),
    [
        ("logger", "lightning.fabric.loggers.tensorboard._TENSORBOARD", "TensorBoardLogger: Neither `tensorboard` nor"),
        ("callbacks", "lightning.pytorch.callbacks.progress.rich_progress._RICH", "RichProgressBar: `RichProgressBar`"),
    ],
)
@pytest.mark.parametrize("sign", ["=", "+="])
def test_a_part_of_the_trainer_needs_a_package(option, flags, expected, sign, monkeypatch, capsys):
    """An option that takes a class or a list of classes says what the class says, as one that takes a class does."""
    monkeypatch.setattr(f"{flags}_AVAILABLE", False)
    monkeypatch.setattr(f"{flags}X_AVAILABLE", False, raising=False)
    name = expected.partition(":")[0]
    arguments = [*FIT, f"--trainer.{option}{sign}{name}"]
    if option == "logger":
        arguments.append("--trainer.logger.save_dir=runs")
    line = refusal(arguments, capsys)
    assert line.startswith(expected)
    assert "pip install" in line
    assert "subtypes" not in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [FIT, COMPARE])
@pytest.mark.parametrize(("name", "expected"), [("cuda", "`CUDAAccelerator` can not run"), ("gpu", "No supported gpu")])
def test_a_gpu_that_is_not_there(name, expected, command, capsys):
    assert expected in refusal([*command, f"--trainer.accelerator={name}"], capsys)


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("shapes"), AttributeError("y"), ZeroDivisionError(), AssertionError()]
)
def test_errors_of_the_users_code_before_training_are_one_line(error, capsys):
    with pytest.raises(SystemExit), without_traceback():
        raise error
    assert capsys.readouterr().err.startswith(f"error: {type(error).__name__}")


def test_errors_of_the_users_code_in_training_keep_their_traceback(monkeypatch):
    for error in (KeyError("x"), ValueError("y")):
        monkeypatch.setattr("lightning_ssesam.experiments.experiment.Experiment.run", fails(error))
        with pytest.raises(type(error)), without_traceback():
            compare("ERM", seeds=1, epochs=1)


@pytest.mark.parametrize("options", [["--help"], ["--print_config"], ["--backbone.help=SmallConvNet"]])
def test_help_ends_with_status_0(options, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *options])
    assert stop.value.code == 0
    assert capsys.readouterr().err == ""


def test_an_error_of_the_project_keeps_its_traceback(monkeypatch):
    """A wrong value inside the project is no wrong argument."""
    monkeypatch.setattr("lightning_ssesam.experiments.recipe.inspect", None)
    with pytest.raises(AttributeError):
        main(COMPARE)


def test_a_refusal_with_several_lines_is_joined(capsys):
    with pytest.raises(SystemExit, match=r"^error: one two$"):
        refuse("one\n   two\n")
    assert capsys.readouterr().err == "error: one two\n"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("something that no pattern knows\n  on two lines", "something that no pattern knows on two lines"),
        ('Parser key "a.b": odd', "`--a.b`: odd"),
        ('Parser key "a": ' + "x" * 2000, f"`--a`: {'x' * 297}..."),
    ],
)
def test_messages_that_are_not_known(message, expected):
    assert shorten(message, ["--a"]) == expected


def held(end):
    """What is shown of a message and a warning that come before ``end``."""
    shown, handler = [], logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with held_back() as release:
                logging.getLogger("lightning.pytorch.x").warning("first")
                warnings.warn("second", UserWarning, stacklevel=1)
                assert (shown, caught) == ([], [])
                end(release)
                assert shown == ["first"]
                logging.getLogger("lightning.pytorch.x").warning("third")
    except ZeroDivisionError:
        pass
    finally:
        # As at the end of Python.
        for living in (reference() for reference in logging._handlerList):
            if isinstance(living, MemoryHandler):
                living.flush()
        assert handler in logger.handlers
        logger.removeHandler(handler)
    return shown, [str(warning.message) for warning in caught]


def test_what_comes_before_a_refusal_is_not_shown():
    assert held(lambda release: release()) == (["first", "third"], ["second"])
    assert held(lambda _: 1 / 0) == ([], [])


def test_guesses():
    assert closest("sam", ["ERM", "SAM", "SSESAM"]) == "SAM"
    assert closest("LDAM", known_classes("loss")) == "LDAMLoss"
    assert closest("zzz", known_classes("loss")) is None
    assert known_classes("model.tta") == ()


# The working folder.

MODULE = """
import torch
from lightning_ssesam.models import SmallConvNet

class MyNet(SmallConvNet):
    def __init__(self, num_classes: int):
        super().__init__(num_classes, width=8)
"""


def test_classes_in_the_working_folder():
    """By the installed program; a file of the folder takes the place of no module."""
    Path("my_networks.py").write_text(MODULE)
    for name in ("random", "json", "yaml", "tqdm"):
        Path(f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    command = [Path(sys.executable).parent / "lightning-ssesam", "compare", "--backbone=my_networks.MyNett"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    # The module was found, and the line is all that the program prints.
    assert done.stderr.endswith("module 'my_networks' has no attribute 'MyNett'. Did you mean 'my_networks.MyNet'?\n")
    assert done.stderr.count("\n") == 1


def test_processes_find_the_classes_in_the_working_folder(monkeypatch):
    """As the workers of `compare --jobs 2`: a function is sent to them by its module and its name."""
    Path("in_folder.py").write_text("def answer():\n    return 42\n")

    def run(options):
        answer = importlib.import_module("in_folder").answer
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            print(executor.submit(answer).result())

    monkeypatch.setitem(COMMANDS, "sweep", (run, ""))
    main(["sweep"])
    sys.modules.pop("in_folder")


def test_the_working_folder_is_searched_last_and_for_a_command_alone(monkeypatch, tmp_path):
    seen, before = [], list(sys.path)
    monkeypatch.setitem(COMMANDS, "sweep", (lambda _: seen.append(list(sys.path)), ""))
    main(["sweep"])
    assert seen == [[*before, str(tmp_path)]]
    assert sys.path == before
