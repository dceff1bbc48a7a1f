"""The command `lightning-ssesam curvature`: it measures the checkpoint that it is given, and reports it correctly."""

import copy
import csv
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import STRICT
from PIL import Image
from scipy.integrate import trapezoid

from lightning_ssesam.cli import main
from lightning_ssesam.curvature import (
    Curvature,
    Eigenvalues,
    Hessian,
    SpectralDensity,
    Trace,
    choose_samples,
    measure_curvature,
    plane,
)
from lightning_ssesam.curvature.figures import asinh_density, draw_planes
from lightning_ssesam.curvature.landscape import EigenLine, eigen_lines
from lightning_ssesam.data import DigitsLT
from lightning_ssesam.experiments import curvature_command as module
from lightning_ssesam.experiments.checkpoints import load_checkpoint
from lightning_ssesam.experiments.curvature_command import curvature, format_curvature, short_names
from lightning_ssesam.models import LongTailClassifier, SmallConvNet

pytestmark = STRICT

NETWORK = ["--data=DigitsLT", "--data.imbalance_factor=20", "--model.backbone=SmallConvNet", "--model.backbone.width=8"]
FIT = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
QUICK = {"samples": 30, "batch_size": 16, "tolerance": 0.3, "max_iterations": 8, "trace_samples": 2, "probes": 2}
OPTIONS = [f"--{name}={value}" for name, value in QUICK.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training, with a checkpoint of each of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    keep = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-ssesam"])
        main(["fit", *NETWORK, "--model.tail_fraction=0.2", *FIT, *keep])
    return folder / "lightning_logs" / "version_0"


@pytest.fixture
def checkpoints(trained):
    return sorted((trained / "checkpoints").iterdir())


def loaded_by_hand(checkpoint):
    data = DigitsLT(imbalance_factor=20)
    model = LongTailClassifier(data.class_counts, SmallConvNet(10, width=8), tail_fraction=0.2)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    return model, data


def measured_by_hand(checkpoint, groups, dtype=torch.float32, **changes):
    model, data = loaded_by_hand(checkpoint)
    options = {**QUICK, **changes}
    loader = data.train_dataloader()
    taken = [options.pop(name) for name in ("samples", "batch_size")]
    chosen = choose_samples(loader.dataset, loader.collate_fn, model.split, groups, *taken, options.get("seed", 0))
    return measure_curvature(model, chosen, model.split, groups, dtype=dtype, **options)


def rows_of(path):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def assert_row(row, curvature):
    for name, value in curvature.numbers().items():
        assert float(row[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert float(row["samples"]) == curvature.samples
    assert float(row["rho"]) == curvature.rho


def test_the_numbers_are_those_of_the_checkpoint(checkpoints, capsys):
    last = checkpoints[-1]
    main(["curvature", str(last), "--groups=head,tail", "--landscape=false", *OPTIONS])
    shown = capsys.readouterr()
    expected = measured_by_hand(last, ["head", "tail"])
    rows = rows_of("curvature/curvature.csv")
    assert [(row["checkpoint"], row["group"]) for row in rows] == [(str(last), "head"), (str(last), "tail")]
    for row, curvature_by_hand in zip(rows, expected.values(), strict=True):
        assert_row(row, curvature_by_hand)
    # Not those of the initial weights, nor of the other checkpoint.
    other = measured_by_hand(checkpoints[0], ["head", "tail"])
    assert abs(float(rows[0]["loss"]) - other["head"].loss) > 0.01
    assert [path.name for path in sorted(Path("curvature").iterdir())] == ["curvature.csv", "spectra.png"]
    line = next(line for line in shown.out.splitlines() if line.startswith("tail"))
    assert line.split()[2] == f"{expected['tail'].loss:.4g}"
    assert line.split()[4] == f"{expected['tail'].eigenvalues.largest:.4g}"
    assert "tail: eigenvalues" in shown.err
    assert "Written: curvature/curvature.csv, curvature/spectra.png\n" in shown.out


def test_every_option_gets_where_it_should(checkpoints):
    last = checkpoints[-1]
    changes = {"samples": 9, "batch_size": 5, "rho": 0.2, "seed": 3, "probes": 1, "trace_samples": 0}
    changes |= {"tolerance": 0.05, "max_iterations": 40, "batch_norm": "batch"}
    options = [f"--{name}={value}" for name, value in changes.items()]
    main(["curvature", str(last), "--groups=class_0", "--dtype=float64", "--landscape=false", *options])
    (expected,) = measured_by_hand(last, ["class_0"], torch.float64, **changes).values()
    (row,) = rows_of("curvature/curvature.csv")
    assert "trace" not in row
    for name, value in expected.numbers().items():
        assert float(row[name]) == pytest.approx(value, rel=1e-7, abs=1e-12), name
    assert float(row["samples"]) == 9


def test_several_checkpoints_with_landscapes(checkpoints, capsys, monkeypatch):
    drawn = {}
    for name in ("draw_lines", "draw_planes"):
        draw = getattr(module, name)

        def remember(*args, draw=draw, name=name):
            drawn.setdefault(name, []).append(args)
            return draw(*args)

        monkeypatch.setattr(module, name, remember)
    landscape = ["--points=5", "--plane_points=3", "--extent=0.5", "--seed=4"]
    main(["curvature", *map(str, checkpoints), "--groups=head,tail", "--output=out", *landscape, *OPTIONS])
    rows = rows_of("out/curvature.csv")
    assert [(row["checkpoint"], row["group"]) for row in rows] == [
        (str(path), group) for path in checkpoints for group in ("head", "tail")
    ]
    names = [path.stem for path in checkpoints]
    pictures = [f"landscape_{kind}d-{name}.png" for kind in (1, 2) for name in names] + ["spectra.png"]
    assert sorted(path.name for path in Path("out").glob("*.png")) == sorted(pictures)
    for picture in pictures:
        with Image.open(f"out/{picture}") as image:
            assert image.width > 600
            assert len(set(image.convert("L").resize((60, 60)).tobytes())) > 20
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("checkpoint"))) :]
    assert [line.split()[:2] for line in table[1:5]] == [[name, group] for name in names for group in ("head", "tail")]

    model, data = loaded_by_hand(checkpoints[-1])
    loader = data.train_dataloader()
    chosen = choose_samples(loader.dataset, loader.collate_fn, model.split, ["head", "tail"], 30, 16, 4)
    hessian = Hessian(model, chosen["tail"], classes=model.split.tail)
    losses, offsets, title, _ = drawn["draw_planes"][1]
    assert title == names[1]
    assert offsets == pytest.approx([-0.5, 0, 0.5])
    directions = [module.filter_normalized(model, seed) for seed in (4, 5)]
    assert losses["tail"] == pytest.approx(plane(hessian, *directions, offsets), rel=1e-4)
    (smallest, largest), loss = drawn["draw_lines"][1][0]["tail"], hessian.loss()
    assert float(rows[3]["smallest"]) == pytest.approx(smallest.eigenvalue)
    assert [along.losses[2] for along in (smallest, largest)] == pytest.approx([loss, loss], rel=1e-4)
    assert len(largest.offsets) == 5


