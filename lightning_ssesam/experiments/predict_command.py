"""The command ``lightning-ssesam predict``: the classes of new pictures, by a checkpoint."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lightning_ssesam._validation import bad_argument, check_choice, check_flag, check_integer
from lightning_ssesam.data import ImageDataModule, LongTailDataModule
from lightning_ssesam.data.reading import find_problem, shown
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.checkpoints import load_classifier
from lightning_ssesam.experiments.console import find_device, quiet
from lightning_ssesam.experiments.files import make_folder, set_aside
from lightning_ssesam.experiments.lifetimes import interruption
from lightning_ssesam.experiments.pictures import Batch, Pictures, PictureSet, collate, find_pictures
from lightning_ssesam.experiments.progress import display_options
from lightning_ssesam.experiments.tables import write_csv
from lightning_ssesam.experiments.trust import say
from lightning_ssesam.metrics import HeadTailAccuracy, ManyMediumFewAccuracy
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.split import ClassSplit

# Files that cannot be read, and classes, that a message names.
_NAMED = 5
_SHOWN = 10


class Prediction(NamedTuple):
    """The predictions for a picture.

    Attributes:
        file: Path of the picture.
        classes: Names of the most probable classes, the most probable one first.
        probabilities: Their probabilities in [0, 1].
        true_class: Name of its class; None if it is not known.
    """

    file: str
    classes: list[str]
    probabilities: list[float]
    true_class: str | None


def predict(
    checkpoint: Path,
    images: Path,
    output: Path = Path("predictions.csv"),
    config: Path | None = None,
    top: int = 5,
    labelled: bool | None = None,
    tta: Literal["none", "hflip"] | None = None,
    skip_unreadable: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    trust_checkpoint: bool = False,
) -> list[Prediction]:
    """Predict the classes of new images by a checkpoint of `fit` or `compare`, and write a CSV file.

    The file has a row for each image: its path, the predicted class by name, its probability, and the next classes. If
    the classes of the images are known, because they lie in folders with the names of classes, the rows have the true
    class, too. Then wrong predictions come first, the most certain ones at the top, and the accuracy is printed. Of
    multi-label data, the rows have the most probable labels.

    Args:
        checkpoint: Checkpoint of the classifier.
        images: Folder with images, a list file with a path in each line, or a single image.
        output: CSV file to write.
        config: Configuration of the training, for checkpoints that do not say how images become inputs. By default the
            config.yaml beside the checkpoint. A configuration is code: take none from strangers.
        top: Number of classes in a row, an integer >= 1.
        labelled: Whether the classes of the images are known; found out by default.
        tta: Test-time augmentation, "none" or "hflip"; by default as in the training.
        skip_unreadable: Whether to leave out images that cannot be read. By default they are an error.
        batch_size: Number of images that are forwarded at a time.
        num_workers: Number of processes that read images; 0 reads them in this one.
        device: Device to compute on, such as cpu or cuda:1; auto takes a GPU if there is one.
        trust_checkpoint: Permission for a checkpoint to hold more than plain data. Such a file can run any code.

    Returns:
        The predictions, in the order of the rows.

    Raises:
        ArgumentError: If an argument is out of range, the checkpoint cannot be used, or an image cannot be read.
    """
    for name, number, least in (("top", top, 1), ("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        check_integer(name, number, minimum=least)
    check_flag("skip_unreadable", skip_unreadable)
    place = find_device(device)
    with quiet():
        model, data = load_classifier(checkpoint, config, trust_checkpoint)
    if tta is not None:
        model.tta = check_choice("tta", tta, ("none", "hflip"))
    names = model.class_names or [str(number) for number in range(model.split.num_classes)]
    transform = _input_transform(model, data)
    if model.split.multi_label:
        labelled = _without_labels(labelled)
    pictures = find_pictures(images, names, labelled)
    if not skip_unreadable:
        _refuse_unreadable(pictures.paths)
    _check_output(output, [checkpoint, images, *map(Path, pictures.paths)])
    make_folder(output.absolute().parent)
    found = _Found(pictures, names, min(top, len(names)))
    loader = DataLoader(PictureSet(pictures.paths, transform), batch_size, num_workers=num_workers, collate_fn=collate)
    try:
        _predict(model.to(place).eval(), loader, found)
    except (KeyboardInterrupt, SystemExit) as error:
        rows = _write(found, output)
        print(f"\nInterrupted after {len(rows)} of {len(pictures.paths)} images, which are in {output}.")
        raise interruption(error) from None
    rows = _write(found, output)
    print("\n".join([*_summary(found, model.split), f"Written: {output}, {len(rows):,} images"]))
    if found.unreadable:
        named = _name_unreadable(found.unreadable, len(pictures.paths))
        if not skip_unreadable:
            raise ArgumentError(f"{named} The others are in {output}.")
        say(named)
    return rows


def _without_labels(labelled: bool | None) -> bool:
    """Return False, because a folder or a list gives an image one class. Refuse True."""
    if labelled:
        raise bad_argument("labelled", "False for a classifier of multi-label data", labelled)
    return False


class _Found:
    """What is known of the pictures: the places of their most probable classes, and these classes' probabilities."""

    def __init__(self, pictures: Pictures, names: Sequence[str], top: int) -> None:
        self.pictures, self.names, self.top = pictures, names, top
        self.classes = np.full((len(pictures.paths), top), -1, dtype=np.int32)
        self.probabilities = np.zeros((len(pictures.paths), top), dtype=np.float32)
        self.unreadable: list[str] = []

    @property
    def places(self) -> list[int]:
        """Places of the pictures that have been predicted."""
        return [int(place) for place in np.flatnonzero(self.classes[:, 0] >= 0)]


