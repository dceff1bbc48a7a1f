"""The code in the README and the documentation runs, and does what it says beside it."""

import ast
import functools
import re
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import batches_loader, classification_batch, convbn, mlp

from lightning_ssesam import ClassSplit

ROOT = Path(__file__).parent.parent


def code_of(name):
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    return "\n".join(textwrap.dedent(block) for block in blocks)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_readme():
    names = {}
    exec(code_of("README.md"), names)
    model = names["Evaluated"](mlp(), ClassSplit.from_counts([500, 300, 200, 50, 20], tail_below=100))
    trainer = names["trainer"]
    trainer.fit_loop.max_epochs = 10
    trainer.fit(model, batches_loader([classification_batch()]), batches_loader([classification_batch()]))
    assert 0 <= trainer.callback_metrics["val/acc_tail"] <= 1
    assert trainer.global_step == 10
    assert model.objective.stage == 2
    assert len(torch.where(model.objective.split.tail)[0]) == 2


def test_method(capsys):
    code = code_of("docs/method.md")
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == re.findall(r"^# (\[.*)$", code, re.MULTILINE)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_performance(capsys):
    names = {}
    code = code_of("docs/performance.md")
    exec(code_of("README.md") + code, names)
    assert capsys.readouterr().out.splitlines() == re.findall(r"^ *# (.*)$", code, re.MULTILINE)
    model = names["Fast"](convbn(), ClassSplit.from_counts([500, 300, 200, 50, 20], tail_below=100))
    trainer = names["trainer"]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, batches_loader([classification_batch(shape=(3, 5, 5))]))
    assert trainer.global_step == 4


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), target


def test_trainer_table_names_tests_that_are_there():
    """Every row that promises something names a test, or a class or file of them."""
    text = (ROOT / "docs" / "trainer.md").read_text()
    tree = functools.cache(lambda file: ast.parse((ROOT / "tests" / file).read_text()))
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 30
    for _, _, _, held_by in rows:
        (name,) = re.findall(r"^`(.*)`$", held_by.strip())
        file, *path = name.split("::")
        nodes = tree(file).body
        for part in path:
            (node,) = [node for node in nodes if getattr(node, "name", None) == part]
            nodes = node.body


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["Local", "Careful", "Curious"])
def test_trainer_page(name):
    names = {}
    exec(code_of("README.md") + code_of("docs/trainer.md"), names)
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
