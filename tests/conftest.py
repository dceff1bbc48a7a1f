import gc
import socket
import sys

import pytest

# The functions import torch, because the process that only hands out the tests would wait for it, too.


# Each of these files takes 15 to 50 seconds: they come first, so that both processes end at the same time.
LONG = (
    "test_docs_site.py",
    "test_compare.py",
    "test_docs.py",
    "test_resume.py",
    "test_distributed.py",
    "test_cli.py",
    "test_graphs.py",
    "test_curvature.py",
    "test_refusals.py",
    "test_examples.py",
    "test_family_cli.py",
    "test_performance.py",
    "test_boring.py",
    "test_fit_method.py",
)


def pytest_configure(config):
    """Called in each process: pytest-xdist would begin with the files that have the most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Called when the tests are collected: sort them by their files."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish():
    """Called before the first test: take what has been imported, which stays to the end, from the garbage collector.

    Each test that collects garbage would look at these objects, for half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The tensors here are too small to share among threads, which only wait for one another."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _found_once():
    from helpers import found_once

    with found_once():
        yield


@pytest.fixture
def float64():
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def program_name(monkeypatch):
    """A search writes down the command that started it, which is not pytest here."""
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


@pytest.fixture
def no_pictures(monkeypatch):
    """A report has no pictures, each of which takes a third of a second. Their own tests draw them."""
    monkeypatch.setattr("lightning_ssesam.experiments.report.FIGURES", ())


@pytest.fixture
def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
