"""The results that ``benchmarks/gpu.py`` keeps: small JSON files, each written in one go."""

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


def read_all(folders: Iterable[Path]) -> dict[str, Any]:
    """Return all results by their path in a folder, sorted. Those of later folders replace those of earlier ones."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*.json"):
            if (value := read_json(path)) is not None:
                found[path.relative_to(folder).as_posix()] = value
    return dict(sorted(found.items()))
