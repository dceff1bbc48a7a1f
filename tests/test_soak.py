"""The short form of benchmarks/soak.py."""

import runpy
from pathlib import Path

import pytest
from helpers import STRICT

pytestmark = [STRICT, pytest.mark.filterwarnings("ignore:.*")]


def test_soak():
    soak = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "soak.py"))["soak"]
    are_equal, faults, memory = soak(400)
    assert are_equal
    assert faults["batches of NaN"] == 16
    assert sum(number for kind, number in faults.items() if "perturbed" in kind) >= 3
    # After the first Trainers the memory stays.
    assert memory[-1] < memory[len(memory) // 2] + 20
