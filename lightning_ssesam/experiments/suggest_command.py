"""The command ``lightning-ssesam suggest``: what to begin with on a data set, and the file for ``compare``."""

from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.experiments.console import quiet
from lightning_ssesam.experiments.files import make_folder, set_aside, write_text
from lightning_ssesam.experiments.suggestion import Suggestion
from lightning_ssesam.experiments.suggestion import suggest as suggest_for_counts
from lightning_ssesam.experiments.suggestion_data import FoundData, Places, find_data


def suggest(
    data: Path,
    output: Path = Path("suggestion.yaml"),
    test: Path | None = None,
    root: Path | None = None,
    label: str | None = None,
    gpu: bool | None = None,
) -> Suggestion:
    """Look at imbalanced classes, and say what to begin with and why: tail, batch size, loss, sampler, objective.

    It counts the images of each class, looks at their size, and prints at most ten lines. Nothing is trained. It writes
    a YAML file: `lightning-ssesam compare --config suggestion.yaml` compares what it suggests with plain training. A
    list or table without test images is divided, and the lists are written beside the YAML file. Files that are there
    already are moved to the folder earlier.

    Args:
        data: Folder with a folder for each class, list file, CSV file of labels, data module, or YAML file with data.
        output: YAML file to write.
        test: List file of the test images, for a list file. By default the one beside it, with test for train.
        root: Folder that the paths in a list or a table are relative to.
        label: Column of the labels in a CSV file; by default one of a usual name, or the last one.
        gpu: Whether there will be a GPU to train on; found out by default.

    Returns:
        The suggestion.

    Raises:
        ArgumentError: If the data cannot be read, or have a single class.
    """
    make_folder(output.parent)
    if output.is_dir():
        raise bad_argument("output", "a file", got_text=f"the folder {str(output)!r}")
    with quiet():
        found = find_data(str(data), Places(output, test, root, label))
    if len(found.class_counts) < 2:
        name = f" ({found.class_names[0]!r})" if found.class_names else ""
        raise bad_argument("data", "a data set of two classes or more", got_text=f"one with a single class{name}")
    suggestion = suggest_for_counts(
        found.class_counts,
        found.class_names,
        found.test_counts,
        found.image_side,
        found.in_channels,
        _has_gpu() if gpu is None else gpu,
        found.may_resize,
    )
    lines = [line for line in suggestion.lines if not (line.startswith("Network") and "backbone" in found.options)]
    print("\n".join(lines))
    if found.config is None:
        print("\nNo YAML file is written, because labels alone name no images. Add a column with the file of each one.")
        return suggestion
    print()
    for path, text in {**found.lists, str(output): _yaml(found, suggestion, lines, data, output)}.items():
        _write(Path(path), text)
    print(f"Written: {', '.join([str(output), *found.lists])}")
    print(f"Compare with: lightning-ssesam compare --config {output}")
    return suggestion


def _write(path: Path, text: str) -> None:
    """Write a file, and say what becomes of another one of this name."""
    if path.is_file() and path.read_bytes() == text.encode("utf-8", "surrogateescape"):
        return
    if (earlier := set_aside(path)) is not None:
        print(f"The {path} that was there is {earlier} now.")
    write_text(path, text)


def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _yaml(found: FoundData, suggestion: Suggestion, lines: list[str], source: Path, output: Path) -> str:
    """Return the content of the file for ``compare``, with the reasons as comments."""
    assert found.config is not None
    given: Any = found.config.get("init_args") or {}
    chosen = {"batch_size": suggestion.batch_size} if found.takes_batch_size else {}
    size = {} if suggestion.image_size is None else {"image_size": suggestion.image_size}
    data = {"class_path": found.config["class_path"], "init_args": {**given, **chosen, **size}}
    content: str = yaml.safe_dump(
        {"data": data, **suggestion.config(), **found.options}, sort_keys=False, allow_unicode=True
    )
    command = f"    lightning-ssesam compare --config {output}"
    head = [f"Written by `lightning-ssesam suggest {source}`, for:", "", command, ""]
    return "".join(f"# {line}".rstrip() + "\n" for line in [*head, *lines]) + content
