"""The folder of finished runs."""

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

from lightning_ssesam.experiments.console import make_folder
from lightning_ssesam.experiments.runs import Run


class RunStore:
    """A folder with a JSON file for every finished run.

    Args:
        folder: Path of the folder. It is made if it does not exist.

    Raises:
        ArgumentError: If the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)

    def load(self, method: str, seed: int, fingerprint: str) -> Run | None:
        """Return a finished run with this fingerprint, or None if there is none, or its file is not complete."""
        try:
            saved = json.loads(self._path(method, seed).read_text())
            return Run(**saved["run"]) if saved["fingerprint"] == fingerprint else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, run: Run, fingerprint: str) -> None:
        """Write a run: all of it, or nothing if the program ends before."""
        path = self._path(run.method, run.seed)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"fingerprint": fingerprint, "run": asdict(run)}))
        os.replace(unfinished, path)

    def _path(self, method: str, seed: int) -> Path:
        # The hash keeps names apart that differ only in punctuation.
        mark = hashlib.sha256(method.encode()).hexdigest()[:8]
        return self.folder / f"{re.sub('[^A-Za-z0-9]+', '-', method)}-{mark}-{seed}.json"
