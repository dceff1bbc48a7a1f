"""The data that ``suggest`` looks at: folders of images, list files, tables of labels and data modules."""

import csv
import inspect
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.data import ImageFolderLT, ImageList, LongTailDataModule
from lightning_ssesam.data.image_files import median_side
from lightning_ssesam.data.image_list import counts_of_images
from lightning_ssesam.data.label_table import ANSWERS
from lightning_ssesam.data.labels import labels_of, names_of_classes
from lightning_ssesam.data.listed import ListedImages, divide
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.class_names import closest, did_you_mean, known_classes
from lightning_ssesam.experiments.command_parser import CommandParser, instantiate, read_config
from lightning_ssesam.experiments.recorder import count_images
from lightning_ssesam.experiments.trust import check_functions

_TABLES = (".csv", ".tsv")
_CONFIGS = (".yaml", ".yml")
_SETS = ("train", "val", "test")
# As `ImageFolderLT` draws them.
_FRACTIONS = {"test": 0.2, "val": 0.1}
_FILE_COLUMNS = ("file", "files", "filename", "file_name", "filepath", "path", "image", "image_path")
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target", "category")
_KINDS = "a folder with a folder for each class, a list file, a CSV file of labels, a data module or a YAML file"


@dataclass
class FoundData:
    """What a data set has, and how ``compare`` gets it.

    Attributes:
        class_counts: Training images of each class, length C.
        class_names: Name of each class; empty if unknown.
        test_counts: Test images of each class; None if unknown.
        image_side: Shorter side of most images in pixels; None if unknown.
        in_channels: Channels of the images; None if unknown.
        may_resize: Whether the size of the images may be chosen.
        config: Data module by class path; None if there are only labels.
        takes_batch_size: Whether the data module has an argument ``batch_size``.
        options: Other options of ``compare`` that were given, such as the network.
        lists: Content of the list files that the data module reads and that have to be written, by name.
    """

    class_counts: list[int]
    class_names: list[str] = field(default_factory=list)
    test_counts: list[int] | None = None
    image_side: int | None = None
    in_channels: int | None = 3
    may_resize: bool = True
    config: dict[str, Any] | None = None
    takes_batch_size: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Where the images of list files and tables are, and what a table's columns are called. None is found out."""

    output: Path
    test: Path | None = None
    root: Path | None = None
    label: str | None = None


def find_data(source: str, places: Places) -> FoundData:
    """Return what a data set has.

    Args:
        source: Folder, list file, CSV file, name or class path of a data module, or YAML file.
        places: What else was given.

    Raises:
        ArgumentError: If it is none of these, or cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file() and path.suffix.lower() in _TABLES:
        return _of_table(path, places)
    if path.is_file() and path.suffix.lower() not in _CONFIGS:
        return _of_list(path, places)
    shipped = [resource.name for resource in files("lightning_ssesam.configs").iterdir()]
    if path.is_file():
        return _of_config(path)
    if f"{source}.yaml" in shipped:
        with as_file(files("lightning_ssesam.configs") / f"{source}.yaml") as config:
            return _of_config(config)
    names = known_classes("data")
    module = source.rpartition(".")[0]
    if source in names or (module.replace(".", "").isidentifier() and find_spec(module.partition(".")[0]) is not None):
        return _of_module({"class_path": source}, {})
    error = bad_argument("data", _KINDS, source)
    raise ArgumentError(f"{error}{did_you_mean(closest(source, names))}")


def _of_folder(root: Path) -> FoundData:
    data = ImageFolderLT(root)
    images = data.file_sets()["train"]
    return FoundData(
        data.class_counts,
        list(data.class_names),
        count_images(data, "test"),
        median_side(images.path, len(images)),
        config={"class_path": "ImageFolderLT", "init_args": {"root": str(root)}},
    )


def _of_config(path: Path) -> FoundData:
    content = read_config(path)
    model = content.get("model")
    # In the file of a comparison, parts of the training stand beside the data; in that of `fit`, in the model.
    parts = content if "backbone" in content or not isinstance(model, Mapping) else model
    options = {name: parts[name] for name in ("backbone", "optimizer") if parts.get(name) is not None}
    data = content.get("data")
    if data is None:
        raise bad_argument("data", f"{_KINDS} with `data`", got_text=f"{str(path)!r} without `data`")
    if isinstance(data, Mapping) and "class_path" not in data:
        data = {"class_path": "DigitsLT", "init_args": data.get("init_args", data)}
    return _of_module(dict(data) if isinstance(data, Mapping) else {"class_path": data}, options)


def _of_module(config: dict[str, Any], options: dict[str, Any]) -> FoundData:
    parser = CommandParser(prog="lightning-ssesam suggest")
    parser.add_subclass_arguments(LongTailDataModule, "data", fail_untyped=False)
    chosen = parser.parse_object({"data": config})
    check_functions(chosen.as_dict())
    data = instantiate(parser, chosen).data
    if not isinstance(data, LongTailDataModule):
        raise bad_argument("data", "a LongTailDataModule", data)
    if getattr(data, "multi_label", False):
        got = f"{type(data).__name__}, whose images have several"
        raise bad_argument("data", "a data set with one label for each image", got_text=got)
    parameters = inspect.signature(type(data)).parameters.values()
    takes_batch_size = any(p.name == "batch_size" or p.kind is p.VAR_KEYWORD for p in parameters)
    return FoundData(
        data.class_counts,
        names_of_classes(data),
        count_images(data, "test") or None,
        data.image_size,
        data.in_channels,
        False,
        config,
        takes_batch_size,
        options,
    )


def _of_list(path: Path, places: Places) -> FoundData:
    root = places.root or Path(".")
    images = ImageList(path, root)
    counts, paths = counts_of_images(images), list(images.paths())
    side = _side(paths, root)
    if (test := places.test or _sibling(path, "test")) is None:
        samples = [(place if os.path.isabs(place) else os.path.relpath(place, root)) for place in paths]
        labelled = ListedImages.pack(zip(samples, labels_of(images).tolist(), strict=True))
        return _divided(divide(labelled, _FRACTIONS, seed=0), [], side, root, places.output)
    tested = labels_of(ImageList(test, root, images.num_classes)).bincount(minlength=images.num_classes).tolist()
    lists = {"train": path, "test": test, "val": _sibling(path, "val")}
    arguments = {name: str(place) for name, place in {**lists, "root": root}.items() if place is not None}
    return FoundData(counts, [], tested, side, config={"class_path": "ImageListLT", "init_args": arguments})


def _sibling(path: Path, name: str) -> Path | None:
    """Return the list file of another set: `data_test.txt` beside `data_train.txt`."""
    other = path.with_name(path.name.replace("train", name))
    return other if other != path and other.is_file() else None


def _of_table(path: Path, places: Places) -> FoundData:
    rows, columns = _read_table(path)
    file = _column(columns, None, _FILE_COLUMNS)
    label = _column(columns, places.label, _LABEL_COLUMNS) or _last_column(path, rows, columns, file)
    labels = [row[label].strip() for row in rows]
    for number, text in enumerate(labels, start=2):
        if not text or "|" in text or ";" in text:
            raise ArgumentError(f"{path}, line {number}: Expected one label in {label!r}, but got {text!r}.")
    names = sorted(set(labels), key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    if file is None:
        return FoundData([Counter(labels)[name] for name in names], names)
    root = places.root or path.parent
    index = {name: number for number, name in enumerate(names)}
    samples = [(row[file].strip(), index[text]) for row, text in zip(rows, labels, strict=True)]
    side = _side([str(root / place) for place, _ in samples], root)
    sets = [row.get("split", "").strip().lower() for row in rows]
    if not set(sets) <= set(_SETS) or not {"train", "test"} <= set(sets):
        divided = divide(ListedImages.pack(samples), _FRACTIONS, seed=0)
        return _divided(divided, names, side, root, places.output)
    parts = {
        name: ListedImages.pack(sample for other, sample in zip(sets, samples, strict=True) if other == name)
        for name in _SETS
        if name in sets
    }
    return _divided(parts, names, side, root, places.output)


def _read_table(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """Return the rows of a table by column, and its columns."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise bad_argument("data", "a CSV file in UTF-8", got_text=f"{str(path)!r}: {error}") from error
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, restval="")
    rows = list(reader)
    columns = [name for name in reader.fieldnames or [] if name]
    if not rows or not columns:
        raise bad_argument("data", "a CSV file with a line of column names and a line for each image", str(path))
    return rows, columns