def test_another_configuration_and_place(trained, checkpoints, tmp_path):
    kept = tmp_path / "kept.ckpt"
    kept.write_bytes(checkpoints[-1].read_bytes())
    (expected,) = measured_by_hand(kept, ["tail"]).values()
    arguments = ["--groups=tail", "--landscape=false", "--probes=0", *OPTIONS[:-1]]
    main(["curvature", str(kept), f"--config={trained}/config.yaml", *arguments])
    (row,) = rows_of("curvature/curvature.csv")
    assert float(row["loss"]) == pytest.approx(expected.loss)
    assert not Path("curvature/spectra.png").exists()
    (tmp_path / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    assert curvature([kept], groups="tail", landscape=False, **QUICK)[kept]["tail"].loss == pytest.approx(expected.loss)


def another_config(trained, **changes):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    config["model"]["backbone"]["init_args"].update(changes)
    Path("other.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.ckpt"], "No such checkpoint: 'nope.ckpt'."),
        (["."], "The checkpoint '.' is a folder. If a sharded model was saved in it, make one file of it: `python -m"),
        (["text.ckpt"], "No config.yaml in the folder of 'text.ckpt' or in the one above. Give"),
        (["text.ckpt", "--config=CONFIG"], "'text.ckpt' is no checkpoint of `lightning-ssesam fit`."),
        (["list.ckpt", "--config=CONFIG"], "'list.ckpt' is no checkpoint of `lightning-ssesam fit`."),
        (
            ["code.ckpt", "--config=CONFIG"],
            "The checkpoint 'code.ckpt' holds pathlib.",
        ),
        (["CHECKPOINT", "--config=text.yaml"], "'text.yaml' is no configuration of `lightning-ssesam fit`, with"),
        (["CHECKPOINT", "--config=bad.yaml"], "'bad.yaml' is no configuration of `lightning-ssesam fit`, with"),
        (["CHECKPOINT", "--config=other.yaml"], "has shape (8, 1, 3, 3) instead of (16, 1, 3, 3), and "),
        (["CHECKPOINT", "CHECKPOINT"], "`checkpoints` to be one or more, each once"),
        (["CHECKPOINT", "--groups=nope"], "`groups` to be any of 'head'"),
        (["CHECKPOINT", "--samples=0"], "`samples` to be an integer >= 1"),
        (["CHECKPOINT", "--tolerance=0"], "`tolerance` to be a finite number > 0"),
        (["CHECKPOINT", "--seed=-1"], "`seed` to be an integer >= 0"),
        (["CHECKPOINT", "--points=2"], "`points` to be an integer >= 3"),
        (["CHECKPOINT", "--plane_points=2"], "`plane_points` to be an integer >= 3"),
        (["CHECKPOINT", "--device=abacus"], "`device` to be 'auto' or a device of this machine"),
        (["CHECKPOINT", "--threads=0"], "`threads` to be an integer >= 1"),
    ],
)
def test_misuse_gets_one_line(arguments, message, trained, checkpoints):
    for name in ("text.ckpt", "text.yaml"):
        Path(name).write_text("no such thing")
    torch.save([1], "list.ckpt")
    torch.save({"state_dict": {}, "path": Path("x")}, "code.ckpt")
    Path("bad.yaml").write_text("model: {backbone: no.such.Network}\ndata: DigitsLT\n")
    another_config(trained, width=16)
    places = {"CHECKPOINT": str(checkpoints[-1]), "--config=CONFIG": f"--config={trained}/config.yaml"}
    with pytest.raises(SystemExit) as stop:
        main(["curvature", *(places.get(argument, argument) for argument in arguments)])
    text = str(stop.value)
    assert text.startswith("error: ")
    assert message in text
    assert "\n" not in text


