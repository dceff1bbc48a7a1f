"""The code in the README and the documentation runs, and does what it says beside it."""

import __future__

import ast
import contextlib
import copy
import functools
import inspect
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import test_ascent
import test_compare
import test_data
import test_losses
import test_metrics
import test_objectives
import test_rooms
import torch
import yaml
from helpers import OBJECTIVES, batches_loader, classification_batch, convbn, engine_gradient, mlp, planned_runs
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from lightning_ssesam import ERM, SAM, ClassSplit, DigitsLT, LongTailClassifier, ascent, losses, metrics, objectives
from lightning_ssesam.cli import COMMANDS, main
from lightning_ssesam.data import ImageList, digits, write_shards
from lightning_ssesam.experiments import figures, report
from lightning_ssesam.experiments.search_place import Place
from lightning_ssesam.losses import functional
from lightning_ssesam.models import SmallConvNet

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def code_of(name, without=()):
    """The blocks of a page, one after the other, but those with one of these texts."""
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    return "\n".join(textwrap.dedent(block) for block in blocks if not any(text in block for text in without))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_readme(monkeypatch, capsys):
    """The code trains, in a sixth of its epochs, and prints the accuracy of head and tail."""
    monkeypatch.setattr("lightning.Trainer.__init__", _quiet())
    names = {}
    exec(code_of("README.md").replace("max_epochs=60", "max_epochs=10"), names)
    assert names["trainer"].global_step == 10 * len(names["data"].train_dataloader()) == 90
    assert names["model"].objective.stage == 2
    assert len(torch.where(names["split"].tail)[0]) == 6
    accuracy = names["accuracy"].compute()
    assert capsys.readouterr().out.splitlines() == [str(accuracy)]
    assert accuracy["head"] > 0.9
    assert accuracy["tail"] > 0.2


def readme_names():
    """The names that the README's code defines, without the training."""
    names = {}
    exec(code_of("README.md").partition("trainer.fit")[0], names)
    return names


