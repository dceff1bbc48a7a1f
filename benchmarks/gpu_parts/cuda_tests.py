"""Runs the tests that need a GPU, and keeps how many pass."""

import sys
from pathlib import Path

import pytest

from gpu_parts.results import fingerprint, write_json
from gpu_parts.settings import about, measured, settings_of_child
from gpu_parts.tables import counts_of_tests

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> list[Path]:
    """Return the test files that need a GPU, at least in part; ``test_cuda.py`` first."""
    found = [path for path in sorted(folder.glob("test_*.py")) if "needs a GPU" in path.read_text()]
    return sorted(found, key=lambda path: path.name != "test_cuda.py")


def main() -> None:
    """Run the tests, unless all of them have passed with the same code, versions and GPU."""
    settings, _ = settings_of_child(is_silent=False)
    report, chosen = Path(settings.scratch) / "tests.xml", files(ROOT / "tests")
    code = fingerprint(chosen, ROOT)
    if any(one["passed"] and not one["failed"] for one in measured("tests.json", settings, tests=code)):
        print("passed already", flush=True)
        return
    options = ["-o", "addopts=--strict-markers", "-q", "-rs", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    place = [f"--junitxml={report}", f"--basetemp={settings.scratch}/pytest", "-c", str(ROOT / "pyproject.toml")]
    status = pytest.main([*options, *place, *map(str, chosen)])
    counts = counts_of_tests(report)
    # Without a failure, only all tests count, not those before an interruption.
    if counts is not None and (counts["failed"] or status == 0):
        result = {"files": [path.name for path in chosen], **counts, "tests": code, **about(settings)}
        write_json(Path(settings.output) / "tests.json", result)
    sys.exit(status)


if __name__ == "__main__":
    main()