@torch.inference_mode()
def _predict(model: LongTailClassifier, loader: Iterable[Batch], found: _Found) -> None:
    with tqdm(total=len(found.pictures.paths), desc="Predicting", unit="image", **display_options()) as bar:
        for inputs, places, unreadable in loader:
            if places:
                best = model.probabilities(inputs.to(model.device)).topk(found.top)
                found.classes[places], found.probabilities[places] = best.indices.cpu(), best.values.cpu()
            found.unreadable += unreadable
            bar.update(len(places) + len(unreadable))


def _input_transform(model: LongTailClassifier, data: LongTailDataModule | None) -> Callable[[Any], Tensor]:
    """Return the transform of new images: that of the test images in the training."""
    own = data.test_transform if isinstance(data, ImageDataModule) else None
    if own is not None:
        return own
    if model.image_input is None and data is not None:
        data.setup("test")
        model.image_input = data.image_input
    if model.image_input is None:
        raise ArgumentError(
            "The checkpoint does not say how an image becomes an input: its data module has no `image_input`."
            " Set it in the data module, and train again; or call `predict_step` of the classifier with inputs."
        )
    return model.image_input.transform()


def _check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is a folder, or one of the files that are read."""
    if output.is_dir():
        raise bad_argument("output", "a file", got_text=f"the folder {str(output)!r}")
    if output.exists() and any(path.exists() and output.samefile(path) for path in inputs):
        raise bad_argument("output", "another file than those that are read", got_text=repr(str(output)))


def _refuse_unreadable(paths: Sequence[str]) -> None:
    """Refuse files whose header or end is wrong, before the first prediction."""
    problems = [(path, problem) for path in paths if (problem := find_problem(path)) is not None]
    if problems:
        named = [f"Expected {shown(path)} to be an image that can be read, but got {what}." for path, what in problems]
        raise ArgumentError(f"{_name_unreadable(named, len(paths))} With `--skip_unreadable true` they are left out.")


def _name_unreadable(reasons: Sequence[str], total: int) -> str:
    more = f" ... and {len(reasons) - _NAMED} more." if len(reasons) > _NAMED else ""
    return f"{len(reasons)} of {total:,} images cannot be read. {' '.join(reasons[:_NAMED])}{more}"


def _write(found: _Found, output: Path) -> list[Prediction]:
    """Write what has been predicted, and return it."""
    labels, names = found.pictures.labels, found.names
    predictions = [
        Prediction(
            found.pictures.paths[place],
            [names[number] for number in found.classes[place]],
            [float(value) for value in found.probabilities[place]],
            None if labels is None else names[labels[place]],
        )
        for place in found.places
    ]
    header = ["file", "class", "probability"]
    header += [f"{name}_{number}" for number in range(2, found.top + 1) for name in ("class", "probability")]
    if labels is not None:
        # Wrong ones first, the most certain ones at the top. The others stay in the order of their files.
        predictions.sort(key=lambda p: -p.probabilities[0] if p.classes[0] != p.true_class else 1)
        header = ["file", "true_class", "correct", *header[1:]]
    set_aside(output)
    write_csv(output, header, [_row(prediction) for prediction in predictions])
    return predictions


def _row(prediction: Prediction) -> list[object]:
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    cells: list[object] = [cell for name, share in pairs for cell in (name, round(share, 6))]
    if prediction.true_class is None:
        return [prediction.file, *cells]
    return [prediction.file, prediction.true_class, int(prediction.true_class == prediction.classes[0]), *cells]


def _summary(found: _Found, split: ClassSplit) -> list[str]:
    """Return how often each class was predicted, and how often rightly where the classes are known."""
    predicted = torch.from_numpy(found.classes[found.places, 0]).long()
    counts = predicted.bincount(minlength=len(found.names))
    often = [int(number) for number in counts.argsort(descending=True, stable=True) if counts[number] > 0]
    shown_counts = ", ".join(f"{found.names[number]} {int(counts[number]):,}" for number in often[:_SHOWN])
    more = f", and {len(often) - _SHOWN} more classes" if len(often) > _SHOWN else ""
    lines = [f"Predicted: {shown_counts or 'nothing'}{more}"]
    if found.pictures.labels is None or not found.places:
        return lines
    targets = torch.tensor([found.pictures.labels[place] for place in found.places])
    parts = []
    for metric in (HeadTailAccuracy(split), ManyMediumFewAccuracy(split)):
        metric.update(predicted, targets)
        parts += [f"{name} {100 * value:.1f}" for name, value in metric.compute().items() if not value.isnan()]
    right = int((predicted == targets).sum())
    lines.append(f"Right: {right:,} of {len(targets):,} ({100 * right / len(targets):.1f} %)")
    # Both metrics have the mean over all classes.
    lines.append(f"Mean recall of the classes, in %: {', '.join(dict.fromkeys(parts))}")
    return lines
