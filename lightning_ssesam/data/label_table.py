"""Tables of images and their labels: CSV files with one image a row."""

import csv
import difflib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.class_order import check_class_names
from lightning_ssesam.data.reading import shown
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.targets import IGNORE_INDEX

_DELIMITERS = ",;\t"
_SEPARATORS = "|;"
# What spreadsheets and pandas write for yes and no. Nothing is a missing label.
ANSWERS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0, "": IGNORE_INDEX}
_NO_ANSWER = -1
_SETS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Columns:
    """Which columns of a table have what.

    Args:
        files: Column of the files' names.
        labels: Column of label names, or the columns of 0 and 1, one for each label. By default the column ``labels``,
            or else all columns but those of files and sets.
        split: Column of the sets ``train``, ``val`` and ``test``. By default the column ``split``, if there is one.
        separator: Text between the label names in a cell; ``|`` or ``;`` by default.
    """

    files: str = "file"
    labels: str | Sequence[str] | None = None
    split: str | None = None
    separator: str | None = None


@dataclass(frozen=True)
class LabelTable:
    """The rows of a table.

    Attributes:
        path: Path of the table.
        class_names: Name of each label, length C.
        files: Name of each image's file, length N.
        lines: Line of each image in the table, counted from 1.
        answers: 0, 1 or :data:`IGNORE_INDEX` for each image and label, ``(N, C)``, int8.
        sets: Set of each image; None if the table does not say it.
    """

    path: str
    class_names: list[str]
    files: list[str]
    lines: list[int]
    answers: Tensor
    sets: list[str] | None


class _Row(dict[str, str]):
    """The cells of a row by column, and its line."""

    line: int


