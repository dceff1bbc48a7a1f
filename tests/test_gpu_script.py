"""benchmarks/gpu.py: what it plans, trains, measures, keeps and writes, with tiny networks on the CPU."""

import contextlib
import itertools
import json
import logging
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import start_process, wait_for
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import captured_table  # noqa: E402
import gpu  # noqa: E402
from gpu_parts import (  # noqa: E402
    captures,
    contenders,
    cuda_tests,
    folders,
    images,
    plan,
    sharing,
    steps,
    tables,
    training,
)
from gpu_parts.captures import Captured  # noqa: E402
from gpu_parts.children import Children  # noqa: E402
from gpu_parts.plan import Run  # noqa: E402
from gpu_parts.results import COMMITTED, fingerprint, read_all, read_json, write_json  # noqa: E402
from gpu_parts.settings import Settings, about  # noqa: E402

from lightning_ssesam.experiments.methods import METHODS  # noqa: E402
from lightning_ssesam.models import SmallConvNet  # noqa: E402


@pytest.fixture(autouse=True)
def _as_before():
    """The parts are made for processes of their own, and set what holds for the whole process."""
    logger = logging.getLogger("lightning.pytorch")
    level, environment = logger.level, dict(os.environ)
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.backends.cudnn.benchmark = before[0]
    torch.set_float32_matmul_precision(before[1])
    torch.set_num_threads(before[2])
    logger.setLevel(level)
    os.environ.clear()
    os.environ.update(environment)


pytestmark = pytest.mark.filterwarnings("ignore:.*")
CPU = torch.device("cpu")


def make_images(folder, train=(12, 9, 6, 4), test=3):
    generator = np.random.default_rng(0)
    for part, counts in {"train": train, "test": [test] * len(train)}.items():
        for label, count in enumerate(counts):
            (folder / part / f"class {label}").mkdir(parents=True)
            for number in range(count):
                # Classes of different brightness, so that something can be learnt.
                pixels = generator.integers(60 * label, 60 * label + 70, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / f"class {label}" / f"{number:03}.png")
    return folder


@pytest.fixture
def settings(tmp_path):
    made = Settings(str(tmp_path / "results"), str(tmp_path / "scratch"), [str(tmp_path / "results")])
    made.device, made.tiny, made.epochs, made.seeds, made.jobs = "cpu", True, 5, 1, 1
    made.deadline = time.time() + 1000
    return made


@pytest.fixture
def trains(settings, tmp_path):
    settings.images = {"tiny100lt": str(make_images(tmp_path / "tiny100lt"))}
    return settings


def result_of(run, recall=0.5, seconds=10.0, **changes):
    """Return the made-up result of a training."""
    known = {"hardware": "card", "torch": "2", "lightning": "2.6", "jobs": 1, "seconds": seconds}
    accuracy = dict.fromkeys(("all", "head", "tail", "many", "medium"), recall)
    return {**plan.describe(run), "accuracy": accuracy, "training_accuracy": accuracy, **known, **changes}


class TestDocumentation:
    @pytest.mark.parametrize("page", ["results.md", "performance.md"])
    def test_pages_are_what_the_results_give(self, page):
        text = (ROOT / "docs" / page).read_text()
        assert tables.filled(text, read_all([COMMITTED])) == text
        assert text.count("<!-- gpu: ") == text.count("<!-- end of gpu -->") > 0

    def test_every_table_is_on_a_page(self):
        pages = "".join((ROOT / "docs" / name).read_text() for name in ("results.md", "performance.md"))
        assert all(pages.count(f"<!-- gpu: {name} -->") == 1 for name in tables.TABLES)

    def test_table_without_a_trainer_against_numpy(self):
        one = json.loads((COMMITTED / "captured" / "cifar10lt_61_epochs.json").read_text())
        runs = [run for run in one["runs"] if (run["loss"], run["method"]) == ("CE", "SSE-SAM 0.05/0.1")]
        recall = 100 * np.array([run["recall"] for run in runs])
        fitted = [100 * run["train"]["right_tail_a_batch"] / (128 * 891 / 12406) for run in runs]
        rows = [recall.mean(1), recall[:, :5].mean(1), recall[:, 5:].mean(1), fitted]
        cells = " | ".join(f"{np.mean(row):.1f} ± {np.std(row, ddof=1):.1f}" for row in rows)
        cost = (0.7 * 12.1 + 0.3 * 8.9) / 3.3
        assert f"| cross-entropy | SSE-SAM 0.05/0.1 | 2 | {cells} | {cost:.1f} |" in tables.captured(
            read_all([COMMITTED])
        )

    def test_trainings(self):
        runs = [Run("cifar10lt", "LA", "late SSE-SAM", 0.1, seed, 200) for seed in range(3)]
        found = {run.path: result_of(run, recall=share) for run, share in zip(runs, (0.5, 0.6, 0.64), strict=True)}
        erm = Run("cifar10lt", "CE", "ERM", None, 0, 200)
        asam = Run("cifar10lt", "LA", "ASAM", None, 0, 200)
        other = Run("cifar10lt", "CE", "ERM", None, 0, 60)
        found |= {run.path: result_of(run, 0.25) for run in (other, asam, erm)}
        text = tables.trainings(found)
        # Trainings of a search are in no table of accuracies.
        searched = plan.search("cifar10lt", "LA", "SAM", 1000)[0]
        assert searched.epochs == 200
        assert "SAM | 0.05 |" not in tables.trainings(found | {searched.path: result_of(searched)})
        accuracy = f"{100 * statistics.mean((0.5, 0.6, 0.64)):.1f} ± {100 * statistics.stdev((0.5, 0.6, 0.64)):.1f}"
        lines = [line for line in text.splitlines() if line.startswith(("| logit", "| cross", "**"))]
        assert lines == [
            "**CIFAR-10-LT (JPEG copy), imbalance factor 100, 200 epochs.** card, torch 2, lightning 2.6;"
            " trainings at a time: 1.",
            f"| logit adjustment | late SSE-SAM | 0.05 / 0.1 | 3 | {' | '.join([accuracy] * 5)} | | {accuracy} | 10 |",
            "| logit adjustment | ASAM | default | 1 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | | 25.0 | 10 |",
            "| cross-entropy | ERM | | 1 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | | 25.0 | 10 |",
            "**CIFAR-10-LT (JPEG copy), imbalance factor 100, 60 epochs.** card, torch 2, lightning 2.6; trainings at a"
            " time: 1.",
            "| cross-entropy | ERM | | 1 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | | 25.0 | 10 |",
        ]

    def test_empty_groups(self):
        """A group without classes has no accuracy, in any table."""
        run = Run("tiny100lt", "CE", "ERM", None, 0, 5)
        for missing in ("head", "tail", "many"):
            accuracy = {group: 0.25 for group in ("all", "head", "tail", "many", "medium", "few") if group != missing}
            one = result_of(run, accuracy=accuracy, training_accuracy=accuracy)
            cells = ["" if group == missing else " 25.0" for group in ("all", "head", "tail", "many", "medium", "few")]
            cells.append("" if missing == "tail" else " 25.0")
            assert f"| cross-entropy | ERM | | 1 |{' |'.join(cells)} | 10 |" in tables.trainings({run.path: one})
        row = {"method": "ERM", "loss": "CE", "seed": 0, "recall": [0.5, 0.25], "stages": [[1.0, None, 0.0]]}
        table = {"class_counts": [30, 10], "batch": 8, "replayed_ms": {"ERM": 2.0}, "device": "card", "torch": "2"}
        for tail_below, right, cells in (
            *((5, 0.0, "37.5 | 37.5 | | |"), (20, 1.0, "37.5 | 50.0 | 25.0 | 50.0 |")),
            (50, 4.0, "37.5 | | 37.5 | 50.0 |"),
        ):
            one = {**table, "tail_below": tail_below, "runs": [{**row, "train": {"right_tail_a_batch": right}}]}
            assert f"| cross-entropy | ERM | 1 | {cells} 1.0 |" in tables.captured({"captured/x.json": one})

    def test_search_says_what_was_found(self):
        runs = plan.search("tiny100lt", "CE", "ImbSAM", 200)
        found = {run.path: result_of(run, share) for run, share in zip(runs, (0.3, 0.45, 0.4), strict=True)}
        assert "| cross-entropy | ImbSAM | 30.0 | **45.0** | 40.0 |" in tables.trainings(found)
        del found[runs[2].path]
        assert "| cross-entropy | ImbSAM | 30.0 | 45.0 | |" in tables.trainings(found)

    def test_steps(self):
        row = {"plain": {"ms": 10.0}, "eager": {"ms": 36.0, "peak_mib": 50.2}, "engine": {"ms": 8.0}}
        row["graphs"] = {"ms": 9.0, "peak_mib": 60.0, "reserved_mib": 70.0}
        bits = {
            "SAM": {"with graphs": {"tensors": 9, "differing": [], "share_of_the_way": 0.0}},
            "ERM": {"with graphs": {"tensors": 9, "differing": ["a", "b"], "share_of_the_way": 0.0012}},
            "ImbSAM": {"with graphs": {"error": "ValueError: no"}},
        }
        lost = {"plain": {"ms": 10.0}, "eager": {"error": "OutOfMemoryError: full"}}
        one = {"network": "ResNet-32", "batch": 128, "image_size": 32, "precision": "bf16-mixed", "bits": bits}
        one |= {"hardware": "card", "torch": "2", "lightning": "2.6", "methods": {"SAM": row, "ImbSAM": lost}}
        text = tables.steps({"steps/ResNet-32.json": {**one, "waits": {"SAM eager": "", "SAM with graphs": "waits"}}})
        assert "| SAM | 10.0 | 36.0 (3.60) | 9.0 (0.90) | 8.0 (0.80) | 50 | 60 | 70 | |" in text
        assert "| ImbSAM | 10.0 | | | | | | | |" in text
        assert "through the Trainer, in steps of the engine alone: SAM 1.12." in text
        assert "ImbSAM, eager: OutOfMemoryError: full." in text
        assert "with graphs are the eager ones to the last bit: SAM." in text
        assert "with graphs are not the eager ones for ERM: 2 of 9 tensors differ, by 1.2e-03 of the way." in text
        assert "could not be compared for ImbSAM: ValueError: no." in text
        assert "Steps that wait for the GPU: SAM with graphs (waits)." in text

    def test_no_step_waits(self):
        assert tables._waits({"SAM eager": ""}) == ["Steps that wait for the GPU: none."]

    def test_write_is_in_place_or_in_the_output(self, monkeypatch):
        Path("docs").mkdir()
        for page in ("results.md", "performance.md"):
            Path("docs", page).write_text("a\n<!-- gpu: sharing -->\nold\n<!-- end of gpu -->\nb\n")
        monkeypatch.setattr(gpu, "ROOT", Path.cwd())
        monkeypatch.setattr(gpu, "COMMITTED", Path("committed"))
        rates = {"eager": {"1": 20.0, "2": 25.0}, "graphs": {"1": 80.0, "2": 81.0}}
        about = {"network": "ResNet-32", "method": "SAM", "hardware": "card", "torch": "2", "lightning": "2.6"}
        write_json(Path("out/results/sharing.json"), {"rates": rates, **about})
        gpu.write_tables(gpu.parse_arguments(["--output", "out"]), Path("out"))
        written = Path("out/docs/performance.md").read_text()
        assert "| graphs | 80 | 81 |" in written
        assert written.startswith("a\n<!-- gpu: sharing -->\n\n")
        assert written.endswith("\n\n<!-- end of gpu -->\nb\n")
        assert "old" in Path("docs/performance.md").read_text()
        assert not Path("committed").exists()
        gpu.write_tables(gpu.parse_arguments(["--write", "--output", "out"]), Path("out"))
        assert Path("docs/performance.md").read_text() == written
        assert read_json(Path("committed/sharing.json"))["rates"] == rates
        with pytest.raises(SystemExit, match="No such folder: 'other/results'"):
            gpu.write_tables(gpu.parse_arguments(["--write", "--output", "other"]), Path("other"))