def test_map_of_the_files():
    """CONTRIBUTING.md lists every file or its folder, in an order in which imports lead up the table."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| files | what they do |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([\w./]+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    row_of = {name.removesuffix(".py").strip("/"): number for number, row in enumerate(rows) for name in row}
    row_of = {name.removesuffix("__init__").strip("/"): number for name, number in row_of.items()}

    def entry(name):
        # The folder of the commands has too many files for one row.
        return name.replace(".", "/") if name.startswith("experiments") else name.partition(".")[0]

    assert set(row_of) == set(map(entry, test_rooms.SOURCES))
    # Two import paths that are documented lie in the folder of their former rooms.
    for name in set(test_rooms.SOURCES) - {"curvature.command", "curvature.checkpoints"}:
        for target in test_rooms.imports_of(name):
            if target.startswith("lightning_ssesam."):
                lower = entry(target.removeprefix("lightning_ssesam."))
                assert row_of[lower] <= row_of[entry(name)], f"{name} imports {target}"


# For each recipe: the modules that its blocks of code belong to, and what breaks it.
RECIPES = {
    "A method": (
        [objectives, test_objectives],
        {"Term(head / number, self.rho)": "Term(head / number, 0.0)", "(tail / number, 0": "(tail / number, 1"},
    ),
    "An ascent": ([ascent, test_ascent], {"else g.sign() for g in gradient]": "else g.abs() for g in gradient]"}),
    "A data set": ([digits, test_data], {"remaining = remaining[others]": "pass"}),
    "A loss": ([functional, losses, test_losses], {"mean() / class_counts": "mean() * class_counts"}),
    "A metric": ([metrics, test_metrics], {"counts.min()": "counts.max()"}),
    "A figure": ([figures, figures, test_compare], {"np.mean": "np.max"}),
}


def try_recipe(name, changes, monkeypatch):
    """Run a recipe of CONTRIBUTING.md, and its test, with some of its text replaced."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition(f"\n### {name}\n")[2].partition("\n### ")[0]
    blocks, new = re.findall(r"```python\n(.*?)```", text, re.DOTALL), {}
    for module, code in zip(RECIPES[name][0], blocks, strict=True):
        for before, after in changes.items():
            code = code.replace(before, after)
        names = {**vars(helpers), "copy": copy, **vars(module), **new}
        if code.startswith("Figure("):
            monkeypatch.setattr(report, "FIGURES", (*report.FIGURES, eval(code, names)))
            continue
        known = set(names)
        # Annotations as strings, since some of the modules write them so.
        exec(compile(code, name, "exec", __future__.annotations.compiler_flag), names)
        for added in set(names) - known:
            new[added] = names[added]
            monkeypatch.setattr(module, added, names[added], raising=False)
    (test,) = [value for added, value in new.items() if added.startswith("test_")]
    with monkeypatch.context() as patch:
        test(*[patch] * len(inspect.signature(test).parameters))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, monkeypatch):
    """A recipe passes its test, and fails it when it is broken."""
    changes = RECIPES[name][1]
    assert all((ROOT / "CONTRIBUTING.md").read_text().count(text) == 1 for text in changes)
    with monkeypatch.context() as patch:
        try_recipe(name, {}, patch)
        if name == "A figure":
            test_compare.report_of([test_compare.made_up("ERM", 0)], test_compare.SPLIT)
            assert Path("seconds.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AssertionError):
        try_recipe(name, changes, monkeypatch)


def test_method(capsys):
    code = code_of("docs/method.md")
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == re.findall(r"^# (\[.*)$", code, re.MULTILINE)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("passes", ["full", "split"])
@pytest.mark.parametrize("objective", ["ERM", "SAM", "ImbSAM", "SSESAM 1", "SSESAM 2"])
def test_whole_method_in_25_lines(objective, passes):
    """The function of the page, run with the rest of it, gives the gradient of the engine."""
    names, code = {}, code_of("docs/method.md")
    exec(code, names)
    net, (x, y) = mlp(), classification_batch()
    terms = OBJECTIVES[objective]().terms(y)
    expected = names["naive_gradient"](net, terms, x, y)
    torch.testing.assert_close(engine_gradient(net, terms, x, y, passes), expected, rtol=0, atol=1e-14)
    (function,) = re.findall(r"^def naive_gradient.*?return total$", code, re.MULTILINE | re.DOTALL)
    assert len(function.replace("\n\n", "\n").splitlines()) <= 25


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_performance(capsys):
    names, code = readme_names(), code_of("docs/performance.md")
    exec(code, names)
    assert capsys.readouterr().out.splitlines() == re.findall(r"^ *# (.*)$", code, re.MULTILINE)
    model = names["Fast"](convbn(), ClassSplit.from_counts([500, 300, 200, 50, 20], tail_below=100))
    trainer = names["trainer"]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, batches_loader([classification_batch(shape=(3, 5, 5))]))
    assert trainer.global_step == 4


def test_toolkit(capsys):
    for name in ("train", "test"):
        for number in range(3):
            Path("images", name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(f"images/{name}/{number}.png")
        Path(f"{name}.txt").write_text("".join(f"{name}/{number}.png {number}\n" for number in range(3)))
    code = code_of("docs/toolkit.md")
    exec(code, {})
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    shown = [ast.literal_eval(line) for line in re.findall(r"^# (\[.*)$", code, re.MULTILINE)]
    assert [value for row in printed for value in row] == pytest.approx([value for row in shown for value in row])


@pytest.fixture
def _in_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-ssesam"])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("_in_a_terminal")
def test_from_a_folder_of_photos_to_a_report(capsys, monkeypatch):
    """The commands of the page, made shorter, on a folder of images; then what a browser would open is there."""
    monkeypatch.setattr(report, "FIGURES", report.FIGURES[:1])
    text = (ROOT / "docs" / "photos.md").read_text()
    commands = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    first, comparison, look, *_ = [line for line in commands if "install" not in line]
    generator = torch.Generator().manual_seed(0)
    for name, count, level in (("cat", 30, 60), ("dog", 12, 120), ("owl", 5, 180), ("yak", 1, 240)):
        Path("images", name).mkdir(parents=True)
        for number in range(count):
            noise = torch.randint(-40, 15, (40 + number, 44, 3), generator=generator)
            Image.fromarray((level + noise).to(torch.uint8).numpy()).save(f"images/{name}/{number}.png")
    short = ["--trainer={accelerator: cpu}", "--tail_below=10", "--jobs=1"]
    main([*first.split()[1:], *short])
    assert "first_look" in first
    assert Path("first_look/report.html").exists()
    main([*comparison.split()[1:], *short, "--epochs=1", "--seeds=1", "--methods=ERM,ERM + logit adjustment,SAM"])
    printed = capsys.readouterr().out
    shown = Path(look.split()[-1]).read_text()
    assert "ImageFolderLT: ERM, ERM + logit adjustment, SAM" in shown
    # 30, 12 and 5 images without those that validate and test, and the only yak.
    assert "34 of 4 classes, 21 of the largest and 1 of the smallest" in " ".join(shown.split())
    for warning in ("yak", "The training set is not fitted yet"):
        assert warning in printed
        assert warning in shown
    assert look.startswith("python -m webbrowser ")


@pytest.mark.usefixtures("_in_a_terminal")
def test_comparison_of_ones_own(monkeypatch):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/toolkit.md").read_text(), re.DOTALL)
    Path("mine.yaml").write_text(text)
    monkeypatch.setattr("lightning_ssesam.runs.Experiment.make_trainer", lambda *args: None)
    seen = planned_runs(monkeypatch, ["--config", "mine.yaml"])
    assert [(task.experiment.method, task.seed) for task in seen] == [
        (method, seed) for seed in range(3) for method in ("LDAM-DRW", "LDAM-DRW + SSE-SAM")
    ]
    model = seen[1][0].make_model(seen[1][0].data())
    callbacks = [type(callback).__name__ for callback in seen[1][0].make_callbacks(model)]
    assert callbacks == ["DeferredReweighting", "StageSwitch"]
    assert type(model.loss).__name__ == "LDAMLoss"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), target


