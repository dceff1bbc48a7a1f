"""The wheel and the source distribution hold what they should, and work without the repository."""

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import yaml

import lightning_ssesam

ROOT = Path(__file__).parent.parent
FOLDERS = ["lightning_ssesam", "tests", "examples", "docs", "benchmarks"]
AT_THE_TOP = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "pyproject.toml"]
DIST_INFO = f"lightning_ssesam-{lightning_ssesam.__version__}.dist-info"


def files_in(root, *folders):
    found = (path for folder in folders for path in (root / folder).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix() for path in found if "__pycache__" not in path.parts}


def build(source, target, folder):
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(ROOT, "sdist", folder / "built")) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"lightning_ssesam-{lightning_ssesam.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel of the source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build(sdist, "wheel", folder / "built")) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_source_distribution_is_complete(sdist):
    expected = files_in(ROOT, *FOLDERS) | {*AT_THE_TOP, ".ci/oldest.txt", ".ci/run"}
    assert files_in(sdist, ".") == expected | {"PKG-INFO", ".gitignore"}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    package = files_in(ROOT, "lightning_ssesam")
    assert {Path(name).suffix for name in package} == {".py", ".yaml", ".html", ".typed"}
    about = {f"{DIST_INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert files_in(wheel, ".") == package | about


def test_metadata(wheel):
    about = Distribution.at(wheel / DIST_INFO)
    assert about.version == lightning_ssesam.__version__
    assert [(entry.group, entry.name, entry.value) for entry in about.entry_points] == [
        ("console_scripts", "lightning-ssesam", "lightning_ssesam.cli:main")
    ]
    assert about.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert about.metadata["License-Expression"] == "Apache-2.0"
    assert about.metadata["Requires-Python"] == ">=3.10"
    assert set(about.metadata.get_all("Provides-Extra")) == {
        "cli",
        "cluster",
        "curvature",
        "streaming",
        "test",
        "docs",
        "dev",
    }


WITHOUT_THE_REPOSITORY = """
import sys
from pathlib import Path

wheel, repository = sys.argv[1:]
sys.path[:] = [wheel, *(path for path in sys.path if path and Path(path).resolve() != Path(repository))]

import lightning_ssesam
from lightning_ssesam.cli import main

assert Path(lightning_ssesam.__file__).is_relative_to(wheel)
main(["fit", "--config", "digits_lt", "--print_config"])
"""


def test_works_without_the_repository(wheel):
    command = [sys.executable, "-c", WITHOUT_THE_REPOSITORY, wheel, ROOT.resolve()]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert yaml.safe_load(run.stdout)["model"]["objective"]["init_args"]["tail_rho"] == 0.2


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    # A number would have to be kept equal to the package's.
    assert "version" not in citation
    assert citation["license"] == "Apache-2.0"
    cited = {identifier["value"] for paper in citation["references"] for identifier in paper["identifiers"]}
    papers = (ROOT / "README.md").read_text().partition("## Papers")[2]
    assert set(re.findall(r"\[(arXiv:[\d.]+)\]", papers)) <= cited
