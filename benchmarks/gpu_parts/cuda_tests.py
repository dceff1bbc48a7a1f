"""Runs the tests that need a GPU, and keeps how many pass."""

import sys
from pathlib import Path

import pytest

from gpu_parts.results import write_json
from gpu_parts.settings import about, settings_of_child
from gpu_parts.tables import counts_of_tests

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> list[Path]:
    """Return the test files that need a GPU, at least in part; ``test_cuda.py`` first."""
    found = [path for path in sorted(folder.glob("test_*.py")) if "needs a GPU" in path.read_text()]
    return sorted(found, key=lambda path: path.name != "test_cuda.py")


def main() -> None:
    """Run the tests."""
    settings, _ = settings_of_child(is_silent=False)
    report, chosen = Path(settings.scratch) / "tests.xml", files(ROOT / "tests")
    options = ["-o", "addopts=--strict-markers", "-q", "-rs", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    place = [f"--junitxml={report}", f"--basetemp={settings.scratch}/pytest", "-c", str(ROOT / "pyproject.toml")]
    status = pytest.main([*options, *place, *map(str, chosen)])
    if (counts := counts_of_tests(report)) is not None:
        result = {"files": [path.name for path in chosen], **counts, **about(settings)}
        write_json(Path(settings.output) / "tests.json", result)
    sys.exit(status)


if __name__ == "__main__":
    main()
