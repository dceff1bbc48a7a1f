"""Where a comparison comes from: the date, the command, the commit of the working folder, the rule of the split."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any


def origin() -> dict[str, str]:
    """Return the date, the command, and the commit of the working folder if it is in a Git repository, by name."""
    facts = {"Date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"), "Command": _command()}
    return facts | ({"Commit": commit} if (commit := _commit()) else {})


def _command() -> str:
    """Return the command that started this program, quoted for a shell."""
    name, *arguments = sys.argv
    if Path(name).stem == "lightning-ssesam":
        return shlex.join(["lightning-ssesam", *arguments])
    program, *arguments = sys.orig_argv or [sys.executable, *sys.argv]
    return shlex.join([Path(program).name, *arguments])


def _commit() -> str | None:
    """Return the commit of the working folder, with "+ changes" if files of it were changed, or None."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    return f"{commit} + changes" if commit and _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str | None:
    # It runs no program that the repository names, and writes nothing.
    command = ["git", "-c", "core.fsmonitor=false", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            check=True,
            timeout=20,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() or None


def tail_rule(arguments: Mapping[str, Any]) -> str:
    """Return in words what makes a class a tail class.

    Args:
        arguments: Arguments of a LongTailClassifier, of which ``tail_below`` and ``tail_fraction`` count.
    """
    if (below := arguments.get("tail_below")) is not None:
        return f"the classes with fewer than {below:g} training samples (tail_below={below:g})"
    fraction = arguments.get("tail_fraction")
    fraction = 0.2 if fraction is None else fraction
    share = f"at most {100 * fraction:g} % of the training samples"
    return f"the rarest classes that hold {share} (tail_fraction={fraction:g})"