class TestPlan:
    def test_all_methods_are_planned(self):
        assert {method.replace("-", "") for method in (*plan.MAIN, *plan.FAMILY)} == set(METHODS)
        assert set(gpu.NETWORKS) == set(contenders.NETWORKS)

    def test_the_same_budget_for_every_method(self):
        for method in plan.SEARCHED:
            runs = plan.search("cifar10lt", "LA", method, 200)
            assert [(run.radius, run.epochs, run.seed, run.is_search) for run in runs] == [
                (radius, 40, 0, True) for radius in (0.05, 0.1, 0.2)
            ]

    def test_a_table_early(self):
        """A method is trained right after its search, one loss and one set after the other, then other seeds."""
        found, made = {}, []
        while run := next(
            (r for r in plan.ordered(found, ["cifar10lt", "tiny100lt"], 200, 2) if r.path not in found), 0
        ):
            found[run.path] = result_of(run, recall={0.05: 0.4, 0.1: 0.6, 0.2: 0.5}.get(run.radius, 0.5))
            made.append(run)
        assert len(made) == len({run.path for run in made}) == 2 * 2 * (9 + 2 * (7 + 10))
        first = [(run.method, run.radius, run.is_search) for run in made[:13]]
        grid = [(radius, True) for radius in plan.GRID] + [(0.1, False)]
        assert first == [("ERM", None, False), *[(m, *rest) for m in plan.SEARCHED for rest in grid]]
        assert [(run.method, run.radius) for run in made[13:16]] == [(method, 0.1) for method in plan.LATE]
        assert (made[16].loss, made[16].data, made[16].method) == ("CE", "cifar10lt", "ERM")
        assert made[32].data == "tiny100lt"
        assert [run.seed for run in made[64:92]] == [1] * 28
        assert {run.method for run in made[92:]} == set(plan.FAMILY)

    def test_radius_of_a_search(self):
        runs = plan.search("cifar10lt", "CE", "SAM", 100)
        found = {run.path: result_of(run, recall) for run, recall in zip(runs, (0.4, 0.4, 0.3), strict=True)}
        assert plan.found_radius(found, "cifar10lt", "CE", "SAM", 100) == 0.05
        found[runs[2].path]["accuracy"]["all"] = 0.41
        assert plan.found_radius(found, "cifar10lt", "CE", "SAM", 100) == 0.2
        assert plan.found_radius(found, "cifar10lt", "LA", "SAM", 100) is None
        assert plan.found_radius(found, "cifar10lt", "CE", "SAM", 200) is None
        del found[runs[0].path]
        assert plan.found_radius(found, "cifar10lt", "CE", "SAM", 100) is None

    def test_radii_switches_and_updates(self):
        run = Run("cifar10lt", "LA", "late SSE-SAM", 0.1, 0, 200)
        assert (run.radii, run.switches) == ({"head_rho": 0.05, "tail_rho": 0.1}, [0.8, 0.9])
        assert run.updates == 12406 // 128 * 200
        assert run.cost == pytest.approx(0.8 + 0.1 * 11 / 3 + 0.1 * 8 / 3)
        assert run.path == "cifar10lt/LA_late_SSE-SAM_0.1_200_epochs_seed_0.json"
        assert Run("cifar10lt", "LA", "SSE-SAM", 0.1, 0, 200).switches == [0.7]
        assert Run("cifar10lt", "LA", "late SAM", 0.1, 0, 200).switches == [0.8]
        assert Run("cifar10lt", "LA", "SAM", 0.1, 0, 200).switches == []
        assert Run("tiny100lt", "LA", "SAM", 0.1, 0, 40, is_search=True).updates == int(0.8 * 10847) // 128 * 40

    def test_estimate(self):
        erm, sam = (Run("cifar10lt", "LA", method, radius, 0, 200) for method, radius in (("ERM", None), ("SAM", 0.1)))
        unknown = plan.estimate(sam, [])
        assert unknown == pytest.approx(2 * 19200 * 0.006 + 10)
        known = [result_of(erm, seconds=96.0)]
        assert plan.estimate(sam, known) == pytest.approx(2 * 96 + 10)
        # Those of the same method count, of them the slowest.
        known += [result_of(sam, seconds=100.0), result_of(sam, seconds=120.0)]
        assert plan.estimate(sam, known) == pytest.approx(120 + 10)

    @pytest.mark.parametrize(
        "text",
        [
            *("SAM::LA:0", "ERM:0.1:LA:0", "SAM:0.1:XX:0", "SAM:0.1:LA", "Sam:0.1:LA:0", "SAM:x:LA:0", "ERM:0:LA:0"),
            *("SAM:-1:LA:2", "SAM:0:LA:2", "SAM:nan:LA:2", "late SAM:inf:LA:2", "ERM::CE:-1", "ERM::LA:4294967296"),
        ],
    )
    def test_bad_runs(self, text):
        with pytest.raises(SystemExit, match=f"Expected argument `--runs` to be METHOD.*but got '{text}'"):
            plan.parse_run(text, "cifar10lt", 60)


