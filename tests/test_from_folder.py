"""From a folder of pictures to predictions for new ones: the commands of the README, and which weights predict."""

import csv
import json
import logging
import math
import re
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from test_compare import made_up

from lightning_ssesam import LongTailClassifier
from lightning_ssesam.cli import main
from lightning_ssesam.data import ImageFolderLT
from lightning_ssesam.experiments.weights import copy_best, find_best

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
COLORS = {"cat": (220, 40, 40), "dog": (40, 200, 60), "owl": (50, 60, 220)}


@pytest.fixture
def in_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-ssesam"])


def photo(path, name, seed):
    """A picture of an odd size, in the color of its class."""
    random = np.random.default_rng(seed)
    noise = random.integers(-40, 36, (random.integers(20, 90), random.integers(20, 90), 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(noise + COLORS[name], 0, 255).astype(np.uint8)).save(path)


@pytest.mark.usefixtures("in_a_terminal", "no_pictures")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_four_commands_of_the_readme(capsys):
    """They go from photos of differing sizes to rows for new ones, whose classes are right."""
    section = README.read_text().partition("## Four commands")[2].partition("\n## ")[0]
    install, compare, look, predict = re.search(r"```bash\n(.*?)```", section, re.DOTALL).group(1).splitlines()
    assert "pip install" in install
    for number, (name, count) in enumerate({"cat": 20, "dog": 14, "owl": 8}.items()):
        for index in range(count):
            photo(Path("images", name, f"IMG_{index}.jpg"), name, 100 * number + index)
    for seed in range(9):
        photo(Path("new_images", "deep" if seed % 2 else "", f"{seed}.jpg"), list(COLORS)[seed % 3], 1000 + seed)
    short = [
        "--epochs=6",
        "--seeds=1",
        "--jobs=1",
        "--methods=ERM,SAM",
        "--data.val_fraction=0.3",
        "--data.batch_size=6",
    ]
    main([*compare.split()[1:], *short, "--trainer={accelerator: cpu}"])
    printed = capsys.readouterr().out
    assert Path(look.removeprefix("python -m webbrowser ")).is_file()
    named, command = printed.splitlines()[-2:]
    assert command == predict.replace("new_images", "FOLDER")
    method = re.match(r"Best on the validation images: (\w+), seed 0\.", named).group(1)
    main([*predict.split()[1:], "--device=cpu"])
    with Path("predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [list(COLORS)[int(Path(row["file"]).stem) % 3] for row in rows]
    assert len(rows) == 9
    # It predicts with the weights of the method that it names, whose configuration lies beside them.
    (kept,) = Path("photos/weights").glob(f"{method}-*")
    states = [torch.load(path)["state_dict"] for path in (kept / "seed-0.ckpt", Path("photos/best/weights.ckpt"))]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert (kept / "config.yaml").read_text() == Path("photos/best/config.yaml").read_text()
    classifier = LongTailClassifier.load_from_checkpoint("photos/best/weights.ckpt").eval()
    with Image.open(rows[0]["file"]) as image, torch.inference_mode():
        (shares,) = classifier.probabilities(classifier.image_input.transform()(image)[None])
    assert float(rows[0]["probability"]) == pytest.approx(float(shares.max()), abs=2e-5)


def test_links_to_some_of_the_classes():
    """The commands of docs/some_classes.md: folders inside the folder of a class belong to it."""
    counts = {"cat": 9, "dog": 7, "frog": 5, "bird": 3, "yak": 2}
    for name, count in counts.items():
        for index in range(count):
            photo(Path("images", name, f"{index}.png"), "cat", index)
    commands = re.search(r"```bash\n(.*?)lightning-ssesam", (DOCS / "some_classes.md").read_text(), re.DOTALL).group(1)
    subprocess.run(["sh", "-e", "-c", commands], check=True)
    data = ImageFolderLT("some", image_size=16)
    listed = data.file_sets()["train"].targets.bincount().tolist()
    assert dict(zip(data.class_names, listed, strict=True)) == {"cat": 9, "dog": 7, "rare": 8}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_notebook(monkeypatch, capsys, caplog):
    """Its cells run in an empty folder, in a tenth of the epochs. It has the outputs of all that print or draw."""
    # It silences Lightning in its process. This puts the level back.
    caplog.set_level(logging.getLogger("lightning.pytorch").level, "lightning.pytorch")
    notebook = json.loads((DOCS.parent / "examples" / "from_folder_to_predictions.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    monkeypatch.setattr("matplotlib.pyplot.subplots", lambda *args, **kwargs: _figure(*args, **kwargs))
    names, drawn = {}, 0
    for cell in cells:
        code = "".join(cell["source"]).replace("EPOCHS = 20", "EPOCHS = 2")
        with warnings.catch_warnings():
            exec(compile(code, "notebook", "exec"), names)
        printed = capsys.readouterr().out
        shown = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        assert len(printed.splitlines()) == len(shown.splitlines())
        pictures = [output["data"]["image/png"] for output in cell["outputs"] if "data" in output]
        assert len(pictures) == ("subplots" in code)
        drawn += len(pictures)
    assert drawn == 2
    assert "EPOCHS = 20" in "".join("".join(cell["source"]) for cell in cells)
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    model = LongTailClassifier.load_from_checkpoint("digits.ckpt").eval()
    with torch.inference_mode():
        expected = model(names["pictures"])
    torch.testing.assert_close(names["logits"].detach(), expected, rtol=0, atol=1e-5)
    hits = [(names["shares"].argmax(1) == names["labels"])[names["labels"] == label] for label in range(10)]
    assert list(names["recalls"].values()) == pytest.approx([100 * float(hit.float().mean()) for hit in hits])
    own = names["shares"].gather(1, names["labels"][:, None])[:, 0]
    chosen, rest = names["worst"], set(names["of_tail"].tolist()) - set(names["worst"].tolist())
    assert own[chosen].max() <= min(own[index] for index in rest)
    with Path("predictions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 300


def _figure(*args, figsize, layout):
    """Subplots of a figure without a window."""
    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(*args)


def run(method, seed, *curve, **kwargs):
    made = made_up(method, seed, **kwargs)
    made.curves["all"] = list(curve)
    made.accuracy["all"] = 1 - curve[-1] if curve else 0.5
    return made


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        # The mean over the seeds decides, then the best seed; not the test images, and not the best epoch.
        ([run("a", 0, 0.9, 0.5), run("a", 1, 0.6), run("b", 0, 0.9, 0.2), run("b", 1, 0.95)], ("b", 1)),
        ([run("a", 0, 0.9, 0.5), run("a", 1, 0.7), run("b", 0, 0.2), run("b", 1, 0.8)], ("a", 1)),
        ([run("a", 0, 0.5), run("b", 0, 0.5), run("b", 1, 0.5)], ("a", 0)),
        ([run("a", 0, 0.5), run("a", 1, 0.5)], ("a", 0)),
        ([run("a", 0, 0.9, diverged=True), run("a", 1, 0.9), run("b", 0, 0.1), run("b", 1, 0.1)], ("b", 0)),
        ([run("a", 0, math.nan), run("b", 0, 0.1)], ("b", 0)),
        ([run("a", 0), run("b", 0, math.nan), run("c", 0, 0.3, diverged=True)], None),
        ([], None),
    ],
)
def test_best_run(runs, expected):
    best = find_best(runs)
    assert (best and (best.method, best.seed)) == expected


def test_best_weights_take_the_place_of_earlier_ones():
    for number, name in enumerate("ab"):
        Path(name).mkdir()
        Path(name, "seed-0.ckpt").write_text(f"weights of {name}")
        Path(name, "config.yaml").write_text(f"config of {name}")
        made = run("m", 0, 0.5 + number, weights=str(Path(name, "seed-0.ckpt").absolute()))
        assert copy_best([made], Path("out/best")) is made
        assert Path("out/best/weights.ckpt").read_text() == f"weights of {name}"
        assert Path("out/best/config.yaml").read_text() == f"config of {name}"
        Path("out/best/.unfinished-x.ckpt").touch()
    assert copy_best([made], Path("out/best")) is made
    assert sorted(path.name for path in Path("out/best").iterdir()) == ["config.yaml", "weights.ckpt"]
    assert copy_best([run("m", 0, 0.5)], Path("none")) is None
    assert not Path("none").exists()