def read_table(path: str | Path, columns: Columns, class_names: Sequence[str] | None = None) -> LabelTable:
    """Read a table of images and labels.

    Args:
        path: CSV file in UTF-8, with a first line of column names. Columns are separated by commas, semicolons or tabs.
        columns: Names of the columns.
        class_names: Name of each label. By default those of the training images in alphabetical order, or the columns
            of 0 and 1.

    Raises:
        ArgumentError: If the file cannot be read, a column is missing, or a row is wrong. The message has the line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, rows = _read_rows(str(path), file.read(), columns.files)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        expected = "Expected a table in CSV format and UTF-8"
        raise ArgumentError(f"{shown(str(path))}: {expected}, but got an error: {reason}.") from error
    table = _Table(str(path), header, rows)
    label_columns = table.find_labels(columns)
    names, answers = (
        table.read_names(label_columns, columns, class_names)
        if isinstance(label_columns, str)
        else table.read_answers(label_columns, class_names)
    )
    sets = None if table.split_column(columns) is None else [table.set_of(row, columns) for row in rows]
    files = [table.file_of(row, columns.files) for row in rows]
    table.check_once(files)
    return LabelTable(str(path), names, files, [row.line for row in rows], answers, sets)


def _read_rows(path: str, text: str, files: str) -> tuple[list[str], list[_Row]]:
    """Return the names of the columns, and the rows that are not blank."""
    headers: dict[str, list[str]] = {
        mark: [name.strip() for name in next(_reader(text, mark), [])] for mark in _DELIMITERS
    }
    delimiter = next((mark for mark, header in headers.items() if files in header), None)
    if delimiter is None:
        longest: list[str] = max(headers.values(), key=len)
        found = ", ".join(map(repr, longest)) or "an empty file"
        raise _bad(path, f"a column {files!r} with the names of the images' files", f"{found}; see `files`")
    header, rows = headers[delimiter], list[_Row]()
    if repeated := [name for name in header if header.count(name) > 1]:
        raise _bad(path, "columns with different names", f"{repeated[0]!r} more than once")
    reader = _reader(text, delimiter, strict=True)
    next(reader)
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise _bad(f"{path}, line {reader.line_num}", f"{len(header)} cells, one for each column", str(len(cells)))
        rows.append(_Row(zip(header, (cell.strip() for cell in cells), strict=True)))
        rows[-1].line = reader.line_num
    if not rows:
        raise _bad(path, "a row for each image", "none")
    return header, rows


def _reader(text: str, delimiter: str, strict: bool = False) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)


def _bad(place: str, expected: str, got: str) -> ArgumentError:
    return ArgumentError(f"{shown(place)}: Expected {expected}, but got {got}.")


@dataclass(frozen=True)
class _Table:
    """Reads the cells of a table, and says what is wrong with them."""

    path: str
    header: list[str]
    rows: list[_Row]

    def find_labels(self, columns: Columns) -> str | list[str]:
        """Return the column of label names, or the columns of 0 and 1."""
        split = self.split_column(columns)
        if columns.labels is None:
            if "labels" in self.header:
                return "labels"
            found = [name for name in self.header if name not in (columns.files, split)]
            if not found:
                raise _bad(self.path, "a column 'labels', or one of 0 and 1 for each label", "no other column")
            return found
        wanted = [columns.labels] if isinstance(columns.labels, str) else list(columns.labels)
        for name in wanted:
            self._check_column(name, "labels")
        if not wanted or len(set(wanted)) < len(wanted) or columns.files in wanted or split in wanted:
            raise bad_argument("labels", "a column of label names, or different columns of 0 and 1", columns.labels)
        return columns.labels if isinstance(columns.labels, str) else wanted

    def split_column(self, columns: Columns) -> str | None:
        """Return the column of the sets, if there is one."""
        if columns.split is None:
            return "split" if "split" in self.header else None
        self._check_column(columns.split, "split")
        return columns.split

    def _check_column(self, name: str, argument: str) -> None:
        if name not in self.header:
            found = ", ".join(map(repr, self.header))
            raise bad_argument(argument, f"a column of {shown(self.path)} ({found})", name)

    def _wrong(self, row: _Row, expected: str, got: str) -> ArgumentError:
        return _bad(f"{self.path}, line {row.line}", expected, got)

    def set_of(self, row: _Row, columns: Columns) -> str:
        """Return the set of an image."""
        cell = row[str(self.split_column(columns))]
        if (found := _SETS.get(cell.lower())) is None:
            raise self._wrong(row, "one of the sets 'train', 'val' and 'test'", repr(cell))
        return found

    def file_of(self, row: _Row, column: str) -> str:
        """Return the name of an image's file."""
        if not row[column]:
            raise self._wrong(row, "the name of a file", "an empty cell")
        return row[column]

    def check_once(self, files: Sequence[str]) -> None:
        """Refuse a file that comes twice. It might be in two sets."""
        seen: dict[str, int] = {}
        for file, row in zip(files, self.rows, strict=True):
            key = os.path.normpath(file)
            if key in seen:
                raise self._wrong(row, "each image once", f"{file!r} again, as in line {seen[key]}")
            seen[key] = row.line

    def read_answers(self, columns: list[str], class_names: Sequence[str] | None) -> tuple[list[str], Tensor]:
        """Return the names of the labels, and the answers in columns of 0 and 1."""
        names = columns if class_names is None else check_class_names(class_names, len(columns))
        answers = np.empty((len(self.rows), len(columns)), dtype=np.int8)
        for number, row in enumerate(self.rows):
            found = [ANSWERS.get(row[name].lower(), _NO_ANSWER) for name in columns]
            if _NO_ANSWER in found:
                wrong = columns[found.index(_NO_ANSWER)]
                expected = f"0, 1 or nothing (missing) in the column {wrong!r}"
                raise self._wrong(row, expected, f"{row[wrong]!r}; `labels` chooses the columns")
            answers[number] = found
        return list(names), torch.from_numpy(answers)

    def read_names(self, column: str, columns: Columns, class_names: Sequence[str] | None) -> tuple[list[str], Tensor]:
        """Return the names of the labels, and the answers, from a column of label names."""
        cells = [list(self._names_in(row, column, columns.separator)) for row in self.rows]
        has_sets = self.split_column(columns) is not None
        trained = [not has_sets or self.set_of(row, columns) == "train" for row in self.rows]
        known = sorted({name for names, is_trained in zip(cells, trained, strict=True) if is_trained for name in names})
        names = known if class_names is None else check_class_names(list(class_names), len(class_names))
        if not names:
            raise _bad(self.path, f"a label of a training image in the column {column!r}", "none")
        index = {name: number for number, name in enumerate(names)}
        answers = np.zeros((len(cells), len(names)), dtype=np.int8)
        for number, found in enumerate(cells):
            for name in found:
                if name not in index:
                    raise self._unknown(self.rows[number], name, names, class_names is not None)
                answers[number, index[name]] = 1
        return names, torch.from_numpy(answers)

    def _names_in(self, row: _Row, column: str, separator: str | None) -> Iterator[str]:
        parts = re.split(f"[{_SEPARATORS}]", row[column]) if separator is None else row[column].split(separator)
        for name in filter(None, map(str.strip, parts)):
            if separator is None and re.search(r"[,\t]", name):
                raise self._wrong(row, "label names with | or ; between them", f"{name!r}; see `separator`")
            yield name

    def _unknown(self, row: _Row, name: str, names: Sequence[str], is_given: bool) -> ArgumentError:
        close = difflib.get_close_matches(name, names, n=1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        expected = "one of `class_names`" if is_given else "a label of a training image"
        hint = "" if is_given else "; if it is right, give `class_names`"
        return self._wrong(row, expected, f"{name!r}{guess}{hint}")
