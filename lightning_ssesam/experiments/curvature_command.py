"""The command ``lightning-ssesam curvature``: measure and draw the curvature of checkpoints."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_ssesam._validation import (
    bad_argument,
    check_choice,
    check_integer,
    check_positive,
    check_radius,
)
from lightning_ssesam.curvature.figures import draw_lines, draw_planes, draw_spectra
from lightning_ssesam.curvature.hessian import Hessian
from lightning_ssesam.curvature.landscape import eigen_lines, filter_normalized, plane
from lightning_ssesam.curvature.measure import GROUPS, Curvature, group_masks, measure_curvature
from lightning_ssesam.curvature.samples import choose_samples
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.experiments.checkpoints import find_config, load_checkpoint
from lightning_ssesam.experiments.console import limited_threads, make_folder, quiet
from lightning_ssesam.experiments.tables import write_csv
from lightning_ssesam.split import ClassSplit


def curvature(
    checkpoints: list[Path],
    config: Path | None = None,
    groups: str | list[str] = list(GROUPS),  # noqa: B006 (never changed; the help shows it)
    samples: int = 2000,
    batch_size: int = 256,
    tolerance: float = 0.01,
    max_iterations: int = 200,
    trace_samples: int = 10,
    probes: int = 4,
    rho: float = 0.05,
    dtype: Literal["float32", "float64"] = "float32",
    batch_norm: Literal["eval", "batch"] = "eval",
    landscape: bool = True,
    points: int = 21,
    plane_points: int = 15,
    extent: float = 1.0,
    device: str = "auto",
    threads: int = 1,
    seed: int = 0,
    output: Path = Path("curvature"),
) -> dict[Path, dict[str, Curvature]]:
    """Measure the curvature of the loss of head, tail and other groups at checkpoints of `lightning-ssesam fit`.

    Of each group's mean loss over training samples: the largest and the smallest eigenvalue of its Hessian (negative
    at a saddle), its trace and spectral density, the norm of the gradient, and the sharpness. Samples are as the
    training set gives them, augmented if it augments; the loss is that of the configuration, without class weights
    that DeferredReweighting brings.

    Prints a table and writes to the output folder: curvature.csv (a row for each group), spectra.png, landscape_1d.png
    (along the eigenvectors of both ends) and landscape_2d.png (over a plane of two random directions, filter by filter
    as long as the weights); with several checkpoints, the landscapes of each in files of its own.

    Args:
        checkpoints: Checkpoints, of one training or of several.
        config: Configuration of the training; by default the config.yaml that Lightning has saved in the folder above
            the checkpoint's.
        groups: Any of head, tail, many, medium, few, all, class_3 for a single class, and classes for each of them,
            with commas between them. Pictures show the first six.
        samples: How many training samples of each group are used, chosen at random; all if it has fewer.
        batch_size: How many of them are forwarded at a time.
        tolerance: Relative error of the eigenvalues at which the search for them ends.
        max_iterations: Most products with a Hessian for them.
        trace_samples: Random vectors for the trace; 0 leaves it out.
        probes: Random vectors for the spectral density; 0 leaves it out, and spectra.png.
        rho: Distance for the sharpness.
        dtype: Floating type to compute in.
        batch_norm: Whether batch normalization uses its running statistics (eval) or those of each batch (batch).
        landscape: Whether to draw the landscapes, which takes two lines and a plane of forward passes a group.
        points: Points of each line.
        plane_points: Points of a plane to each side.
        extent: How far a plane goes from its centre, in norms of the filters.
        device: Where to compute, such as cpu or cuda:1; auto takes a GPU if there is one.
        threads: CPU threads for an operation. More than one pays for large networks only.
        seed: Of the choice of samples, augmentations, and all random vectors.
        output: Folder for the results.

    Returns:
        What was measured, by checkpoint and group.

    Raises:
        ValueError: If an argument is out of range, or a checkpoint or its configuration is not what it should be.
        ModuleNotFoundError: If matplotlib, scipy or jsonargparse is not installed.

    """
    names = groups.split(",") if isinstance(groups, str) else list(groups)
    _check(samples, batch_size, tolerance, max_iterations, trace_samples, probes, rho, dtype, batch_norm)
    _check_landscape(points, plane_points, extent, seed)
    check_integer("threads", threads, minimum=1)
    where = _device(device)
    labels = short_names(checkpoints)
    configs = {path: config or find_config(path) for path in checkpoints}
    make_folder(output)
    measured: dict[Path, dict[str, Curvature]] = {}
    written = [output / "curvature.csv"]
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "batch_norm": batch_norm}
    for path in checkpoints:
        with limited_threads(threads), quiet():
            model, data = load_checkpoint(path, configs[path])
            batches = _batches(data, model.split, names, samples, batch_size, seed)
            model.to(where)
            print(f"{path}: {_number_trained(model):,} parameters, on {where}")
            measured[path] = measure_curvature(
                model,
                batches,
                model.split,
                names,
                rho=rho,
                tolerance=tolerance,
                max_iterations=max_iterations,
                trace_samples=trace_samples,
                probes=probes,
                seed=seed,
                progress=True,
                **options,
            )
            # What is there already survives an interruption.
            write_rows(measured, output / "curvature.csv")
            if landscape:
                masks = group_masks(model.split, names)
                hessians = {name: Hessian(model, batches[name], None, masks[name], **options) for name in masks}
                offsets = extent * np.linspace(-1, 1, plane_points)
                end = f"-{_as_file_name(labels[path])}" if len(checkpoints) > 1 else ""
                files = output / f"landscape_1d{end}.png", output / f"landscape_2d{end}.png"
                written += _draw_landscapes(hessians, measured[path], points, offsets, seed, labels[path], files)
    if probes:
        written.insert(1, draw_spectra({labels[path]: of for path, of in measured.items()}, output / "spectra.png"))
    print(f"\n{format_curvature({labels[path]: of for path, of in measured.items()}, tolerance)}")
    print(f"\nWritten: {', '.join(str(path) for path in written)}")
    return measured


def write_rows(measured: Mapping[Path, Mapping[str, Curvature]], path: Path) -> None:
    """Write a CSV file with a row for each checkpoint and group."""
    rows = [
        {
            "checkpoint": str(checkpoint),
            "group": group,
            "samples": curvature.samples,
            **curvature.numbers(),
            "smallest_error": curvature.eigenvalues.errors[0],
            "largest_error": curvature.eigenvalues.errors[1],
            "rho": curvature.rho,
        }
        for checkpoint, of in measured.items()
        for group, curvature in of.items()
    ]
    texts = [[f"{value:.8g}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    write_csv(path, list(rows[0]), texts)


def format_curvature(measured: Mapping[str, Mapping[str, Curvature]], tolerance: float) -> str:
    """Return what was measured as text, a line for each group; below it, where the tolerance was not reached.

    Args:
        measured: By the name of the checkpoint, which is shown if there are several, and by group.
        tolerance: Of the eigenvalues.

    """
    several = len(measured) > 1
    header = ["group", "samples", "loss", "||gradient||", "largest", "smallest", "ratio", "trace", "sharpness"]
    rows = [[*(["checkpoint"] if several else []), *header, "negative", "products"]]
    missed = []
    for name, of in measured.items():
        for group, curvature in of.items():
            rows.append([*([name] if several else []), *_cells(group, curvature)])
            if not curvature.eigenvalues.converged:
                low, high = curvature.eigenvalues.errors
                missed.append(f"{f'{name}, ' if several else ''}{group} (smallest ± {low:.2g}, largest ± {high:.2g})")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = 2 if several else 1
    lines = [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if missed:
        lines += ["", f"Not within the tolerance of {tolerance:g}; more --max_iterations help: {', '.join(missed)}."]
    return "\n".join(lines)


def short_names(checkpoints: Sequence[Path]) -> dict[Path, str]:
    """Return of each checkpoint what tells it from the others: its path without what all of them begin and end with.

    Raises:
        ValueError: If there is none, or one is there twice.

    """
    if not checkpoints or len(set(checkpoints)) < len(checkpoints):
        raise bad_argument("checkpoints", "one or more, each once", [str(path) for path in checkpoints])
    parts = [(*path.parts[:-1], path.stem) for path in checkpoints]
    if len(parts) == 1:
        return {checkpoints[0]: parts[0][-1]}
    first = _common(parts)
    last = _common([part[first:][::-1] for part in parts])
    return {
        path: "/".join(part[first : len(part) - last]) or "/".join(part)
        for path, part in zip(checkpoints, parts, strict=True)
    }


def _common(parts: Sequence[tuple[str, ...]]) -> int:
    """Return how many entries they have in common at their beginning."""
    return len(list(takewhile(lambda entries: len(set(entries)) == 1, zip(*parts, strict=False))))


def _check(
    samples: int,
    batch_size: int,
    tolerance: float,
    max_iterations: int,
    trace_samples: int,
    probes: int,
    rho: float,
    dtype: str,
    batch_norm: str,
) -> None:
    """Refuse before anything is loaded what would be refused after."""
    for name, value in {"samples": samples, "batch_size": batch_size, "max_iterations": max_iterations}.items():
        check_integer(name, value, minimum=1)
    for name, value in {"trace_samples": trace_samples, "probes": probes}.items():
        check_integer(name, value, minimum=0)
    check_positive("tolerance", tolerance)
    check_radius("rho", rho)
    check_choice("dtype", dtype, ("float32", "float64"))
    check_choice("batch_norm", batch_norm, ("eval", "batch"))


def _check_landscape(points: int, plane_points: int, extent: float, seed: int) -> None:
    for name, value in {"points": points, "plane_points": plane_points}.items():
        check_integer(name, value, minimum=3)
    check_positive("extent", extent)
    check_integer("seed", seed, minimum=0)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise bad_argument("device", "'auto' or a device of this machine, such as 'cpu'", name) from error


def _batches(
    data: LongTailDataModule, split: ClassSplit, groups: Sequence[str], samples: int, batch_size: int, seed: int
) -> dict[str, list[Any]]:
    group_masks(split, groups)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    if not isinstance(loader, DataLoader):
        raise bad_argument("data", "a data module that trains on a DataLoader", got_text=type(loader).__name__)
    return choose_samples(loader.dataset, loader.collate_fn, split, groups, samples, batch_size, seed)


def _number_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _draw_landscapes(
    hessians: Mapping[str, Hessian],
    measured: Mapping[str, Curvature],
    points: int,
    offsets: np.ndarray,
    seed: int,
    title: str,
    files: tuple[Path, Path],
) -> list[Path]:
    model = next(iter(hessians.values())).model
    first, second = filter_normalized(model, seed), filter_normalized(model, seed + 1)
    lines, planes = {}, {}
    for name, hessian in hessians.items():
        lines[name] = eigen_lines(hessian, measured[name].eigenvalues, points, f"{name}: loss along")
        planes[name] = plane(hessian, first, second, offsets, progress=f"{name}: loss over a plane")
    return [draw_lines(lines, title, files[0]), draw_planes(planes, offsets, title, files[1])]


def _cells(group: str, curvature: Curvature) -> list[str]:
    ends, trace, share = curvature.eigenvalues, curvature.trace, curvature.numbers().get("negative_share")
    numbers = (curvature.loss, curvature.gradient_norm, ends.largest, ends.smallest, ends.ratio)
    return [
        group,
        f"{curvature.samples:g}",
        *(f"{value:.4g}" for value in numbers),
        "" if trace is None else f"{trace.value:.4g} ± {trace.standard_error:.2g}",
        f"{curvature.sharpness:.4g}",
        "" if share is None else f"{100 * share:.1f} %",
        str(ends.iterations),
    ]


def _as_file_name(label: str) -> str:
    return re.sub(r"[^\w=.+-]+", "-", label)