def test_a_checkpoint_with_other_names(trained, checkpoints, tmp_path):
    content = torch.load(checkpoints[-1], weights_only=True)
    name = next(iter(content["state_dict"]))
    content["state_dict"]["other"] = content["state_dict"].pop(name)
    torch.save(content, "renamed.ckpt")
    with pytest.raises(
        ValueError, match=f"'renamed.ckpt' does not fit the model in '.*config.yaml': it lacks `{name}`, and 1 more"
    ):
        load_checkpoint(Path("renamed.ckpt"), trained / "config.yaml")


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["curvature", "--help"])
    text = capsys.readouterr().out
    for option in ("checkpoints", "--groups", "--config", "--tolerance", "--landscape", "--device", "--output"):
        assert f"  {option} " in text
    # Settings have the texts of CurvatureSettings, and some have defaults of the command.
    text = " ".join(text.split())
    assert "Distance from the weights at which the sharpness is measured, a finite number >= 0. (type: float," in text
    defaults = {"tolerance": 0.01, "max_iterations": 200, "trace_samples": 10, "probes": 4, "rho": 0.05}
    defaults |= {"dtype": "float32", "batch_norm": "eval", "seed": 0, "samples": 2000}
    for name, value in defaults.items():
        (shown,) = re.findall(rf" --{name} [A-Z{{].*?default: ([^)]*)\)", text.partition("options:")[2])
        assert shown == str(value), name


def made_up(smallest, largest, converged=True, nodes=(-1.0, 0.0, 4.0), weights=(0.25, 0.5, 0.25)):
    ends = Eigenvalues(largest, smallest, (0.25, 0.5), 7, converged, (torch.zeros(10), torch.zeros(10)))
    density = SpectralDensity([np.array(nodes)], [np.array(weights)])
    return Curvature(12.0, 0.5, 0.125, ends, Trace(9.0, 0.5), density, 0.0625, 0.05)


def test_table():
    table = format_curvature({"one": {"head": made_up(-1.0, 4.0), "class_3": made_up(-2, 8.0, converged=False)}}, 0.01)
    assert table.splitlines() == [
        "group    samples  loss  ||gradient||  largest  smallest  ratio    trace  sharpness  negative  products",
        "head          12   0.5         0.125        4        -1   0.25  9 ± 0.5     0.0625    25.0 %         7",
        "class_3       12   0.5         0.125        8        -2   0.25  9 ± 0.5     0.0625    25.0 %         7",
        "",
        "Not within the tolerance of 0.01 (use more --max_iterations): class_3 (smallest ± 0.25, largest ± 0.5).",
    ]


