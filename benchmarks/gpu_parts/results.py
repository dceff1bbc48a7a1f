"""The results that ``benchmarks/gpu.py`` keeps: small JSON files, each written in one go."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).parents[1] / "results"
"""Folder of the results that are part of the repository."""


def write_json(path: Path, value: Any) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(unfinished, path)


def read_json(path: Path) -> Any:
    """Return what a file holds; None if there is no such file, or if it is not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_all(folders: Iterable[Path], tiny: bool = False) -> dict[str, Any]:
    """Return all results by their path in a folder, sorted. Those of later folders replace those of earlier ones.

    Args:
        folders: Folders with results.
        tiny: Whether to return those of ``--tiny``, too.
    """
    found = {}
    for folder in folders:
        for path in folder.rglob("*.json"):
            value = read_json(path)
            if isinstance(value, dict) and (tiny or not value.get("tiny")):
                found[path.relative_to(folder).as_posix()] = value
    return dict(sorted(found.items()))


def fingerprint(paths: Iterable[Path], root: Path) -> str:
    """Return a text that changes with the content of files, or with their places in a folder."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]
