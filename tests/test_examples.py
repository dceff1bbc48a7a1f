"""Every example runs as its first lines say, and prints what they say it prints."""

import csv
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lightning import Trainer

from lightning_ssesam import ClassSplit
from lightning_ssesam.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def _six_epochs(monkeypatch):
    """Trainings of thirty or sixty epochs, made shorter: they print the same lines with other figures."""

    def start(self, *args, max_epochs, **kwargs):
        assert max_epochs >= 30
        make(self, *args, max_epochs=6, **kwargs)

    make = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", start)


@pytest.mark.usefixtures("_six_epochs")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["plain_module", "existing_project", "mixup"])
def test_script(name, capsys):
    path = EXAMPLES / f"{name}.py"
    runpy.run_path(str(path), run_name="__main__")
    shown = re.search(r"It prints.*?:\n\n((?:    .*\n)+)", path.read_text()).group(1)
    printed = capsys.readouterr().out
    # The figures depend on the machine and the versions; that they are there does not.
    for line in shown.splitlines():
        pattern = re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", re.escape(line.strip()))
        assert re.search(pattern, printed), f"{line!r} is not in {printed!r}"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cli_config(capsys, monkeypatch):
    config = EXAMPLES / "cli_config.yaml"
    commands = re.findall(r"^# +lightning-ssesam (.*)$", config.read_text(), re.MULTILINE)
    assert len(commands) == 2
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    for command in commands:
        # Instead of thirty epochs, as above.
        main([*command.replace("examples/cli_config.yaml", str(config)).split(), "--trainer.max_epochs=6"])
    printed = capsys.readouterr().out
    for name in re.findall(r"test/\w+", config.read_text()):
        assert name in printed


@pytest.fixture
def own_method(tmp_path, monkeypatch):
    """The files of the example, in the folder that the command runs in."""
    for path in (EXAMPLES / "own_method").iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    monkeypatch.setattr("lightning_ssesam.experiments.report.FIGURES", ())
    yield tmp_path
    sys.modules.pop("graded", None)


def test_a_method_is_compared_changed_and_compared_again(own_method, capsys):
    """Only the runs of the changed method are made again; the change undone, all are found."""
    config, code = own_method / "compare.yaml", own_method / "graded.py"
    (command,) = re.findall(r"^# +lightning-ssesam (.*)$", config.read_text(), re.MULTILINE)
    config.write_text(config.read_text().replace("epochs: 60", "epochs: 1").replace("seeds: 3", "seeds: 1"))

    def compare():
        sys.modules.pop("graded", None)
        main([*command.split(), "--jobs=1"])
        printed = capsys.readouterr().out
        (kept,) = re.findall(r"^(\d+) of 4 runs are in comparison/runs already", printed, re.MULTILINE) or [0]
        with (own_method / "comparison" / "results.csv").open() as file:
            rows = {(row["method"], row["seed"]): row["all"] for row in csv.DictReader(file)}
        assert len(rows) == 4
        return int(kept), rows

    assert compare()[0] == 0
    kept, first = compare()
    assert kept == 4
    text = code.read_text()
    code.write_text(text.replace("(0.0, self.medium_rho, self.few_rho)", "(2.0, self.medium_rho, self.few_rho)"))
    kept, changed = compare()
    assert kept == 3
    assert {method for method, seed in first if first[method, seed] != changed[method, seed]} == {"GradedSAM"}
    code.write_text(text)
    assert compare() == (4, first)


def test_the_method_of_the_example(own_method, monkeypatch):
    """Medium-shot and few-shot samples have the radii, and all weigh 1/N."""
    monkeypatch.syspath_prepend(own_method)
    from graded import GradedSAM

    objective = GradedSAM(0.1, 0.3)
    objective.bind(ClassSplit.from_counts([200, 50, 5], tail_below=20))
    targets = torch.tensor([0, 1, 2, 2])
    terms = objective.terms(targets)
    assert [term.rho for term in terms] == [0.0, 0.1, 0.3]
    assert [term.weights.tolist() for term in terms] == [[0.25, 0, 0, 0], [0, 0.25, 0, 0], [0, 0, 0.25, 0.25]]