def _column(columns: Sequence[str], given: str | None, usual: Sequence[str]) -> str | None:
    """Return the column that is given, or one with a usual name, or None."""
    if given is None:
        return next((column for name in usual for column in columns if column.strip().lower() == name), None)
    if given not in columns:
        error = bad_argument("label", f"a column, one of {', '.join(columns)}", given)
        raise ArgumentError(f"{error}{did_you_mean(closest(given, columns))}")
    return given


def _last_column(path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str], file: str | None) -> str:
    """Return the last column for the labels, or raise ``ArgumentError`` if each column is a label of its own."""
    others = [name for name in columns if name not in (file, "split")]
    if len(others) > 1 and all(row[name].strip().lower() in ANSWERS for row in rows for name in others):
        got = f"{len(others)} columns of 0 and 1, such as {others[0]!r} and {others[1]!r}"
        found = f"{path}: Expected one column of labels, but got {got}."
        way_out = "`ImageTableLT` trains on several labels for an image. If one column has the classes, give `--label`."
        raise ArgumentError(f"{found} {way_out}")
    return columns[-1]


def _side(paths: Sequence[str], root: Path) -> int:
    """Return the shorter side of most images, or raise ``ArgumentError`` if no image can be read."""
    if (side := median_side(paths.__getitem__, len(paths))) is None:
        how = "Give the folder that the paths are relative to as `root`."
        raise ArgumentError(f"No image can be read, such as {paths[0]!r} in {str(root)!r}. {how}")
    return side


def _divided(parts: Mapping[str, ListedImages], names: list[str], side: int, root: Path, output: Path) -> FoundData:
    """Return what sets of images have. Their lists have to be written."""
    number = 1 + max(int(images.targets.max()) for images in parts.values())
    counts = {name: images.targets.bincount(minlength=number).tolist() for name, images in parts.items()}
    lists = {name: output.with_name(f"{output.stem}_{name}.txt") for name in _SETS if name in parts}
    content = {str(lists[name]): "".join(f"{path} {label}\n" for path, label in parts[name].samples) for name in lists}
    arguments: dict[str, Any] = {name: str(path) for name, path in lists.items()}
    named = {"class_names": names} if names else {}
    config = {"class_path": "ImageListLT", "init_args": {**arguments, "root": str(root), **named}}
    return FoundData(counts["train"], names, counts["test"], side, config=config, lists=content)
