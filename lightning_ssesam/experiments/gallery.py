"""The worst test images of the tail, as small pictures in the report."""

import base64
import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ssesam.data import ImageInput, LongTailDataModule
from lightning_ssesam.experiments.remarks import name_of_class
from lightning_ssesam.experiments.runs import Comparison, Run, by_method

# Pictures of a report, and of a method. A report has at least one of each method.
_MOST, _MOST_OF_METHOD = 48, 12
# Pixels of the longer side.
_SIZE = 96


class Mistake(NamedTuple):
    """A test image that a method got wrong.

    Attributes:
        place: Position of the image in the test set.
        true: Index of its class.
        predicted: Index of the class that it was taken for.
        probability: Probability of that class, in [0, 1].
    """

    place: int
    true: int
    predicted: int
    probability: float


class Exhibit(NamedTuple):
    """A picture of the gallery.

    Attributes:
        source: Picture as a data URI.
        true: Name of its class.
        predicted: Name of the class that it was taken for.
        probability: Probability of that class in percent, as text.
    """

    source: str
    true: str
    predicted: str
    probability: str


def worst_mistakes(runs: Sequence[Run], most: int) -> list[Mistake]:
    """Return the surest errors of the runs of a method on tail classes, each image once, the surest first."""
    found: dict[int, Mistake] = {}
    for run in runs:
        for place, true, predicted, probability in run.tail_mistakes:
            mistake = Mistake(int(place), int(true), int(predicted), probability)
            if mistake.place not in found or probability > found[mistake.place].probability:
                found[mistake.place] = mistake
    return sorted(found.values(), key=lambda mistake: (-mistake.probability, mistake.place))[:most]


def make_gallery(comparison: Comparison) -> tuple[dict[str, list[Exhibit]], str]:
    """Return the pictures of each method, and why pictures are missing, if any are.

    Inputs that are no images have no pictures. An image that cannot be read does not end a comparison.
    """
    methods = by_method(comparison.runs)
    most = max(1, min(_MOST_OF_METHOD, _MOST // len(methods)))
    mistakes = {name: found for name, runs in methods.items() if (found := worst_mistakes(runs, most))}
    try:
        inputs = {id(data): _read(data, places) for data, places in _places_by_data(comparison, mistakes)}
    except Exception as error:
        # The results of hours are not lost for these pictures.
        return {}, f"The images could not be read: {error}"
    gallery: dict[str, list[Exhibit]] = {}
    for method, found in mistakes.items():
        images, labels, form = inputs[id(comparison.data_of(method))]
        if any(labels[mistake.place] != mistake.true for mistake in found):
            return {}, "The images are not shown: those of the test set are not in the order in which they were tested."
        sources = {mistake: thumbnail(images[mistake.place], form) for mistake in found}
        exhibits = [_exhibit(methods[method], mistake, source) for mistake, source in sources.items() if source]
        gallery |= {method: exhibits} if exhibits else {}
    return gallery, ""


def _exhibit(runs: Sequence[Run], mistake: Mistake, source: str) -> Exhibit:
    true, predicted = (name_of_class(runs, number) for number in (mistake.true, mistake.predicted))
    # What is rounded up to 100 % would look certain.
    return Exhibit(source, true, predicted, f"{min(100 * mistake.probability, 99.9):.1f}")


def _places_by_data(
    comparison: Comparison, mistakes: Mapping[str, Sequence[Mistake]]
) -> list[tuple[LongTailDataModule, list[int]]]:
    """Return the data modules of the methods, each once, with the positions of their images."""
    modules = {id(data): data for data in map(comparison.data_of, mistakes)}
    places: dict[int, set[int]] = {key: set() for key in modules}
    for method, found in mistakes.items():
        places[id(comparison.data_of(method))].update(mistake.place for mistake in found)
    return [(data, sorted(places[key])) for key, data in modules.items()]


def _read(data: LongTailDataModule, places: Sequence[int]) -> tuple[dict[int, Any], dict[int, int], ImageInput | None]:
    """Return test images and their labels by position, as the first test loader gives them, and what made them."""
    copied = copy.copy(data)
    # The command has checked the files.
    copied._files_checked = True
    with torch.random.fork_rng(devices=[]):
        copied.prepare_data()
        copied.setup("test")
        loaders: Any = copied.test_dataloader()
        loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
        batches = {place: loader.collate_fn([loader.dataset[place]]) for place in places}
    images, labels = ({place: batch[part][0] for place, batch in batches.items()} for part in (0, 1))
    return images, {place: int(label) for place, label in labels.items()}, copied.image_input


def thumbnail(image: Any, form: ImageInput | None = None) -> str | None:
    """Return a small picture of an input as a data URI, or None if it is no image.

    Args:
        image: Grey levels ``(H, W)`` or channels ``(C, H, W)``, of any real dtype and range.
        form: What made the input, if it is known: it says what is black and white. Otherwise the smallest value is
            black, and the largest is white.
    """
    if not isinstance(image, Tensor) or image.ndim not in (2, 3) or image.is_complex() or not image.numel():
        return None
    from PIL import Image

    values = image.detach().cpu().float().nan_to_num(0, 0, 0)
    channels = values[None] if values.ndim == 2 else values
    levels = _levels(channels, form)
    # Two channels, or many, have no colours.
    levels = levels[:3] if len(levels) in (3, 4) else levels.mean(0, keepdim=True)
    pixels = (255 * levels).round().to(torch.uint8).movedim(0, -1).squeeze(-1).numpy()
    picture, file = Image.fromarray(pixels), io.BytesIO()
    is_large = max(picture.size) > _SIZE
    if is_large:
        picture.thumbnail((_SIZE, _SIZE))
    # Few pixels take least as PNG, and JPEG would blur them.
    kind = "jpeg" if is_large else "png"
    picture.save(file, kind, **({"quality": 85} if is_large else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _levels(channels: Tensor, form: ImageInput | None) -> Tensor:
    """Return the channels ``(C, H, W)`` in [0, 1]."""
    if form is not None and len(channels) == form.channels:
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (form.mean, form.std))
        levels = channels * std + mean
        # Another transform, or a mixture, has another range.
        if levels.min() > -0.01 and levels.max() < 1.01:
            return levels.clamp(0, 1)
    least, most = channels.min(), channels.max()
    return (channels - least) / (most - least).clamp(min=torch.finfo(torch.float32).tiny)
