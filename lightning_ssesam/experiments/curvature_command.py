"""The command ``lightning-ssesam curvature``: measure and draw the curvature of checkpoints."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader

from lightning_ssesam._validation import bad_argument, check_integer, check_positive
from lightning_ssesam.curvature.figures import draw_lines, draw_planes, draw_spectra
from lightning_ssesam.curvature.hessian import Hessian
from lightning_ssesam.curvature.landscape import EigenLine, eigen_lines, filter_normalized, plane
from lightning_ssesam.curvature.measure import GROUPS, Curvature, group_masks, measure_curvature
from lightning_ssesam.curvature.samples import choose_samples
from lightning_ssesam.curvature.settings import CurvatureSettings
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.checkpoints import find_config, load_checkpoint
from lightning_ssesam.experiments.console import find_device, limited_threads, quiet
from lightning_ssesam.experiments.files import make_folder
from lightning_ssesam.experiments.tables import write_csv
from lightning_ssesam.experiments.trust import say
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.split import ClassSplit


@dataclass(frozen=True)
class _CommandSettings(CurvatureSettings):
    # Defaults of the command that differ.
    probes: int = 4
    dtype: Literal["float32", "float64"] = "float32"


def curvature(
    checkpoints: list[Path],
    config: Path | None = None,
    groups: str | list[str] = list(GROUPS),  # noqa: B006 (never changed; the help shows it)
    samples: int = 2000,
    batch_size: int = 256,
    landscape: bool = True,
    points: int = 21,
    plane_points: int = 15,
    extent: float = 1.0,
    device: str = "auto",
    threads: int = 1,
    seed: int = 0,
    output: Path = Path("curvature"),
    trust_checkpoint: bool = False,
    **settings: Any,
) -> dict[Path, dict[str, Curvature]]:
    """Measure the curvature of the loss of head, tail and other groups at checkpoints of `lightning-ssesam fit`.

    For the mean loss of each group over training samples it measures the largest and the smallest eigenvalue of the
    Hessian (negative at a saddle), the trace, the spectral density, the norm of the gradient and the sharpness. Samples
    come as in training, with its augmentation. The loss is that of the configuration, without the class weights of
    DeferredReweighting.

    Prints a table and writes to the output folder: curvature.csv (a row for each group), spectra.png (unless --probes
    is 0), landscape_1d.png (along the eigenvectors of both ends) and landscape_2d.png (over a plane of two random
    directions with the filter norms of the weights). Each of several checkpoints has its own files of landscapes.

    Args:
        checkpoints: Checkpoints of one training or of several.
        config: Configuration of the training. By default the config.yaml that fit has saved in the folder above that
            of the checkpoint. A configuration is code: take none from strangers.
        groups: Names of groups, with commas between them: head, tail, many, medium, few, all, class_3 for a single
            class, and classes for each of them. Pictures show the first six.
        samples: Number of training samples of each group, chosen at random; all if it has fewer.
        batch_size: Number of samples that are forwarded at a time.
        landscape: Whether to draw the landscapes. They take two lines and a plane of forward passes for each group.
        points: Number of points of each line.
        plane_points: Number of points of a plane in each direction.
        extent: Distance that a plane goes from its centre, in norms of the filters.
        device: Device to compute on, such as cpu or cuda:1; auto takes a GPU if there is one.
        threads: Number of CPU threads for an operation. More than one speeds up large networks only.
        seed: Seed of the choice of samples, augmentations, and all random vectors, an integer >= 0.
        output: Folder for the results.
        trust_checkpoint: Permission for a checkpoint to hold more than plain data. Such a file can run any code.
        **settings: Fields of :class:`~lightning_ssesam.curvature.CurvatureSettings`. Here ``probes`` is 4 and ``dtype``
            is float32 by default.

    Returns:
        The curvature by checkpoint and group.

    Raises:
        ArgumentError: If an argument is out of range, or a checkpoint or its configuration cannot be used.
        ModuleNotFoundError: If matplotlib, scipy or jsonargparse is not installed.
    """
    chosen = _CommandSettings(seed=seed, **settings)
    for name, value in {"points": points, "plane_points": plane_points}.items():
        check_integer(name, value, minimum=3)
    offsets = check_positive("extent", extent) * np.linspace(-1, 1, plane_points)
    for name, value in {"samples": samples, "batch_size": batch_size, "threads": threads}.items():
        check_integer(name, value, minimum=1)
    names = groups.split(",") if isinstance(groups, str) else list(groups)
    place = find_device(device)
    labels = short_names(checkpoints)
    configs = {path: config or find_config(path) for path in checkpoints}
    make_folder(output)
    measured: dict[Path, dict[str, Curvature]] = {}
    written = [output / "curvature.csv"]
    for path in checkpoints:
        with limited_threads(threads), quiet():
            model, data = load_checkpoint(path, configs[path], trust_checkpoint)
            if config is None and not measured:
                names_of_configs = ", ".join(dict.fromkeys(repr(str(found)) for found in configs.values()))
                say(f"Model and data come from {names_of_configs}.")
            batches = _choose_batches(data, model.split, names, samples, batch_size, seed)
            model.to(place)
            size = sum(p.numel() for p in model.parameters() if p.requires_grad)
            print(f"{path}: {size:,} parameters, on {place}")
            measured[path] = measure_curvature(model, batches, model.split, names, progress=True, **vars(chosen))
            # Written after every checkpoint, so that rows survive an interruption.
            write_rows(measured, written[0])
            if landscape:
                suffix = "-" + re.sub(r"[^\w=.+-]+", "-", labels[path]) if len(checkpoints) > 1 else ""
                lines, planes = _landscapes(model, batches, measured[path], chosen, points, offsets)
                written.append(draw_lines(lines, labels[path], output / f"landscape_1d{suffix}.png"))
                written.append(draw_planes(planes, offsets, labels[path], output / f"landscape_2d{suffix}.png"))
    by_label = {labels[path]: curvatures for path, curvatures in measured.items()}
    if chosen.probes:
        written.insert(1, draw_spectra(by_label, output / "spectra.png"))
    print(f"\n{format_curvature(by_label, chosen.tolerance)}")
    print(f"\nWritten: {', '.join(str(path) for path in written)}")
    return measured


def _landscapes(
    model: LongTailClassifier,
    batches: Mapping[str, list[Any]],
    measured: Mapping[str, Curvature],
    settings: CurvatureSettings,
    points: int,
    offsets: np.ndarray,
) -> tuple[dict[str, tuple[EigenLine, EigenLine]], dict[str, np.ndarray]]:
    """Return the loss of each group along the eigenvectors of both ends, and over a plane."""
    first, second = filter_normalized(model, settings.seed), filter_normalized(model, settings.seed + 1)
    lines, planes = {}, {}
    for group, mask in group_masks(model.split, list(batches)).items():
        options = (settings.dtype, settings.batch_norm, model.split.multi_label)
        hessian = Hessian(model, batches[group], None, mask, *options)
        lines[group] = eigen_lines(hessian, measured[group].eigenvalues, points, f"{group}: loss along")
        planes[group] = plane(hessian, first, second, offsets, progress=f"{group}: loss over a plane")
    return lines, planes


def write_rows(measured: Mapping[Path, Mapping[str, Curvature]], path: Path) -> None:
    """Write a CSV file with a row for each checkpoint and group."""
    rows: list[dict[str, Any]] = []
    for checkpoint, curvatures in measured.items():
        for group, curvature in curvatures.items():
            first = {"checkpoint": str(checkpoint), "group": group, "samples": curvature.samples}
            low, high = curvature.eigenvalues.errors
            last = {"smallest_error": low, "largest_error": high, "rho": curvature.rho}
            rows.append({**first, **curvature.numbers(), **last})
    texts = [[f"{value:.8g}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    write_csv(path, list(rows[0]), texts)


def format_curvature(measured: Mapping[str, Mapping[str, Curvature]], tolerance: float) -> str:
    """Return a table as text, with a line for each group. Below it stand the groups that missed the tolerance."""
    several = len(measured) > 1
    numbers = ["samples", "loss", "||gradient||", "largest", "smallest", "ratio", "trace", "sharpness", "negative"]
    columns = ["checkpoint", "group"] if several else ["group"]
    rows, missed = [[*columns, *numbers, "products"]], []
    for checkpoint, curvatures in measured.items():
        for group, curvature in curvatures.items():
            names = [checkpoint, group] if several else [group]
            rows.append([*names, *_table_numbers(curvature)])
            if not curvature.eigenvalues.converged:
                low, high = curvature.eigenvalues.errors
                missed.append(f"{', '.join(names)} (smallest ± {low:.2g}, largest ± {high:.2g})")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Names stand at the left of their column, numbers at the right.
    sides = "<" * len(columns) + ">" * (len(widths) - len(columns))
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
    if missed:
        lines += ["", f"Not within the tolerance of {tolerance:g} (use more --max_iterations): {', '.join(missed)}."]
    return "\n".join(lines)


def short_names(checkpoints: Sequence[Path]) -> dict[Path, str]:
    """Return a short name for each checkpoint: its path without the parts that all paths begin and end with."""
    if not checkpoints or len(set(checkpoints)) < len(checkpoints):
        raise bad_argument("checkpoints", "one or more, each once", [str(path) for path in checkpoints])
    parts = [(*path.parts[:-1], path.stem) for path in checkpoints]
    if len(parts) == 1:
        return {checkpoints[0]: parts[0][-1]}
    first = _common(parts)
    last = _common([part[first:][::-1] for part in parts])
    names = ["/".join(part[first : len(part) - last]) or "/".join(part) for part in parts]
    return dict(zip(checkpoints, names, strict=True))


def _common(parts: Sequence[tuple[str, ...]]) -> int:
    """Return the number of entries that all of them begin with in common."""
    return len(list(takewhile(lambda entries: len(set(entries)) == 1, zip(*parts, strict=False))))


def _choose_batches(
    data: LongTailDataModule, split: ClassSplit, groups: Sequence[str], samples: int, batch_size: int, seed: int
) -> dict[str, list[Any]]:
    # Refuse wrong groups before the data is prepared, which may take a download.
    group_masks(split, groups)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    if not isinstance(loader, DataLoader):
        raise ArgumentError(f"The data module must train on a DataLoader, but it trains on a {type(loader).__name__}.")
    return choose_samples(loader.dataset, loader.collate_fn, split, groups, samples, batch_size, seed)


def _table_numbers(curvature: Curvature) -> list[str]:
    ends, trace, share = curvature.eigenvalues, curvature.trace, curvature.numbers().get("negative_share")
    numbers = (curvature.loss, curvature.gradient_norm, ends.largest, ends.smallest, ends.ratio)
    first = [f"{curvature.samples:g}", *(f"{value:.4g}" for value in numbers)]
    of_trace = "" if trace is None else f"{trace.value:.4g} ± {trace.standard_error:.2g}"
    negative = "" if share is None else f"{100 * share:.1f} %"
    return [*first, of_trace, f"{curvature.sharpness:.4g}", negative, str(ends.iterations)]