def test_what_is_nearly_0_is_not_negative():
    """The density cannot tell on which side of 0 the many eigenvalues are that are nearly 0."""
    numbers = made_up(-1.0, 4.0, nodes=(-1.0, -1e-7, 4.0)).numbers()
    assert numbers["negative_share"] == 0.25
    assert made_up(-8.0, 4.0, nodes=(-8.0, -6e-2, 4.0)).numbers()["negative_share"] == 0.25


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["logs/a/x.ckpt"], ["x"]),
        (["logs/v_0/c/e=5.ckpt", "logs/v_1/c/e=5.ckpt"], ["v_0", "v_1"]),
        (["c/epoch=1.ckpt", "c/epoch=10.ckpt"], ["epoch=1", "epoch=10"]),
        (["a/b/x.ckpt", "a/x.ckpt"], ["b", "a/x"]),
        (["a/b/x.ckpt", "c/d/y.ckpt"], ["a/b/x", "c/d/y"]),
    ],
)
def test_short_names(paths, names):
    assert list(short_names([Path(path) for path in paths]).values()) == names


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_density_over_the_axis(scale):
    density = SpectralDensity([np.array([-0.5, 0.0, 20.0]), np.array([1e-4])], [np.array([0.2, 0.5, 0.3]), np.ones(1)])
    eigenvalues, values = asinh_density(density, scale, width=0.1)
    coordinate = np.arcsinh(eigenvalues / scale) / math.log(10)
    assert np.diff(coordinate) == pytest.approx(np.diff(coordinate)[0])
    assert trapezoid(values, coordinate) == pytest.approx(1, abs=1e-3)
    # Far from 0 a unit is a decade; the weight of the outlier, halved as there are two probes, is around it.
    near = (eigenvalues > 20 / 10**0.4) & (eigenvalues < 20 * 10**0.4)
    if scale == 0.01:
        assert trapezoid(values[near], np.log10(eigenvalues[near])) == pytest.approx(0.15, abs=1e-3)


class Saddle(torch.nn.Module):
    """L(w) = 1 + w . diag(4, 1, -2) w / 2 at w = (0, 0, 0.1), so that the slope is -0.2 upwards."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0, 0, 0.1], dtype=torch.float64))

    def sample_losses(self, batch):
        return (1 + 0.5 * torch.tensor([4, 1, -2], dtype=torch.float64) @ self.w**2).expand(len(batch[0]))


@pytest.mark.parametrize("sign", [1, -1])
def test_lines_along_eigenvectors(sign, monkeypatch):
    axes = torch.eye(3, dtype=torch.float64)
    ends = Eigenvalues(4.0, -2.0, (0.0, 0.0), 3, True, (sign * axes[2], sign * axes[0]))
    hessian = Hessian(Saddle(), [(torch.zeros(1, 1), torch.tensor([0]))])
    loss = 1 - 0.01
    monkeypatch.setattr("lightning_ssesam.curvature.landscape._FURTHEST", 1000)
    smallest, largest = eigen_lines(hessian, ends, 3)
    assert smallest.slope == pytest.approx(-0.2)
    assert largest.offsets == pytest.approx(math.sqrt(2 * loss / 4) * np.array([-1, 0, 1]))
    assert smallest.offsets == pytest.approx(math.sqrt(2 * loss / 2) * np.array([-1, 0, 1]))
    for along in (smallest, largest):
        assert along.losses == pytest.approx(along.quadratic, rel=1e-12)
    # Downhill is to the right.
    assert smallest.losses[2] < smallest.losses[0]
    monkeypatch.undo()
    assert eigen_lines(hessian, ends, 3)[1].offsets[2] == pytest.approx(0.5 * 0.1)
    assert isinstance(smallest, EigenLine)


def test_planes_with_losses_that_are_not_finite():
    values = np.array([[math.inf, 1, 2], [1, 0.01, 1], [2, 1, math.nan]])
    path = draw_planes({"head": values, "tail": copy.copy(values) + 1}, np.linspace(-1, 1, 3), "x", Path("x.png"))
    assert path.stat().st_size > 10_000