class TestImages:
    def test_archive_and_folder_give_the_same(self, tmp_path):
        source = make_images(tmp_path / "source" / "tiny100lt")
        with tarfile.open("any.tar.xz", "w:xz") as archive:
            archive.add(source, "tiny100lt")
        found = [images.find([path])["tiny100lt"] for path in (tmp_path / "any.tar.xz", source, tmp_path / "source")]
        assert found == [tmp_path / "any.tar.xz", source, source]
        for number, place in enumerate(found):
            images.lay_out("tiny100lt", place, tmp_path / str(number))
        contents = [
            {path.relative_to(tmp_path / str(n)): path.read_bytes() for path in (tmp_path / str(n)).glob("*/*/*")}
            for n in range(3)
        ]
        assert contents[0] == contents[1] == contents[2]
        assert len(contents[0]) == 12 + 9 + 6 + 4 + 4 * 3

    def test_made_long_tailed_by_the_first_names(self, tmp_path, monkeypatch):
        source = make_images(tmp_path / "cifar", train=(10, 10, 10))
        monkeypatch.setitem(
            images.SOURCES, "cifar10lt", images.SOURCES["cifar10lt"]._replace(largest=9, imbalance_factor=9)
        )
        images.lay_out("cifar10lt", images.find([source])["cifar10lt"], tmp_path / "made")
        names = {n: [f"{k:03}.png" for k in range(count)] for n, count in enumerate((9, 3, 1))}
        assert {n: sorted(os.listdir(tmp_path / f"made/train/class {n}")) for n in range(3)} == names
        assert len(list((tmp_path / "made/test").glob("*/*"))) == 9

    def test_files_outside_are_not_written(self, tmp_path):
        source = make_images(tmp_path / "tiny100lt", train=(2, 1))
        with tarfile.open("bad.tar", "w") as archive:
            archive.add(source, "tiny100lt")
            for name in ("tiny100lt/train/../../outside.png", "tiny100lt/train/../outside.png"):
                archive.add(source / "train/class 0/000.png", name)
        images.lay_out("tiny100lt", tmp_path / "bad.tar", tmp_path / "deep" / "made")
        assert not list(tmp_path.rglob("outside.png"))
        assert len(list((tmp_path / "deep/made/train").glob("*/*"))) == 3

    @pytest.mark.parametrize("name", ["missing.tar.xz", "empty", "text.tar"])
    def test_one_clear_error(self, name, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.tar").write_text("no archive")
        ending = "does not exist" if name == "missing.tar.xz" else "has none"
        with pytest.raises(
            SystemExit, match=f"Expected argument `--images` to be folders or archives.*{name}, which {ending}"
        ):
            images.find([tmp_path / name])


def naive_recalls(net, folder):
    """Return the recall of each class, from the files."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    recalls = []
    for label, name in enumerate(sorted(os.listdir(folder))):
        pixels = [np.array(Image.open(path)) for path in sorted((folder / name).iterdir())]
        batch = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std
        with torch.no_grad():
            recalls.append((net.eval()(batch).argmax(1) == label).double().mean().item())
    return recalls


class TestTraining:
    def test_result_is_what_the_network_does(self, trains, monkeypatch, tmp_path):
        made = []
        make_model = training.make_model
        monkeypatch.setattr(training, "make_model", lambda *args: made.append(make_model(*args)) or made[-1])
        run = Run("tiny100lt", "LA", "late SSE-SAM", 0.1, 3, 20)
        result = training.train(run, trains, graphs=False)
        recalls = naive_recalls(made[0].backbone, tmp_path / "tiny100lt" / "test")
        assert result["recall"] == pytest.approx(recalls, abs=1e-5)
        assert len(set(recalls)) > 1
        assert result["accuracy"]["all"] == pytest.approx(sum(recalls) / 4, abs=1e-5)
        assert result["accuracy"]["tail"] == pytest.approx(sum(recalls[2:]) / 2, abs=1e-5)
        assert result["class_counts"] == [12, 9, 6, 4]
        assert (result["updates"], result["seed"], result["radii"]) == (20, 3, {"head_rho": 0.05, "tail_rho": 0.1})
        assert made[0].objective.stage == made[0].objective.num_stages == 3
        json.dumps(result, allow_nan=False)

    @pytest.mark.parametrize(
        ("is_search", "measured", "trained"),
        [(False, [3, 3, 3, 3], [12, 9, 6, 4]), (True, [2, 2, 1, 1], [10, 7, 5, 3])],
    )
    def test_what_is_measured_on_which_images(self, trains, monkeypatch, is_search, measured, trained):
        counted, test_step = [], training.Classifier.test_step

        def counts(self, batch, batch_idx):
            counted.append(batch[1].bincount().tolist())
            test_step(self, batch, batch_idx)

        monkeypatch.setattr(training.Classifier, "test_step", counts)
        run = Run("tiny100lt", "CE", "ERM", None, 0, 1, is_search)
        result = training.train(run, trains, graphs=False)
        assert counted == [measured, trained]
        assert result["class_counts"] == trained

    def test_seeds(self, trains, monkeypatch):
        """The same seed gives the same weights in the end, another one others."""
        made, make_model = [], training.make_model
        monkeypatch.setattr(training, "make_model", lambda *args: made.append(make_model(*args)) or made[-1])
        for seed in (0, 0, 1):
            training.train(Run("tiny100lt", "CE", "SAM", 0.05, seed, 2), trains, graphs=False)
        first, again, other = (model.backbone.classifier.weight for model in made)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_schedule(self):
        rates = [training.share_of_rate(step, steps=10, warm_up=4) for step in range(10)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[4:] == pytest.approx([0.5 * (1 + np.cos(np.pi * k / 6)) for k in range(6)])

    @pytest.mark.parametrize("method", [*plan.MAIN, *plan.LATE, *plan.FAMILY])
    def test_objectives(self, method):
        radius = 0.2 if method.removeprefix("late ") in plan.SEARCHED else None
        objective = training.make_objective(Run("cifar10lt", "LA", method, radius, 0, 200))
        base = method.removeprefix("late ").replace("-", "")
        last = getattr(objective, "objectives", [objective])[-1]
        assert type(last).__name__ == base
        assert objective.num_stages == (base == "SSESAM") + method.startswith("late") + 1
        if radius is not None:
            assert set(last.radius_values.values()) == ({0.1, 0.2} if base == "SSESAM" else {0.2})

    def test_the_tail_of_a_search_is_that_of_the_trainings(self, settings):
        from lightning_ssesam.data import long_tailed_counts

        settings.tiny = False
        for name, (classes, largest) in {"cifar10lt": (10, 5000), "tiny100lt": (100, 500)}.items():
            counts = long_tailed_counts(classes, largest, 100)
            tails = []
            for is_search in (False, True):
                kept = [n - int(n * 0.2 + 0.5) for n in counts] if is_search else counts
                data = type("Data", (), {"class_counts": kept, "num_classes": classes})
                run = Run(name, "CE", "ERM", None, 0, 10, is_search)
                tails.append(training.make_model(run, data, 10, settings, graphs=False).split.tail.tolist())
            assert tails[0] == tails[1], name
            assert sum(tails[0]) == {"cifar10lt": 5, "tiny100lt": 65}[name]

    def test_clock(self, monkeypatch):
        """After three epochs of 10 s each, 7 of 10 are left: 70 s, and 4 s more."""
        trainer = type("Trainer", (), {"max_epochs": 10})
        for deadline, is_late in ((1000 + 30 + 74.5, False), (1000 + 30 + 73.5, True)):
            clock, times = training.Clock(deadline, extra=4.0), iter([1010.0, 1020.0, 1030.0])
            monkeypatch.setattr(training.time, "time", lambda times=times: next(times))
            clock.on_train_epoch_end(trainer, None)
            clock.on_train_epoch_end(trainer, None)
            if is_late:
                with pytest.raises(training.OutOfTimeError) as error:
                    clock.on_train_epoch_end(trainer, None)
                assert error.value.args == (100.0,)
            else:
                clock.on_train_epoch_end(trainer, None)


class TestClaims:
    def test_one_process_trains_a_run(self, trains):
        claims = [training.Claims(Path(trains.scratch) / "claims") for _ in range(2)]
        first, second = training.next_run(trains, claims[0]), training.next_run(trains, claims[1])
        assert (first.method, second.method) == ("ERM", "SAM")
        write_json(Path(trains.output) / first.path, result_of(first))
        assert training.next_run(trains, claims[0]).radius == 0.1

    def test_only_what_ends_in_time(self, trains, monkeypatch):
        trains.tiny, trains.images = False, {"cifar10lt": "folder"}
        trains.epochs = 100
        # As long as nothing is known, ERM takes 68 s, and a training of SAM's search 28 s.
        for seconds, expected in ((80, "ERM"), (40, "SAM"), (20, None)):
            trains.deadline = time.time() + seconds
            claims = training.Claims(Path(trains.scratch) / str(seconds))
            run = training.next_run(trains, claims)
            assert (run and run.method) == expected
        # A training that was too long tells about the others.
        trains.deadline = time.time() + 60
        claims = training.Claims(Path(trains.scratch) / "again")
        claims.settle(Run("cifar10lt", "LA", "ERM", None, 0, 100), 9600 * 0.02, jobs=1)
        assert training.next_run(trains, claims) is None

    def test_waits_for_a_process_that_still_trains(self, trains, monkeypatch):
        claims = training.Claims(Path(trains.scratch) / "claims")
        monkeypatch.setattr(plan, "ordered", lambda *args: [run])
        run = Run("tiny100lt", "LA", "ERM", None, 0, 5)
        file = Path(trains.scratch) / "claims" / run.path.replace("/", "_")
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            claims.settle(run, None, 1)

        monkeypatch.setattr(training.time, "sleep", sleep)
        file.write_text(str(os.getppid()))
        assert training.next_run(trains, claims) is None
        assert slept == [0.5]
        # Nobody waits for one that has ended, or for itself.
        ended = subprocess.Popen(["true"])
        ended.wait()
        for pid in (ended.pid, os.getpid()):
            file.write_text(str(pid))
            assert training.next_run(trains, claims) is None
        assert slept == [0.5]

    def test_failed_and_late_trainings_are_not_kept_or_repeated(self, trains, monkeypatch):
        runs = [Run("tiny100lt", "CE", method, None, 0, 5) for method in ("ERM", "ASAM", "PGN")]
        monkeypatch.setattr(plan, "ordered", lambda *args: runs)
        monkeypatch.setattr(sys, "argv", ["x", str(trains.write())])
        begun = []

        def train(run, settings, graphs):
            begun.append(run.method)
            if run.method == "ERM":
                raise training.OutOfTimeError(99.0)
            if run.method == "ASAM":
                raise RuntimeError("CUDA error")
            return result_of(run)

        monkeypatch.setattr(training, "train", train)
        with pytest.raises(RuntimeError, match="CUDA error"):
            training.main()
        training.main()
        assert begun == ["ERM", "ASAM", "PGN"]
        assert list(read_all([Path(trains.output)])) == [runs[2].path]

    def test_without_graphs_where_they_are_refused(self, trains, monkeypatch):
        refusal = training.MisconfigurationException("no graphs")
        given = []

        def train(run, settings, graphs):
            given.append(graphs)
            if graphs:
                raise refusal
            return result_of(run)

        trains.device = "gpu"
        monkeypatch.setattr(plan, "ordered", lambda *args: [Run("tiny100lt", "CE", "ERM", None, 0, 5)])
        monkeypatch.setattr(training, "about", lambda settings: {"hardware": "card"})
        monkeypatch.setattr(training, "settings_of_child", lambda: (trains, []))
        monkeypatch.setattr(training, "train", train)
        training.main()
        assert given == [True, False]


class TestSteps:
    def test_contenders_and_files(self, settings, monkeypatch):
        monkeypatch.setattr(steps, "STEPS", 3)
        for method in ("ERM", "ImbSAM", "SSE-SAM stage 2"):
            monkeypatch.delitem(contenders.OBJECTIVES, method)
        monkeypatch.setattr(sys, "argv", ["x", str(settings.write()), "ResNet-32"])
        steps.main()
        path = Path(settings.output) / "steps" / "ResNet-32.json"
        result = read_json(path)
        assert result["is_whole"]
        assert list(result["methods"]) == ["SAM", "SSE-SAM stage 1"]
        for method, row in result["methods"].items():
            others = [name for name in row if name.startswith("SAM of pytorch-optimizer")]
            assert [*row] == ["plain", "eager", "engine", *others]
            assert len(others) == (method == "SAM")
            for one in row.values():
                assert one["quartiles"][0] <= one["ms"] <= one["quartiles"][1]
        assert result["bits"]["SSE-SAM stage 1"]["eager again"]["differing"] == []
        assert set(result["waits"]) == {f"{method} eager" for method in result["methods"]}
        # It is not made again, unless something has changed, or it was not finished.
        path.write_text(json.dumps({**result, "marked": True}))
        steps.main()
        assert read_json(path)["marked"]
        monkeypatch.setattr(contenders, "race", lambda *args: {})
        for changes in ({"source": "another"}, {"is_whole": False}):
            path.write_text(json.dumps({**result, **changes, "marked": True}))
            steps.main()
            assert "marked" not in read_json(path)

    def test_difference(self):
        start = {"start a": torch.zeros(2), "start b": torch.zeros(1)}
        first = {**start, "a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
        second = {**first, "a": torch.tensor([3.0, 0.5])}
        assert steps.difference(first, first) == {"tensors": 2, "differing": [], "share_of_the_way": 0.0}
        assert steps.difference(first, second) == {"tensors": 2, "differing": ["a"], "share_of_the_way": 0.1}

    def test_one_that_fails_is_left_out(self, settings):
        class Fake:
            def __init__(self, seconds, fails_at=None):
                self.seconds, self.fails_at, self.calls, self.ended = seconds, fails_at, 0, False

            def steps(self, number):
                self.calls += 1
                if self.calls == self.fails_at:
                    raise MemoryError("full")
                return self.seconds

            def end(self):
                self.ended = True

        made = {"fast": Fake(0.001), "late": Fake(0.002, fails_at=3), "early": Fake(0.002, fails_at=1)}
        starts = {name: lambda one=one: one for name, one in made.items()}

        def refuses():
            raise TypeError("no such option\nmore")

        found = contenders.race({**starts, "refused": refuses}, settings, number=2)
        assert found["fast"] == {"ms": 1.0, "quartiles": [1.0, 1.0]}
        assert found["late"] == found["early"] == {"error": "MemoryError: full"}
        assert found["refused"] == {"error": "TypeError: no such option"}
        assert made["fast"].ended
        assert made["fast"].calls == 1 + 4

    def test_the_engine_alone_makes_the_steps_of_the_trainer(self, settings):
        """The same weights after as many steps on one batch."""
        starts, nets = contenders.makers("ResNet-32", "SSE-SAM stage 1", settings), []
        make_net = contenders.make_net

        def keep(options):
            nets.append(make_net(options))
            return nets[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contenders, "make_net", keep)
            for name in ("eager", "engine"):
                contender = starts[name]()
                contender.steps(3)
                contender.end()
        assert torch.equal(nets[0].state_dict()["features.0.weight"], nets[1].state_dict()["features.0.weight"])
        before = make_net(contenders.options_of("ResNet-32", settings)).state_dict()["features.0.weight"]
        assert not torch.equal(nets[0].state_dict()["features.0.weight"], before)

    @pytest.mark.parametrize("name", ["plain", "engine"])
    def test_seconds_of_one_step(self, settings, monkeypatch, name):
        contender = contenders.makers("ResNet-32", "ERM", settings)[name]()
        times = iter([100.0, 108.0])
        monkeypatch.setattr(captures, "time", type("Time", (), {"perf_counter": staticmethod(lambda: next(times))}))
        assert contender.steps(4) == 2.0
        contender.end()

    def test_every_step_but_the_first_ones_is_watched(self, monkeypatch):
        modes = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
        watch = steps.Watch()
        for number in (9, 10):
            watch.on_train_batch_start(None, None, None, number)
            watch.on_train_batch_end(None, None, None, None, number)
        assert modes == ["default", "error", "default"]


class TestSharing:
    def start(self, settings, monkeypatch, number, make):
        """Measure in threads instead of processes; return their results or errors, and who made steps, in order."""
        made = []

        class Fake:
            def __init__(self, mode):
                self.mode = mode

            def steps(self, number):
                time.sleep(0.002)
                made.append((threading.current_thread().name, self.mode, number))

            def end(self):
                made.append((threading.current_thread().name, self.mode, "end"))

        fakes = {mode: partial(make or Fake, mode) for mode in ("plain", "eager", "graphs")}
        monkeypatch.setattr(contenders, "makers", lambda *given: fakes)
        sharing.meet_at(threading.Barrier(number, timeout=20))
        with ThreadPoolExecutor(number, thread_name_prefix="t") as pool:
            futures = [pool.submit(sharing.measure, index, settings) for index in range(number)]
        return [future.exception() or future.result() for future in futures], made

    def test_turns(self, settings, monkeypatch):
        """One process, then two, of each kind, and nobody makes steps out of turn."""
        monkeypatch.setattr(sharing, "SECONDS", 0.5)
        settings.device = "gpu"
        (first, second), made = self.start(settings, monkeypatch, 2, None)
        assert list(first) == [(mode, number) for mode in ("eager", "graphs") for number in (1, 2)]
        assert list(second) == [("eager", 2), ("graphs", 2)]
        # Five steps in two milliseconds, or in more.
        assert all(0 < rate < 2500 for rates in (first, second) for rate in rates.values())
        steps = [(name, mode) for name, mode, number in made if number == 5]
        turns = [(mode, len({name for name, _ in group})) for mode, group in grouped_by_mode(steps)]
        assert turns == [("eager", 2), ("graphs", 2)]
        for mode, group in grouped_by_mode(steps):
            names = [name for name, _ in group]
            # The first one makes steps alone, before the other begins.
            assert names[0] == "t_0", mode
        assert sorted(str(number) for *_, number in made if number != 5) == ["8"] * 4 + ["end"] * 4

    def test_nobody_waits_for_one_that_has_failed(self, settings, monkeypatch):
        begin, calls = time.time(), itertools.count()

        def make(mode):
            if next(calls):
                raise MemoryError("full")
            return type("Fake", (), {"steps": lambda self, number: None})()

        errors, _ = self.start(settings, monkeypatch, 2, make)
        assert sorted(type(error).__name__ for error in errors) == ["BrokenBarrierError", "MemoryError"]
        assert time.time() - begin < 15

    def test_rates_add_up(self):
        found = [{("eager", 1): 10.0, ("eager", 2): 6.0, ("eager", 8): 1.0}, {("eager", 2): 7.0}]
        assert sharing.add_up(found) == {"eager": {"1": 10.0, "2": 13.0, "8": 1.0}}

    @pytest.mark.parametrize(
        ("rates", "best"), [((80, 85, 87), 1), ((80, 100, 105), 2), ((80, 100, 150), 4), ((80, 70, 100), 4)]
    )
    def test_a_larger_number_must_gain(self, settings, rates, best):
        settings.device = "gpu"
        numbers = dict(zip("124", map(float, rates), strict=True))
        write_json(
            Path(settings.output) / "sharing.json", {"rates": {"eager": {"1": 1.0, "2": 9.0}, "graphs": numbers}}
        )
        assert plan.best_number(settings) == best

    def test_nothing_measured(self, settings):
        assert plan.best_number(settings) == 1

    def test_measured_once_for_a_card(self, settings, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["x", str(settings.write())])
        monkeypatch.setattr(sharing, "ProcessPoolExecutor", lambda *args, **kwargs: pytest.fail("it measured"))
        known = {"hardware": about(settings)["hardware"], "rates": {}}
        write_json(Path(settings.output) / "sharing.json", known)
        sharing.main()
        assert capsys.readouterr().out == "measured already\n"
        write_json(Path(settings.output) / "sharing.json", {**known, "hardware": "another"})
        with pytest.raises(pytest.fail.Exception, match="it measured"):
            sharing.main()


def grouped_by_mode(steps):
    return [(mode, list(group)) for mode, group in itertools.groupby(steps, key=lambda step: step[1])]


class TestChildren:
    def start(self, code, **env):
        return [sys.executable, "-S", "-c", code]

    def test_time_limit_status_and_log(self):
        with Children(Path("logs"), Path(), dict(os.environ)) as children:
            assert children.run("ok", self.start("print('hello')"), time.time() + 20)[0] == 0
            assert children.run("bad", self.start("raise SystemExit(7)"), time.time() + 20)[0] == 7
            begin = time.time()
            status, end = children.run("hangs", self.start("import time; time.sleep(60)"), time.time() + 0.3)
            assert status is None
            assert end.startswith("ended at its time limit")
            assert time.time() - begin < 5
        assert Path("logs/ok.txt").read_text() == "hello\n"

    def test_grandchildren_end_too(self):
        code = (
            "import subprocess, sys, time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "print(subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']).pid, flush=True);"
        )
        with Children(Path("logs"), Path(), dict(os.environ)) as children:
            children.start("left", self.start(code + "time.sleep(60)"))
            children.start("ended", self.start(code))
            wait_for(lambda: all(Path(f"logs/{name}.txt").read_text() for name in ("left", "ended")))
        pids = [int(Path(f"logs/{name}.txt").read_text()) for name in ("left", "ended")]
        wait_for(lambda: not any(is_running(pid) for pid in pids))

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
    def test_children_end_with_their_parent(self, number):
        code = (
            f"import sys, time, os; sys.path.insert(0, {str(ROOT / 'benchmarks')!r});"
            "from pathlib import Path; from gpu_parts.children import Children\n"
            "with Children(Path('logs'), Path(), dict(os.environ)) as children:\n"
            "    command = [sys.executable, '-S', '-c', 'import time; time.sleep(60)']\n"
            "    Path('pid').write_text(str(children.start('child', command).process.pid))\n"
            "    time.sleep(60)\n"
        )
        parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        wait_for(lambda: Path("pid").exists() and Path("pid").read_text())
        child = int(Path("pid").read_text())
        assert is_running(child)
        parent.send_signal(number)
        status = parent.wait(10)
        assert status == (-number if number == signal.SIGKILL else 128 + number)
        wait_for(lambda: not is_running(child))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestFolders:
    def test_images_are_in_memory_if_there_is_room(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folders, "MEMORY", tmp_path / "memory")
        for has_room, place in ((True, "memory/.ssesam_gpu_"), (False, "out/.ssesam_gpu_")):
            (tmp_path / "memory").mkdir(exist_ok=True)
            monkeypatch.setattr(folders, "_has_room", lambda folder, has_room=has_room: has_room)
            with contextlib.suppress(KeyError), folders.thrown_away(tmp_path / "out") as (scratch, made):
                assert scratch == tmp_path / f"out/.ssesam_gpu_{os.getpid()}"
                assert str(made).startswith(str(tmp_path / place))
                (made / "file").touch()
                raise KeyError
            assert not os.listdir("out")
            assert not os.listdir("memory")

    def test_room(self, tmp_path, monkeypatch):
        assert folders._has_room(tmp_path)
        assert not folders._has_room(Path("/proc"))
        monkeypatch.setattr(folders, "_ROOM", 1 << 60)
        assert not folders._has_room(tmp_path)

    def test_what_a_killed_call_has_left_behind(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folders, "MEMORY", tmp_path / "memory")
        ended = subprocess.Popen(["true"])
        ended.wait()
        for parent in ("out", "memory"):
            for name in (f".ssesam_gpu_{ended.pid}", f".ssesam_gpu_{os.getppid()}", ".ssesam_gpu_x", "results"):
                Path(parent, name).mkdir(parents=True)
        with folders.thrown_away(tmp_path / "out"):
            expected = sorted([f".ssesam_gpu_{os.getppid()}", ".ssesam_gpu_x", "results"])
            wait_for(lambda: f".ssesam_gpu_{ended.pid}" not in os.listdir("out") + os.listdir("memory"))
        assert sorted(os.listdir("out")) == sorted(os.listdir("memory")) == expected

    def test_a_slow_removal_goes_on_by_itself(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folders, "_has_room", lambda folder: False)
        Path("slow").mkdir()
        Path("slow/rm").write_text("#!/bin/sh\nsleep 0.3\ntouch removed\n")
        Path("slow/rm").chmod(0o755)
        with folders.thrown_away(tmp_path / "out", seconds=0.05):
            monkeypatch.setenv("PATH", "slow", prepend=os.pathsep)
        assert not Path("removed").exists()
        wait_for(lambda: Path("removed").exists())


def run_script(options):
    """Run the script. Its trainings begin in a copy of this process, which has imported what they need."""

    def start(command, preexec_fn=None, env=None, **options):
        def train():
            preexec_fn()
            # Among them is the pipe that tells the parent that the program has begun.
            os.closerange(3, 1000)
            sys.argv = ["training", *command[3:]]
            try:
                training.main()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)

        return popen(command, env=env, preexec_fn=train if "gpu_parts.training" in command else preexec_fn, **options)

    popen, subprocess.Popen = subprocess.Popen, start
    sys.argv = ["gpu.py", *options.split()]
    gpu.main()


class TestScript:
    OPTIONS = "--minutes 1 --device cpu --tiny --epochs 2 --seeds 1 --parts trainings --output out --images tiny100lt"

    def test_stopped_in_the_middle_and_called_again(self, tmp_path, monkeypatch):
        """A run that SIGTERM ends leaves whole results, the tables, and nothing else; the next call goes on."""
        make_images(tmp_path / "tiny100lt")
        script = start_process(run_script, self.OPTIONS)
        results = tmp_path / "out" / "results"
        wait_for(lambda: len(list(results.rglob("*.json"))) > 4, seconds=60)
        # Meanwhile no other call uses the folder, nor touches what this one is writing.
        (results / "half.json.1.tmp").touch()
        monkeypatch.setattr(sys, "argv", ["gpu.py", *self.OPTIONS.split()])
        with pytest.raises(SystemExit, match=r"Another call is at work in .*out'. Wait until it has ended, or choose"):
            gpu.main()
        assert (results / "half.json.1.tmp").exists()
        made = [Path("out", f".ssesam_gpu_{script.pid}"), folders.MEMORY / f".ssesam_gpu_{script.pid}"]
        assert any((path / name / "train").is_dir() for path in made for name in ("tiny100lt", "images/tiny100lt"))
        script.terminate()
        script.join(3)
        assert script.exitcode == 128 + signal.SIGTERM
        assert not any(path.exists() for path in made)
        assert sorted({*os.listdir("out")} - {".lock"}) == ["docs", "logs", "results"]
        found = read_all([results], tiny=True)
        assert len(found) == len([path for path in results.rglob("*") if path.is_file()]) > 4
        assert all(result["recall"] for result in found.values())
        assert all(result["tiny"] for result in found.values())
        assert "| logit adjustment | ERM |" in Path("out/docs/results.md").read_text()
        # The lock is free. Nothing is made again, whose mark says that it is here.
        first = next(iter(found))
        write_json(results / first, {**found[first], "marked": True})
        monkeypatch.setattr(gpu.Call, "trainings", lambda call, *_: begun.append(next_of(call.settings)))
        begun, next_of = [], lambda settings: first in settings.found()
        gpu.main()
        assert begun == [True]
        assert read_json(results / first)["marked"]

    def test_tiny_results_are_not_published(self, monkeypatch, tmp_path):
        """Neither by ``--write``, nor by the next real call; and a reader that meets one leaves it out."""
        monkeypatch.setattr(gpu, "COMMITTED", tmp_path / "committed")
        monkeypatch.setattr(gpu, "run", lambda options, places, output: folders_used.append(output))
        monkeypatch.setattr(gpu, "write_tables", lambda options, output: None)
        folders_used = []
        for words in ([], ["--tiny"]):
            monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
            gpu.main()
        assert folders_used == [tmp_path / "build/gpu", tmp_path / "build/gpu_tiny"]
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(gpu, "COMMITTED", tmp_path / "committed")
        monkeypatch.setattr(gpu, "run", lambda *args: pytest.fail("it began"))
        monkeypatch.setattr(tables, "write", lambda *args: pytest.fail("it wrote"))
        for is_tiny, refused in ((True, ["--write", "", "--write --tiny"]), (False, ["--tiny"])):
            write_json(Path("out/results/sharing.json"), {"rates": {}, "tiny": is_tiny})
            for words in refused:
                monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", "out", *words.split()])
                expected = "no results of `--tiny`" if is_tiny else "only results of `--tiny`"
                with pytest.raises(SystemExit, match=f"to be a folder with {expected}, but got .*which has sharing.js"):
                    gpu.main()
            assert not Path("committed").exists()
        write_json(Path("out/results/sharing.json"), {"rates": {}, "tiny": True})
        assert read_all([Path("out/results")]) == {}
        assert list(read_all([Path("out/results")], tiny=True)) == ["sharing.json"]

    def test_unfinished_files_are_not_published(self, monkeypatch, tmp_path):
        monkeypatch.setattr(gpu, "COMMITTED", tmp_path / "committed")
        monkeypatch.setattr(tables, "write", lambda *args: None)
        write_json(Path("out/results/a/b.json"), {"x": 1})
        Path("out/results/a/c.json.17.tmp").touch()
        gpu.write_tables(gpu.parse_arguments(["--write", "--output", "out"]), Path("out"))
        assert [path.name for path in Path("committed").rglob("*") if path.is_file()] == ["b.json"]

    def test_an_output_that_is_a_file(self, monkeypatch):
        Path("out").touch()
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", "out"])
        with pytest.raises(SystemExit, match=r"`--output` to be a folder that can be written to \(.*, but got '.*out'"):
            gpu.main()

    @pytest.mark.parametrize("part", ["tests", "steps", "sharing", "trainings"])
    def test_no_gpu_ends_every_part(self, trains, part, monkeypatch, capsys):
        with Children(Path("logs"), Path(), dict(os.environ)) as children:
            call = gpu.Call(trains, children, time.time() + 60)
            monkeypatch.setattr(call, "command", lambda *_: [sys.executable, "-S", "-c", "raise SystemExit(78)"])
            with pytest.raises(SystemExit, match="Expected a GPU that torch can use, but there is none"):
                getattr(call, part)(*([{}, Path()] if part == "trainings" else []))
        assert "done" not in capsys.readouterr().out

    @pytest.mark.parametrize("part", ["tests", "steps", "sharing", "trainings"])
    def test_no_time_left(self, trains, part, monkeypatch, capsys):
        monkeypatch.setattr(gpu, "NETWORKS", ("ResNet-32",))
        call = gpu.Call(trains, None, time.time() + gpu._END)
        getattr(call, part)(*([{"tiny100lt": Path()}, Path()] if part == "trainings" else []))
        said = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]
        names = {"steps": ["ResNet-32"], "trainings": ["images of tiny100lt", "trainings"]}.get(part, [part])
        assert said == [f"{name}: no time left" for name in names]

    @pytest.mark.parametrize(
        ("code", "end"), [("import time; time.sleep(60)", "ended at its time limit"), ("1 / 0", r"failed \(status 1\)")]
    )
    def test_how_a_part_ends(self, settings, code, end, monkeypatch, capsys):
        with Children(Path("logs"), Path(), dict(os.environ)) as children:
            call = gpu.Call(settings, children, time.time() + 60)
            monkeypatch.setattr(call, "limit", lambda name: time.time() + (0.2 if code.startswith("import") else 30))
            monkeypatch.setattr(call, "command", lambda *_: [sys.executable, "-S", "-c", code])
            call.sharing()
        assert re.search(rf"\] sharing: {end} after \d+ s\n$", capsys.readouterr().out)
        assert not Path(settings.output, "sharing.json").exists()

    def test_images_that_cannot_be_laid_out(self, settings, tmp_path, capsys):
        with Children(Path("logs"), Path(), gpu.environment(tmp_path)) as children:
            call = gpu.Call(settings, children, time.time() + 60)
            call.trainings({"tiny100lt": tmp_path / "missing"}, tmp_path)
            call.trainings({}, tmp_path)
        said = capsys.readouterr().out
        assert "images of tiny100lt: failed (status 1)" in said
        assert "trainings: none, since the images could not be laid out (logs)\n" in said
        assert said.endswith("trainings: none, since there are no images (--images)\n")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--minutes 0", "Expected argument `--minutes` to be at least 0.1, but got 0.0."),
            ("--epochs 0", "Expected argument `--epochs` to be at least 1, but got 0."),
            ("--seeds -1", "Expected argument `--seeds` to be at least 1, but got -1."),
            ("--jobs -1", "Expected argument `--jobs` to be at least 0, but got -1."),
            ("--device cpu", "Expected argument `--device` to be gpu, or cpu with `--tiny`, but got cpu without it."),
        ],
    )
    def test_bad_arguments(self, options, message, capsys):
        with pytest.raises(SystemExit):
            gpu.parse_arguments(options.split())
        assert message in capsys.readouterr().err

    def test_bad_images_write_nothing(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--images", "missing", "--output", "out"])
        with pytest.raises(SystemExit, match="missing, which does not exist"):
            gpu.main()
        assert not Path("out").exists()

    def test_environment_writes_into_the_scratch_folder(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PYTHONPATH", "given")
        found = gpu.environment(tmp_path)
        assert found["TORCHINDUCTOR_COMPILE_THREADS"] == found["PYTHONUNBUFFERED"] == "1"
        assert found["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(ROOT / "benchmarks"), "given"]
        for name in ("TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            assert Path(found[name]).parent == tmp_path
            assert Path(found[name]).is_dir()

    def test_fingerprint_changes_with_the_code(self, tmp_path):
        (tmp_path / "a.py").write_text("1")
        first = fingerprint([tmp_path / "a.py"], tmp_path)
        assert fingerprint([tmp_path / "a.py"], tmp_path) == first
        assert fingerprint([tmp_path / "a.py"], tmp_path.parent) != first
        (tmp_path / "a.py").write_text("2")
        assert fingerprint([tmp_path / "a.py"], tmp_path) != first

    def test_crashed_processes_start_again_a_few_times(self, trains, monkeypatch, tmp_path, capsys):
        call = gpu.Call(trains, Children(Path("logs"), Path(), dict(os.environ)), time.time() + 60)
        monkeypatch.setattr(gpu.images, "SOURCES", {})
        monkeypatch.setattr(gpu, "_RESTARTS", 2)
        monkeypatch.setattr(gpu.time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 10))
        monkeypatch.setattr(
            call, "command", lambda part: [sys.executable, "-S", "-c", "print('begun'); raise SystemExit(1)"]
        )
        call.trainings({}, tmp_path)
        assert Path("logs/training_0.txt").read_text() == "begun\n" * 3
        assert capsys.readouterr().out.endswith("trainings: 1 of 1 processes failed (logs)\n")

    def test_a_part_without_a_gpu_says_so(self, settings, monkeypatch):
        settings.device = "gpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["x", str(settings.write())])
        with pytest.raises(SystemExit) as status:
            training.settings_of_child()
        assert status.value.code == gpu.NO_GPU

    def test_files_with_tests_for_a_gpu(self):
        assert cuda_tests.files(ROOT / "tests")[0].name == "test_cuda.py"
        for name, text in {"test_a": "needs a GPU", "test_cuda": "needs a GPU", "test_b": "no"}.items():
            Path(f"{name}.py").write_text(text)
        assert [path.name for path in cuda_tests.files(Path())] == ["test_cuda.py", "test_a.py"]

    def test_tests_that_have_passed_are_not_run_again(self, settings, monkeypatch, tmp_path):
        """They are if code, versions, card or the tests themselves have changed, or if one has failed."""
        (tmp_path / "tests").mkdir()
        test = tmp_path / "tests" / "test_cuda.py"
        test.write_text("# needs a GPU")
        monkeypatch.setattr(cuda_tests, "ROOT", tmp_path)
        monkeypatch.setattr(sys, "argv", ["x", str(settings.write())])
        ran, outcome = [], {"failed": 0, "status": 0}

        def run(options):
            failure = "<testcase name='b'><failure/></testcase>" * outcome["failed"]
            (Path(settings.scratch) / "tests.xml").write_text(f"<a><testcase name='a'/>{failure}</a>")
            ran.append(options[-1])
            return outcome["status"]

        def call(failed=0, status=0):
            outcome.update(failed=failed, status=status)
            before = len(ran)
            with contextlib.suppress(SystemExit):
                cuda_tests.main()
            return len(ran) - before

        monkeypatch.setattr(cuda_tests.pytest, "main", run)
        path = Path(settings.output) / "tests.json"
        assert (call(status=2), path.exists()) == (1, False)
        assert [call(failed=1, status=1), call(), call()] == [1, 1, 0]
        assert ran[-1] == str(test)
        made = read_json(path)
        assert (made["passed"], made["failed"], made["tiny"]) == (1, 0, True)
        for changes in ({"source": "x"}, {"torch": "1"}, {"hardware": "card"}, {"failed": 1}, {"passed": 0}):
            write_json(path, {**made, **changes})
            assert [call(), call()] == [1, 0]
        test.write_text("# needs a GPU, and has changed")
        assert [call(), call()] == [1, 0]

    def test_counts_of_tests(self):
        cases = '<testcase name="a"/><testcase name="b"><failure/></testcase><testcase name="c"><skipped/></testcase>'
        Path("tests.xml").write_text(f"<testsuites><testsuite>{cases}<testcase name='d'/></testsuite></testsuites>")
        expected = {"passed": 2, "failed": 1, "failures": ["b"], "skipped": 1}
        assert tables.counts_of_tests(Path("tests.xml")) == expected
        assert tables.counts_of_tests(Path("missing.xml")) is None

    def test_a_file_that_is_not_whole_is_no_result(self):
        Path("results").mkdir()
        Path("results/a.json").write_text("{")
        write_json(Path("results/b/c.json"), {"x": 1})
        assert read_all([Path("results")]) == {"b/c.json": {"x": 1}}
        assert [path.name for path in Path("results/b").iterdir()] == ["c.json"]


class TestCapturedTable:
    @pytest.fixture
    def data(self, tmp_path, monkeypatch):
        source = images.SOURCES["tiny100lt"]._replace(tail_below=8)
        monkeypatch.setitem(images.SOURCES, "tiny100lt", source)
        make_images(tmp_path / "tiny100lt")
        return captured_table.Data(source, tmp_path / "tiny100lt", batch=8, device=torch.device("cpu"))

    @pytest.mark.usefixtures("float64")
    def test_training_against_a_plain_one(self, data):
        """SAM in the last fifth, by hand: crops, flips, logit adjustment, perturbation, learning rates, momentum."""

        def network(classes):
            return SmallConvNet(classes, in_channels=3, width=8, norm="batch")

        run = Run("tiny100lt", "LA", "late SAM", 0.1, 5, 5)
        made = captured_table.Training(run, data, network, torch.device("cpu"))
        torch.manual_seed(5)
        net = network(4)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        prior, update = torch.tensor([12.0, 9.0, 6.0, 4.0]).log(), 0
        generator = torch.Generator().manual_seed(1005)
        made.generator.manual_seed(1005)
        padded = torch.nn.functional.pad(data.padded[:, :, 4:-4, 4:-4], [4] * 4)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        for epoch in range(5):
            made.draw()
            order = torch.randperm(31, generator=generator)[:24].view(3, 8)
            offsets = torch.randint(9, (3, 2, 8), generator=generator)
            mirrored = torch.randint(2, (3, 1, 8), generator=generator)
            for number in range(3):
                made.captured.replay(made.stage_at(epoch))
                crops = []
                for k, index in enumerate(order[number]):
                    row, column = offsets[number, :, k]
                    crop = padded[index, :, row : row + 32, column : column + 32]
                    crops.append(crop.flip(-1) if mirrored[number, 0, k] else crop)
                batch, targets = (torch.stack(crops) / 255 - mean) / std, data.targets[order[number]]
                optimizer.param_groups[0]["lr"] = 0.1 * training.share_of_rate(update, 15, 7)
                sam_gradient(net, batch, targets, prior, rho=0.1 if epoch == 4 else 0.0)
                optimizer.step()
                update += 1
        torch.testing.assert_close(made.net.state_dict(), net.state_dict(), rtol=0, atol=1e-10)

    def test_stages(self, data):
        made = captured_table.Training.__new__(captured_table.Training)
        made.run = Run("tiny100lt", "LA", "late SSE-SAM", 0.1, 0, 10)
        assert [made.stage_at(epoch) for epoch in range(10)] == [1] * 8 + [2, 3]

    def test_script(self, data, monkeypatch, capsys):
        options = "--images tiny100lt --output out --epochs 3 --tiny --runs ERM::CE:0"
        words = [*options.split(), "SSE-SAM:0.1:LA:1", "SSE-SAM:0.05:LA:1"]
        monkeypatch.setattr(sys, "argv", ["captured_table.py", *words])
        captured_table.main()
        result = read_json(Path("out/captured_3_epochs.json"))
        runs = [(run["method"], run["seed"]) for run in result["runs"]]
        assert runs == [("ERM", 0), ("SSE-SAM 0.05/0.1", 1), ("SSE-SAM 0.025/0.05", 1)]
        # The file has all that the table of the documentation needs.
        printed = capsys.readouterr().out.rstrip()
        assert tables.captured({"captured/x.json": result}) == printed
        rows = [row for row in printed.splitlines() if row.startswith(("| logit", "| cross"))]
        ms = result["replayed_ms"]
        costs = [1.0, *[(0.7 * ms["SSE-SAM stage 1"] + 0.3 * ms["ImbSAM"]) / ms["ERM"]] * 2]
        in_order = [result["runs"][k] for k in (2, 1, 0)]
        for row, run, cost in zip(rows, in_order, costs[::-1], strict=True):
            recall = 100 * np.array(run["recall"])
            groups = f"| 1 | {recall.mean():.1f} | {recall[:2].mean():.1f} | {recall[2:].mean():.1f} |"
            # Ten of the 31 images are in the tail.
            fitted = f"{100 * run['train']['right_tail_a_batch'] / (31 * 10 / 31):.1f}"
            assert row.endswith(f"| {run['method']} {groups} {fitted} | {cost:.1f} |")
        assert os.listdir("out") == ["captured_3_epochs.json"]
        # It is no result of a real network.
        assert read_all([Path("out")]) == {}

    def test_images_of_the_tail_that_are_known(self, data, tmp_path):
        """The share of a batch, from the files."""
        made = captured_table.Training(
            Run("tiny100lt", "LA", "SAM", 0.1, 0, 12), data, lambda n: SmallConvNet(n, in_channels=3, width=8), CPU
        )
        with torch.no_grad():
            pixels = data.normalised(data.padded[:, :, 4:-4, 4:-4])
            # An untrained network takes all images for one class, but for this.
            made.net.classifier.weight.normal_().neg_()
            made.net.classifier.bias.sub_(made.net.eval()(pixels).mean(0))
        recalls = naive_recalls(made.net, tmp_path / "tiny100lt" / "train")
        expected = 8 * (6 * recalls[2] + 4 * recalls[3]) / 31
        assert made.result()["train"]["right_tail_a_batch"] == pytest.approx(expected, abs=1e-5)
        assert 0 < expected < 8 * 10 / 31

    def test_stages_are_those_of_the_committed_table(self):
        committed = json.loads((COMMITTED / "captured" / "cifar10lt_61_epochs.json").read_text())
        stages = {run["method"]: run["stages"] for run in committed["runs"]}
        compared = 0
        for method, radius in itertools.product((*plan.MAIN, *plan.LATE), (None, 0.05, 0.1, 0.2)):
            if (radius is None) == (method == "ERM"):
                run = Run("cifar10lt", "LA", method, radius, 0, 61)
                label = f"{method} {'/'.join(f'{value:g}' for value in run.radii.values())}".strip()
                if label in stages:
                    assert captured_table.stages_of(run) == stages[label]
                    compared += 1
        assert compared >= 6
        late = captured_table.stages_of(Run("cifar10lt", "LA", "late SSE-SAM", 0.2, 0, 61))
        assert late == [[0.8, None, 0.0], [0.9, 0.1, 0.2], [1.0, 0.0, 0.2]]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--epochs 0 --runs ERM::CE:0", "Expected argument `--epochs` to be at least 1, but got 0."),
            ("--epochs -3 --runs ERM::CE:0", "Expected argument `--epochs` to be at least 1, but got -3."),
            ("--runs SAM:-1:LA:2", "Expected argument `--runs` to be METHOD.*finite radius > 0.*got 'SAM:-1:LA:2'"),
            ("--runs ERM::CE:0 --output tiny100lt/train/file", "Expected argument `--output` to be a folder that can"),
        ],
    )
    def test_bad_arguments(self, data, options, message, monkeypatch, capsys):
        Path("tiny100lt/train/file").touch()
        monkeypatch.setattr(sys, "argv", ["captured_table.py", "--images", "tiny100lt", "--tiny", *options.split()])
        with pytest.raises(SystemExit) as error:
            captured_table.main()
        assert re.search(message, f"{error.value} {capsys.readouterr().err}")
        assert not Path("build").exists()

    def test_a_tiny_table_has_a_folder_of_its_own(self, monkeypatch):
        for words, folder in (([], "build/captured"), (["--tiny"], "build/captured_tiny")):
            monkeypatch.setattr(sys, "argv", ["x", "--images", "a", "--runs", "ERM::CE:0", *words])
            assert captured_table.parse_arguments().output == Path(folder)

    def test_on_a_cpu_functions_are_called(self):
        calls = []
        captured = Captured(CPU)
        captured.add("key", lambda: calls.append(1))
        assert calls == []
        captured.replay("key")
        assert calls == [1]


def sam_gradient(net, batch, targets, prior, rho):
    """Leave the gradient of SAM in ``.grad``; batch norm's statistics move once."""

    def loss():
        return torch.nn.functional.cross_entropy(net(batch) + prior, targets)

    net.zero_grad()
    loss().backward()
    if rho == 0:
        return
    gradients = [p.grad.clone() for p in net.parameters()]
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    weights = [p.detach().clone() for p in net.parameters()]
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    with torch.no_grad():
        for p, g in zip(net.parameters(), gradients, strict=True):
            p.add_(rho * g / norm)
    net.zero_grad()
    loss().backward()
    with torch.no_grad():
        for p, weight in zip(net.parameters(), weights, strict=True):
            p.copy_(weight)
        for name, value in net.named_buffers():
            value.copy_(buffers[name])


def test_committed_results_are_small():
    files = [path for path in COMMITTED.rglob("*") if path.is_file()]
    assert all(path.suffix == ".json" and path.stat().st_size < 20_000 for path in files)
