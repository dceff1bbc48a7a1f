"""Help that can be read, and scripts by which shells complete commands."""

import contextlib
import io
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from helpers import SHIPPED_COMPARISONS, SHIPPED_FITS, STRICT

from lightning_ssesam.cli import COMMANDS, main
from lightning_ssesam.compare import METHODS
from lightning_ssesam.experiments.completion import completion_script, options_in

pytestmark = STRICT


def printed(arguments, capsys, monkeypatch, columns="80"):
    monkeypatch.setenv("COLUMNS", columns)
    with contextlib.suppress(SystemExit):
        main(arguments)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "places"),
    [
        ("compare", ""),
        ("sweep", ""),
        ("curvature", "CHECKPOINTS "),
        ("predict", "CHECKPOINT IMAGES "),
        ("suggest", "DATA "),
    ],
)
def test_help_is_short_and_names_what_is_here(command, places, capsys, monkeypatch):
    text = printed([command, "--help"], capsys, monkeypatch)
    assert len(text.splitlines()) < 100
    assert text.startswith(f"usage: lightning-ssesam {command} {places}[options]\n\n")
    assert "known subclasses" not in text
    assert "torch.ao" not in text
    if not places:
        words = " ".join(text.split())
        assert (
            "(BalancedSoftmaxLoss, ClassBalancedLoss, FocalLoss, LDAMLoss, LogitAdjustedLoss, VSLoss, or a path"
            in words
        )
        assert "(CIFARResNet, SmallConvNet, TimmModel, TorchvisionResNet, or a path, default: SmallConvNet)" in words
        assert (
            "ImageFolderLT, ImageListLT, ImageShardsLT, ImageTableLT, TinyImageNetLT, or a path, default: DigitsLT)"
            in words
        )
        assert "default: SGD {'lr': 0.05, 'momentum': 0.9, 'weight_decay': 0.0005})" in words


def test_help_of_fit_keeps_every_option(capsys, monkeypatch):
    """It had 1,374 lines."""
    text = printed(["fit", "--help"], capsys, monkeypatch)
    assert len(text.splitlines()) < 520
    assert len(options_in(text)) > 70
    assert "FocalSAM, FriendlySAM, ImbSAM, MomentumSAM, RandomSAM, Staged, or a path, default: SSESAM {" in " ".join(
        text.split()
    )


def test_help_of_a_command_by_its_name(capsys, monkeypatch):
    assert printed(["help", "curvature"], capsys, monkeypatch) == printed(["curvature", "-h"], capsys, monkeypatch)
    assert printed(["help"], capsys, monkeypatch) == printed([], capsys, monkeypatch)


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(option, capsys, monkeypatch):
    assert re.fullmatch(r"lightning-ssesam \d+\.\d+\.\d+\n", printed([option], capsys, monkeypatch))


@cache
def script(shell):
    """The script is the same for all tests of a shell."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        main(["completion", shell])
    return text.getvalue()


def bash(*words):
    """The words that bash offers for the last of the words of a line."""
    line = " ".join(f"'{word}'" for word in words)
    program = f"""{script("bash")}
COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _lightning_ssesam; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


PROGRAM = "lightning-ssesam"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes():
    assert bash(PROGRAM, "") == [*COMMANDS, "completion", "help"]
    assert bash(PROGRAM, "c") == ["compare", "curvature", "completion"]
    assert bash(PROGRAM, "compare", "--me") == ["--methods.help", "--methods"]
    assert bash(PROGRAM, "compare", "--methods", "") == list(METHODS)
    assert bash(PROGRAM, "compare", "--methods", "ERM,S") == ["ERM,SAM", "ERM,SSESAM"]
    assert bash(PROGRAM, "compare", "--methods", "=", "ERM,S") == ["ERM,SAM", "ERM,SSESAM"]
    assert bash(PROGRAM, "compare", "--logger", "") == ["tensorboard", "csv", "wandb", "mlflow"]
    assert bash(PROGRAM, "compare", "--config", "") == SHIPPED_COMPARISONS
    assert bash(PROGRAM, "fit", "--config", "=") == SHIPPED_FITS
    assert bash(PROGRAM, "fit", "--config", "=", "di") == ["digits_lt"]
    assert bash(PROGRAM, "fit", "--model.loss", "L") == ["LDAMLoss", "LogitAdjustedLoss"]
    assert bash(PROGRAM, "fit", "--model.tta", "") == ["none", "hflip"]
    assert bash(PROGRAM, "fit", "--data", "Im") == ["ImageFolderLT", "ImageListLT", "ImageShardsLT", "ImageTableLT"]
    assert bash(PROGRAM, "completion", "") == ["bash", "zsh", "fish"]
    assert bash(PROGRAM, "help", "s") == ["suggest", "sweep"]
    # An option may follow a value, and files follow where no words are known.
    assert "--seeds" in bash(PROGRAM, "compare", "--config", "mine.yaml", "--se")
    assert bash(PROGRAM, "compare", "--output", "") == bash(PROGRAM, "curvature", "") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_knows_the_program():
    Path("script").write_text(script("bash"))
    done = subprocess.run(
        ["bash", "--norc", "-c", "source ./script; complete -p lightning-ssesam"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "complete -o default -F _lightning_ssesam lightning-ssesam\n"


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes():
    Path("script").write_text(script("fish"))
    lines = {"co": "compare", "compare --methods": "--methods", "fit --model.tta h": "hflip", "completion z": "zsh"}
    for line, expected in lines.items():
        program = f'source script; complete -C "{PROGRAM} {line}"'
        done = subprocess.run(["fish", "--no-config", "-c", program], capture_output=True, text=True, check=True)
        assert expected in done.stdout.split(), line


def test_scripts_of_the_other_shells():
    commands = {"fit": {"--help": (), "--model.tta": ("none", "hflip"), "--config": ("a",)}, "help": {"fit": ()}}
    zsh, plain = completion_script("zsh", commands), completion_script("bash", commands)
    assert zsh == "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n" + plain
    start = "complete -c lightning-ssesam -n"
    assert completion_script("fish", commands).splitlines() == [
        f'{start} __fish_use_subcommand -f -a "fit help"',
        f'{start} "__fish_seen_subcommand_from fit" -l help',
        f'{start} "__fish_seen_subcommand_from fit" -l model.tta -x -a "none hflip"',
        f'{start} "__fish_seen_subcommand_from fit" -l config -r -a "a"',
        f'{start} "__fish_seen_subcommand_from help" -f -a "fit"',
    ]
