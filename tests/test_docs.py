"""The code in the README and the documentation runs, and does what it says beside it."""

import re
from pathlib import Path

import pytest
import torch
from helpers import batches_loader, classification_batch, mlp

from lightning_ssesam import ClassSplit

ROOT = Path(__file__).parent.parent


def code_of(name):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    return "\n".join(blocks)


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


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "docs" / "method.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), target
