"""Small models and the plain versions that the project is held against."""

import copy
import csv
import functools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities import registry
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

import lightning_ssesam
from lightning_ssesam import ERM, SAM, SSESAM, ClassSplit, ImbSAM, SharpnessAwareMixin, StepOptions, Term
from lightning_ssesam.cli import main
from lightning_ssesam.engine import MicroBatch, SharpnessEngine

# Warnings that the project raises are errors, but for one that most of these short runs do not mind.
STRICT = pytest.mark.filterwarnings("error:::lightning_ssesam", "ignore:.*stays in stage 1")

REFERENCE = Path(__file__).parent / "reference"
_SHIPPED = sorted(path.stem for path in Path(lightning_ssesam.__file__).parent.joinpath("configs").glob("*.yaml"))
SHIPPED_COMPARISONS = [name for name in _SHIPPED if name.startswith("compare_")]
SHIPPED_FITS = [name for name in _SHIPPED if name not in SHIPPED_COMPARISONS]
SPLIT = ClassSplit([50, 40, 30, 6, 5], tail=[3, 4])


def trial_rows():
    with Path("sweep/trials.csv").open() as file:
        return list(csv.DictReader(file))


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))


def convbn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def stage_2(objective):
    objective.stage = 2
    return objective


class ThreeRadii(ERM):
    """An objective of somebody's own: overlapping terms, two of them plain, two perturbed."""

    def terms(self, targets):
        n = max(targets.shape[0], 1)
        weights = torch.linspace(0.0, 1.0, targets.shape[0]) / n
        return Term(weights, 0.0), Term(1 / n - weights, 0.03), Term(weights.flip(0), 0.2), Term(weights / 2, 0.0)


OBJECTIVES = {
    "ERM": lambda: ERM(),
    "SAM": lambda: SAM(0.05),
    "ImbSAM": lambda: ImbSAM(SPLIT, 0.05),
    "ImbSAM double": lambda: ImbSAM(SPLIT, 0.05, tail_weight=2.0),
    "ImbSAM group": lambda: ImbSAM(SPLIT, 0.05, reduction="group"),
    "SSESAM 1": lambda: SSESAM(SPLIT, 0.05, 0.1),
    "SSESAM 2": lambda: stage_2(SSESAM(SPLIT, 0.05, 0.1)),
    "SSESAM joint 1": lambda: SSESAM(SPLIT, 0.05, 0.1, first_stage="joint"),
    "SSESAM joint 2": lambda: stage_2(SSESAM(SPLIT, 0.05, 0.1, first_stage="joint")),
    "SSESAM head_rho=0": lambda: SSESAM(SPLIT, 0.0, 0.1),
    "own": ThreeRadii,
}


def classification_batch(n=24, shape=(8,), classes=range(5)):
    return torch.randn(n, *shape), torch.tensor(list(classes))[torch.randint(len(classes), (n,))]


def batches(number=6, n=24, shape=(8,), **kwargs):
    return [classification_batch(n, shape, **kwargs) for _ in range(number)]


def sample_losses_of(net, inputs, targets):
    """What the engine calls, for a plain network."""

    def sample_losses(index, is_clean):
        x, y = (inputs, targets) if index is None else (inputs[index], targets[index])
        return F.cross_entropy(net(x), y, reduction="none")

    return sample_losses


def compute(sample_losses, terms, parameters, *args, engine=None, **kwargs):
    """One step of the engine with the whole batch at once; returns its mean loss."""
    batch = [MicroBatch(sample_losses, terms)]
    return (engine or SharpnessEngine()).compute(batch, parameters, *args, **kwargs).loss


def engine_gradient(net, terms, inputs, targets, passes="full"):
    net = copy.deepcopy(net)
    compute(sample_losses_of(net, inputs, targets), terms, net.parameters(), net, passes=passes)
    return [p.grad for p in net.parameters()]


def _from_method_page():
    """The plain version that docs/method.md shows: the definition, one term after the other, with nothing shared."""
    page = (Path(__file__).parent.parent / "docs" / "method.md").read_text()
    (code,) = re.findall(r"```python\n((?:(?!```).)*def naive_gradient.*?)```", page, re.DOTALL)
    names = {"torch": torch}
    exec(code, names)
    return names["naive_gradient"]


naive_gradient = _from_method_page()


class Model(SharpnessAwareMixin, L.LightningModule):
    """The module of the README, with the choices that tests need."""

    def __init__(self, net=None, objective=None, passes="auto", optimizer=None, scheduler=None):
        super().__init__()
        self.net = mlp() if net is None else net
        self.objective = ERM() if objective is None else objective
        self.step_options = StepOptions(passes=passes)
        self.make_optimizer = optimizer or sgd
        self.make_scheduler = scheduler

    def sample_losses(self, batch):
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs), targets, reduction="none")

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        return optimizer if self.make_scheduler is None else self.make_scheduler(optimizer)