def test_each_row_of_the_trainer_table_has_a_test():
    """trainer_features.yaml names a test, or a class or file of tests, for each row of the page, and nothing else."""
    text = (ROOT / "docs" / "trainer.md").read_text()
    table = text.partition("| feature |")[2].partition("\n\n")[0]
    features = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    tests = yaml.safe_load((ROOT / "tests" / "trainer_features.yaml").read_text())
    assert len(features) > 30
    assert features == list(tests)
    tree = functools.cache(lambda file: ast.parse((ROOT / "tests" / file).read_text()))
    for name in tests.values():
        file, *path = name.split("::")
        nodes = tree(file).body
        for part in path:
            (node,) = [node for node in nodes if getattr(node, "name", None) == part]
            nodes = node.body


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["Local", "Careful", "Curious"])
def test_trainer_page(name):
    names = readme_names()
    exec(code_of("docs/trainer.md"), names)
    model = names[name](mlp(), ClassSplit.from_counts([500, 300, 200, 50, 20], tail_below=100))
    trainer = names["trainer"]
    trainer.fit_loop.max_epochs = 10
    trainer.fit(model, batches_loader([classification_batch()]))
    extra = {
        "Local": set(),
        "Careful": {"train/skipped_updates"},
        "Curious": {"train/sharpness_tail", "train/grad_norm_head", "train/grad_norm_tail", "train/grad_norm"},
    }
    assert extra[name] <= set(trainer.callback_metrics)


