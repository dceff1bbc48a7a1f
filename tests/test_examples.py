"""Every example runs as its first lines say, and prints what they say it prints."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from lightning_ssesam.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


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
        main(command.replace("examples/cli_config.yaml", str(config)).split())
    printed = capsys.readouterr().out
    for name in re.findall(r"test/\w+", config.read_text()):
        assert name in printed