def choose(model, **options):
    """Change some of a module's step options."""
    model.step_options = replace(model.step_options, **options)


class Automatic(L.LightningModule):
    """The same module under Lightning's automatic optimization."""

    def __init__(self, net=None, optimizer=None, scheduler=None):
        super().__init__()
        self.net = mlp() if net is None else net
        self.make_optimizer = optimizer or sgd
        self.make_scheduler = scheduler

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = F.cross_entropy(self.net(inputs), targets)
        self.log("train/loss", loss)
        return loss

    configure_optimizers = Model.configure_optimizers


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3)


def trainer(**kwargs):
    options = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**options, **kwargs})


def batches_loader(batches):
    """A loader that yields the given batches in their order."""
    return DataLoader(batches, batch_size=None)


def fit(model, batches, val=None, ckpt_path=None, **kwargs):
    run = trainer(**kwargs)
    run.fit(model, batches_loader(batches), val, ckpt_path=ckpt_path)
    return run


def clones(tensors):
    return [None if t is None else t.detach().clone() for t in tensors]


def assert_same_bits(actual, expected):
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert torch.equal(a, e)


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Killed


def planned_runs(monkeypatch, *commands):
    """What ``lightning-ssesam compare`` would train for each of several lists of options, one after the other."""
    planned = []

    def stop(tasks, *_):
        planned.extend(tasks)
        raise SystemExit

    monkeypatch.setattr("lightning_ssesam.experiments.compare.make_missing", stop)
    for module in ("CIFAR10LT", "CIFAR100LT"):
        monkeypatch.setattr(f"lightning_ssesam.data.{module}.prepare_data", lambda self: None)
    # The logger of a command may not be installed.
    monkeypatch.setattr("lightning_ssesam.experiments.logs._check_package", lambda logger: None)
    # It would read an image.
    monkeypatch.setattr("lightning_ssesam.experiments.experiment.Experiment.check_network", lambda self, data: None)
    for options in commands:
        with pytest.raises(SystemExit):
            main(["compare", *options])
    return planned


def running(session):
    """The commands of a session that run. A zombie has ended, and waits for its parent to see it."""
    listed = subprocess.run(["ps", "-A", "-o", "sess=,stat=,args="], capture_output=True, text=True, check=True).stdout
    fields = [line.split(None, 2) for line in listed.splitlines()]
    return [command for found, state, command in fields if found == str(session) and not state.startswith("Z")]


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Starts processes that need not import torch, Lightning and the project: a server has imported them once, and forks. It
# has run nothing that cannot be forked.
IMPORTED = multiprocessing.get_context("forkserver")
IMPORTED.set_forkserver_preload(["lightning_ssesam.cli"])


def start_process(function, *args, folder=".", log=os.devnull):
    """Call a function in a process of its own, in a folder, with what it prints in a file."""
    process = IMPORTED.Process(target=_call_in, args=(os.path.abspath(folder), os.path.abspath(log), function, args))
    process.start()
    return process


def _call_in(folder, log, function, args):
    os.chdir(folder)
    with open(log, "wb") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    torch.set_num_threads(1)
    with found_once():
        function(*args)


@contextmanager
def found_once():
    """Keep what is the same each time: the plugins of a Trainer, which it looks for in all installed packages.

    Keep no seeds for accelerators that are not there: torch writes down the stack of each, for half a millisecond.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        for accelerator in (torch.cuda, torch.xpu, torch.mtia):
            if not accelerator.is_available():
                patch.setattr(accelerator, "manual_seed_all", lambda seed: None, raising=False)
        yield


def main_without(packages, options):
    """Run a command that must not import some packages, in a process that begins without them."""
    main(options)
    assert not (found := packages & set(sys.modules)), found


NEEDS_BROWSER = pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs Chromium and its driver")


@contextmanager
def open_browser(profile, *arguments):
    """A headless browser, to which whatever is fetched from elsewhere is refused, and so an error."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    quiet = "headless no-sandbox disable-gpu disable-background-networking disable-component-update no-first-run"
    own = ("disable-dev-shm-usage", "proxy-server=http://127.0.0.1:9", f"user-data-dir={profile}")
    for argument in (*quiet.split(), *own, *arguments):
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def show_as(browser, width, dark):
    """Make the window so many pixels wide, and a phone's where that is few; ask pages for their dark colours or not."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def colors_in(browser):
    """The brightness of the page's ground and of its text, from 0 to 765."""
    style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    return [sum(int(part) for part in re.findall(r"\d+", color)[:3]) for color in browser.execute_script(style)]


def errors_in(browser):
    """What the pages since the last call complained of."""
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