class PublishedSSESAM:
    """What the class of the published code does, with its methods."""

    def __init__(self, optimizer, model, head_rho, tail_rho, gamma, total_epochs):
        self.optimizer, self.parameters = optimizer, list(model.parameters())
        self.radii, self.epoch, self.switch = [head_rho, tail_rho], 0, gamma * total_epochs
        self.sum = torch.zeros(())

    def compute_and_add_epsilon(self, n_i):
        gradient = self._take_gradient()
        self.eps = self.radii[n_i] * gradient / gradient.norm()
        self._move(self.eps)

    def compute_grad_sum_and_restore_p(self):
        self.sum = self.sum + self._take_gradient()
        self._move(-self.eps)

    def update(self):
        for p, part in zip(self.parameters, self.sum.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = part.view_as(p)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sum = torch.zeros(())

    def update_rho(self):
        self.epoch += 1
        if self.epoch >= self.switch:
            self.radii[0] = 0

    def _take_gradient(self):
        gradient = torch.cat([p.grad.flatten() for p in self.parameters])
        self.optimizer.zero_grad()
        return gradient

    def _move(self, by):
        weights = torch.nn.utils.parameters_to_vector(self.parameters) + by
        torch.nn.utils.vector_to_parameters(weights.detach(), self.parameters)


RUN_AS_THEY_ARE = [
    "existing_project",
    "own_module",
    "batches_and_modules",
    "choosing",
    "coming_from",
    "family",
    "troubleshooting",
    "curvature",
    "correcting",
    "finetuning",
    "class_weights",
    "some_classes",
    "scaling",
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", RUN_AS_THEY_ARE)
def test_page_that_runs_as_it_is(name, capsys, monkeypatch):
    """The blocks of a page, one after the other; they print the comments at their ends, and hold what they assert."""
    missing = []
    if name == "coming_from":
        package = pytest.importorskip("pytorch_optimizer")
        # The oldest supported release does not have all of its variants yet.
        missing = [f"import {variant} as" for variant in ("FriendlySAM", "LookSAM") if not hasattr(package, variant)]
        monkeypatch.setitem(sys.modules, "ssesam", SimpleNamespace(SSESAM=PublishedSSESAM))
    monkeypatch.setattr("lightning.Trainer.__init__", _quiet())
    code = code_of(f"docs/{name}.md", missing)
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^# (.*)$", code, re.MULTILINE)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensorboard(monkeypatch):
    """The code of the page trains, and logs what the table of the page names."""
    monkeypatch.setattr("lightning.pytorch.loggers.TensorBoardLogger", CSVLogger)
    monkeypatch.setattr("lightning.Trainer.__init__", _quiet(logger=None))
    names = {}
    exec(code_of("docs/tensorboard.md"), names)
    logged = set(Path("runs/digits/version_0/metrics.csv").read_text().splitlines()[0].split(","))
    table = (ROOT / "docs" / "tensorboard.md").read_text().partition("| curve |")[2].partition("\n\n")[0]
    shown = set(re.findall(r"`([\w/-]+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:])))
    recalls = {f"val/recall/{name}" for name in names["data"].class_names}
    # A plain training without options of the step does not log the others.
    others = {"train/skipped_updates", "train/sharpness_tail", "stage", "val/recall/NAME"}
    assert shown - logged == others
    assert recalls <= logged


def test_going_on(monkeypatch):
    """A finished network is trained on: from its weights, with the counts of the larger data."""
    monkeypatch.setattr("lightning.Trainer.__init__", _quiet())
    first = LongTailClassifier(DigitsLT().class_counts, functools.partial(SmallConvNet, width=8), SAM(0.1))
    runner = Trainer(max_epochs=1)
    runner.fit(first, DigitsLT())
    runner.save_checkpoint("digits.ckpt")
    names = {}
    monkeypatch.setattr("lightning.Trainer.fit", lambda *args: names.setdefault("before", copy.deepcopy(args[1])))
    monkeypatch.setattr("lightning.Trainer.save_checkpoint", lambda *args: None)
    exec(code_of("docs/going_on.md"), names)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), names["before"].parameters(), strict=True))
    split = names["before"].split
    assert split.class_counts.tolist() == names["more"].class_counts != first.split.class_counts.tolist()
    assert names["before"].objective.split is split
    optimizer = names["before"].configure_optimizers()
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_longer_training_does_not_stretch_the_curve_of_a_checkpoint(monkeypatch):
    """As docs/going_on.md says: a checkpoint keeps the end of the cosine, after which the rate rises again."""
    monkeypatch.setattr("lightning.Trainer.__init__", _quiet())
    rates = []

    def train(epochs, checkpoint=None):
        cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
        network = functools.partial(SmallConvNet, width=8)
        model = LongTailClassifier(DigitsLT().class_counts, network, ERM(), scheduler=cosine)
        model.on_train_epoch_end = lambda: rates.append(model.trainer.optimizers[0].param_groups[0]["lr"])
        runner = Trainer(max_epochs=epochs, limit_train_batches=1, limit_val_batches=0)
        runner.fit(model, DigitsLT(), ckpt_path=checkpoint)
        runner.save_checkpoint("a.ckpt")

    train(2)
    train(4, "a.ckpt")
    assert rates == pytest.approx([0.05, 0, 0.05, 0.1], abs=1e-6)


def _quiet(**others):
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    given = {name: value for name, value in {**silent, **others}.items() if value is not None}
    return functools.partialmethod(Trainer.__init__, **given, enable_checkpointing=False)


def test_every_page_with_code_is_run():
    with_code = {page.stem for page in PAGES if "```python\n" in page.read_text()}
    with_tests_of_their_own = {"README", "CONTRIBUTING", "method", "own_loop", "performance", "toolkit", "trainer"}
    # tests/test_prediction_page.py, and below.
    with_tests_of_their_own |= {"prediction", "tensorboard", "going_on"}
    assert with_code - with_tests_of_their_own == set(RUN_AS_THEY_ARE)


def commands():
    """Every command of the pages, from blocks and from the text, once."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        lines = "\n".join(re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)).splitlines()
        lines += re.findall(r"`(lightning-ssesam \w[^`]*)`", " ".join(text.split()))
        lines += [part for line in lines for part in line.split(" && ")]
        for line in lines:
            command = shlex.split(line, comments=True)
            if command and "&&" not in command:
                found[tuple(command)] = page.name
    return found


def test_scripts_that_the_pages_name_are_there():
    scripts = [command[1:] for command in commands() if command[0] == "python" and command[1] != "-m"]
    assert len(scripts) > 5
    for name, *options in scripts:
        text = (ROOT / name).read_text()
        assert all(f'"{option}"' in text for option in options if option.startswith("--")), (name, options)


@pytest.fixture
def _what_the_commands_read(monkeypatch):
    blocks = {}
    for page in ("command_line", "toolkit"):
        blocks[page], *_ = re.findall(r"^```yaml\n(.*?)^```", (ROOT / f"docs/{page}.md").read_text(), re.M | re.DOTALL)
    Path("mine.yaml").write_text(blocks["command_line"])
    Path("sweep").mkdir()
    Path("suggestion.yaml").write_text("tail_below: 100\n")
    Path("sweep/best.yaml").write_text("head_rho: 0.1\ntail_rho: 0.2\ngamma: 0.6\n")
    for name, count in (("cat", 30), ("dog", 12), ("owl", 5)):
        Path("images", name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(f"images/{name}/{number}.png")
    kinds = [("cat", 0)] * 8 + [("dog", 1)] * 4 + [("owl", 2)]
    Path("list.txt").write_text("".join(f"{kind}/0.png {label}\n" for kind, label in kinds))
    for name in ("train", "test"):
        write_shards(ImageList("list.txt", "images"), "shards", name)
    # docs/some_classes.md makes it.
    Path("some").symlink_to("images")
    shutil.copy(ROOT / "examples" / "own_method" / "compare.yaml", "compare.yaml")
    shutil.copy(ROOT / "examples" / "own_method" / "graded.py", "graded.py")
    (cluster,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    Path("slurm.yaml").write_text(cluster)
    # There is no disk and no machine of that name.
    monkeypatch.setattr("lightning_ssesam.experiments.sweep.Place", lambda output, storage: Place(output, None))
    monkeypatch.setattr("lightning_ssesam.experiments.cluster._client", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr("lightning_ssesam.experiments.sweep._open_study", lambda *args: sys.exit("works"))
    monkeypatch.setattr("lightning_ssesam.experiments.curvature_command.short_names", lambda *args: sys.exit("works"))
    monkeypatch.setattr("lightning_ssesam.experiments.predict_command.load_classifier", lambda *args: sys.exit("works"))
    monkeypatch.setattr("lightning_ssesam.experiments.adjust_command.find_device", lambda *args: sys.exit("works"))


@pytest.mark.usefixtures("_in_a_terminal", "_what_the_commands_read")
@pytest.mark.parametrize(
    "name", ["fit", "test", "compare", "sweep", "curvature", "predict", "adjust", "suggest", "--version"]
)
def test_commands_are_understood(name, monkeypatch, capsys):
    """Every command of the pages, up to the point where it would train."""
    given = [list(command[1:]) for command in commands() if command[:2] == ("lightning-ssesam", name)]
    of_name = [command for command in given if name in ("compare", "--version") or len(command) > 1]
    assert of_name
    for command in of_name:
        if "--help" in command or name == "--version":
            with pytest.raises(SystemExit) if "--help" in command else contextlib.nullcontext():
                main(command)
        elif name == "compare":
            assert planned_runs(monkeypatch, command[1:])
        elif name == "suggest":
            main(command)
            assert "Compare with: lightning-ssesam compare" in capsys.readouterr().out
        elif name in ("sweep", "curvature", "predict", "adjust"):
            with pytest.raises(SystemExit, match="works"):
                main(command)
        else:
            with pytest.raises(SystemExit) as stop:
                main([*command, "--print_config"])
            assert not stop.value.code, command
            assert "class_path" in capsys.readouterr().out
    others = {command[1] for command in commands() if command[0] == "lightning-ssesam"}
    assert others <= {*COMMANDS, "--version", "--help", "completion"}
