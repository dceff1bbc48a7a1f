"""What to begin with on long-tailed data: the tail, batch size, loss, sampler and objective, and why."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_ssesam._validation import bad_argument, check_flag, check_integer
from lightning_ssesam.class_order import check_class_names
from lightning_ssesam.experiments.intervals import FEW_IMAGES
from lightning_ssesam.split import ClassSplit, Counts, as_counts

# Imbalance factors: below the first, classes count as balanced; the papers begin at the second.
_BALANCED, _USUAL = 2, 10
# A batch without tail images is not perturbed for the tail. Batches are chosen so that the first share of the updates
# has none (docs/choosing.md). If more than the second share has none all the same, a sampler is suggested.
_WITHOUT_TAIL, _TOO_OFTEN = 0.01, 0.05
# Batches: the published one (docs/results.md), the largest for images of up to 64x64 pixels, and that for larger ones.
_BATCH, _LARGEST_BATCH, _BATCH_OF_PHOTOS = 64, 256, 64
_SMALLEST_BATCH, _MOST_ACCUMULATED, _FEWEST_UPDATES = 8, 4, 2
# The power of a class's size that its share of the draws follows (Kang et al., ICLR 2020), and the name of a method.
_SAMPLERS = {"SquareRootSampler": (0.5, "square-root sampler"), "ClassBalancedSampler": (0.0, "balanced sampler")}
_SMALL, _TINY = 64, 16
# Height and width of photos: on a CPU as in `compare_folder`, and as networks for ImageNet take them.
_SIZE_ON_CPU, _SIZE_OF_PHOTOS = 32, 224
_LARGE_SET, _EPOCHS, _EPOCHS_OF_LARGE_SET = 100_000, 200, 90
# With a smaller share of tail images, usual batches often have none of them.
_RARE = 0.05
# Classes that a line names.
_NAMED = 3

_LATE_SAM = {
    "objective": {
        "class_path": "Staged",
        "init_args": {"objectives": ["ERM", {"class_path": "SAM", "init_args": {"rho": 0.2}}]},
    },
    "callbacks": [{"class_path": "StageSwitch", "init_args": {"at": 0.8}}],
}
_IMBSAM = {"objective": {"class_path": "ImbSAM", "init_args": {"rho": 0.05}}}
_SSESAM = {"objective": {"class_path": "SSESAM", "init_args": {"head_rho": 0.05, "tail_rho": 0.1}}}
_LOSS = "lightning_ssesam.losses.LogitAdjustedLoss"


@dataclass(frozen=True)
class Suggestion:
    """What to begin with on a data set.

    Attributes:
        tail: Rule of the tail, ``{"tail_below": ...}`` or ``{"tail_fraction": ...}``.
        batch_size: Number of images in a batch.
        accumulated: Number of batches of an update.
        sampler: Name of the sampler for the methods that perturb for the tail; None for shuffled batches.
        loss: Class path of the loss; None for cross-entropy.
        is_balanced: Whether the classes are so equal that the methods for long tails are not needed.
        image_size: Height and width of the images; None if it is not known, or not to be changed.
        epochs: Number of epochs of a training.
        methods: Options of each method, as in a YAML file of ``compare``.
        backbone: Network by class path, with its arguments; None if the images are not known.
        lines: What is suggested and why, at most ten lines.
    """

    tail: dict[str, Any]
    batch_size: int
    accumulated: int
    sampler: str | None
    loss: str | None
    is_balanced: bool
    image_size: int | None
    epochs: int
    methods: dict[str, dict[str, Any]]
    backbone: dict[str, Any] | None
    lines: list[str]

    def config(self) -> dict[str, Any]:
        """Return the options of ``compare``, without the data."""
        accumulation = {} if self.accumulated == 1 else {"trainer": {"accumulate_grad_batches": self.accumulated}}
        backbone = {} if self.backbone is None else {"backbone": self.backbone}
        return {**backbone, "methods": self.methods, "epochs": self.epochs, "seeds": 3, **self.tail, **accumulation}


def suggest(
    class_counts: Counts,
    class_names: Sequence[str] = (),
    test_counts: Sequence[int] | None = None,
    image_side: int | None = None,
    in_channels: int | None = None,
    gpu: bool = False,
    may_resize: bool = True,
) -> Suggestion:
    """Suggest what to begin with on long-tailed data. Every rule rests on a page of the documentation or on a paper.

    Args:
        class_counts: Training images of each class, integers >= 1, of at least two classes.
        class_names: Name of each class, for the lines; numbers by default.
        test_counts: Test images of each class, integers >= 0; None if unknown.
        image_side: Shorter side of most images in pixels, an integer >= 1; None if unknown.
        in_channels: Channels of the images; None if unknown.
        gpu: Whether there is a GPU to train on.
        may_resize: Whether the size of the images may be chosen. Without it, ``image_side`` is their size.

    Raises:
        ArgumentError: If an argument is out of range, or there is a single class.

    Example:
        >>> suggestion = suggest([280, 140, 56, 21, 7, 3], image_side=300)
        >>> suggestion.tail, suggestion.batch_size, suggestion.sampler
        ({'tail_below': 100}, 64, None)
    """
    counts = as_counts(class_counts)
    names = _check(counts, class_names, test_counts, image_side, {"gpu": gpu, "may_resize": may_resize})
    tail, split, why_tail = _choose_tail(counts)
    is_balanced = int(counts.max()) < _BALANCED * int(counts.min())
    size = _choose_size(image_side, gpu) if may_resize else image_side
    sampler, (batch_size, accumulated) = _choose_batches(split, size)
    epochs = _EPOCHS_OF_LARGE_SET if int(counts.sum()) > _LARGE_SET else _EPOCHS
    backbone, why_backbone = _choose_backbone(size, image_side, in_channels, gpu)
    lines = [
        _about_data(split, names),
        why_tail,
        _about_batches(split, batch_size, accumulated, sampler),
        *(_ABOUT_BALANCED if is_balanced else _about_methods(sampler)),
        *why_backbone,
        _about_length(epochs),
        *_about_few_images(names, counts.numpy(), test_counts),
    ]
    return Suggestion(
        tail,
        batch_size,
        accumulated,
        sampler,
        None if is_balanced else _LOSS,
        is_balanced,
        size if may_resize else None,
        epochs,
        _methods(is_balanced, sampler),
        backbone,
        lines,
    )


def _check(
    counts: Tensor, names: Sequence[str], tested: Sequence[int] | None, side: int | None, flags: dict[str, bool]
) -> list[str]:
    """Check arguments, and return the names of the classes, or nothing."""
    if len(counts) < 2:
        raise bad_argument("class_counts", "counts of two classes or more", got_text="that of a single class")
    if side is not None:
        check_integer("image_side", side, minimum=1)
    for name, flag in flags.items():
        check_flag(name, flag)
    if tested is not None and (len(tested) != len(counts) or min(tested) < 0):
        raise bad_argument("test_counts", f"{len(counts)} integers >= 0, one for each class", tested)
    return check_class_names(list(names), len(counts)) if names else []


def _choose_tail(counts: Tensor) -> tuple[dict[str, Any], ClassSplit, str]:
    """Return the rule of the tail, the split by it, and why."""
    usual = ClassSplit.from_counts(counts, tail_below=100)
    if _RARE <= _share(usual) <= 1 / 2:
        why = "classes with fewer than 100 images (tail_below: 100), as in the papers"
        return {"tail_below": 100}, usual, f"Tail: {why}{_size_of_tail(usual)}."
    by_share = ClassSplit.from_counts(counts, tail_fraction=0.2)
    if by_share.tail.any():
        why = "the rarest classes with at most a fifth of the images (tail_fraction: 0.2)"
        return {"tail_fraction": 0.2}, by_share, f"Tail: {why}{_size_of_tail(by_share)}."
    rule: dict[str, Any] = {"tail_below": int(counts.min()) + 1}
    if counts.min() == counts.max():
        # One class is the tail, so that the comparison has both groups.
        rule = {"tail_fraction": math.ceil(100 / len(counts)) / 100}
    split = ClassSplit.from_counts(counts, **rule)
    ((name, value),) = rule.items()
    why = "because every class has more than a fifth of them"
    return rule, split, f"Tail: the smallest class ({name}: {value}){_size_of_tail(split)}, {why}."


def _share(split: ClassSplit, sampler: str | None = None) -> float:
    """Return the share of the tail in the images that are drawn."""
    power = 1.0 if sampler is None else _SAMPLERS[sampler][0]
    drawn = split.class_counts.double() ** power
    return float(drawn[split.tail].sum() / drawn.sum())


def _size_of_tail(split: ClassSplit) -> str:
    return f": {int(split.tail.sum()):,} of {split.num_classes:,} classes, {100 * _share(split):.2g} % of the images"


def _choose_size(side: int | None, gpu: bool) -> int | None:
    """Return the height and width of the images, which may be reduced."""
    if side is None:
        return None
    if not gpu:
        return min(side, _SIZE_ON_CPU)
    return side if side <= _SMALL else _SMALL if side < _SIZE_OF_PHOTOS // 2 else _SIZE_OF_PHOTOS


def _choose_batches(split: ClassSplit, size: int | None) -> tuple[str | None, tuple[int, int]]:
    """Return a sampler, or None, and batches with which few updates are without tail images.

    The batches are the images of one, and how many make an update.
    """
    batches, is_enough = _batches(_share(split), split, size)
    if is_enough or int(split.class_counts.max()) < _BALANCED * int(split.class_counts.min()):
        return None, batches
    for sampler in _SAMPLERS:
        batches, is_enough = _batches(_share(split, sampler), split, size)
        if is_enough:
            break
    return sampler, batches


def _batches(share: float, split: ClassSplit, size: int | None) -> tuple[tuple[int, int], bool]:
    """Return the batches for a share of tail images, and whether they are enough."""
    needed = max(1, math.ceil(math.log(_WITHOUT_TAIL) / math.log1p(-share)))
    largest = _BATCH_OF_PHOTOS if size is not None and size > _SMALL else _LARGEST_BATCH
    of_epoch = max(_SMALLEST_BATCH, int(split.class_counts.sum()) // _FEWEST_UPDATES)
    limit = min(largest, 2 ** int(math.log2(of_epoch)))
    batch_size = min(max(_BATCH, 2 ** math.ceil(math.log2(needed))), limit)
    accumulated = min(math.ceil(needed / batch_size), _MOST_ACCUMULATED, max(1, of_epoch // batch_size))
    return (batch_size, accumulated), (1 - share) ** (batch_size * accumulated) <= _TOO_OFTEN


def _choose_backbone(
    size: int | None, side: int | None, in_channels: int | None, gpu: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the network for images of a size, and a line about both."""
    if size is None:
        return None, []
    if size <= _TINY:
        return _network("SmallConvNet"), [f"Network: SmallConvNet, because the images have {size}x{size} pixels."]
    pixels = f"for images of {size}x{size} pixels"
    # Published weights are for colours.
    gain = "Pretrained weights gain more (docs/photos.md)" if in_channels in (None, 3) else ""
    if size > _SMALL:
        depth = 50 if gpu else 18
        slow = "" if gpu else " It is slow without a GPU: reduce the images."
        text = f"Network: ResNet-{depth} {pixels}.{slow}{f' {gain}: add `weights: DEFAULT`.' if gain else ''}"
        return _network("TorchvisionResNet", arch=f"resnet{depth}", stem="imagenet"), [text]
    depth = 32 if gpu else 8
    text = f"Network: CIFARResNet of depth {depth} {pixels}"
    if gpu or side is None or side <= size:
        return _network("CIFARResNet", depth=depth), [f"{text}."]
    text = f"{text} instead of {side}, without a GPU.{f' With one: {gain.lower()}.' if gain else ''}"
    return _network("CIFARResNet", depth=depth), [text]


def _network(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_ssesam.models.{name}", **({"init_args": arguments} if arguments else {})}


def _methods(is_balanced: bool, sampler: str | None) -> dict[str, dict[str, Any]]:
    """Return the methods of the comparison. The first one is what the others are compared with."""
    if is_balanced:
        return {"ERM": {"objective": "ERM"}, "late SAM": _LATE_SAM}
    methods: dict[str, dict[str, Any]] = {
        "ERM": {"objective": "ERM"},
        "ERM + logit adjustment": {"objective": "ERM", "loss": _LOSS},
        "late SAM + logit adjustment": {**_LATE_SAM, "loss": _LOSS},
    }
    others: dict[str, dict[str, Any]] = {"ImbSAM": _IMBSAM, "SSE-SAM": _SSESAM}
    if sampler is None:
        return {**methods, **others}
    drawn = {"sampler": f"lightning_ssesam.data.{sampler}"}
    for name, method in {"ERM": methods["ERM"], **others}.items():
        methods[f"{name} + {_SAMPLERS[sampler][1]}"] = {**method, **drawn}
    return methods


def _about_data(split: ClassSplit, names: Sequence[str]) -> str:
    counts = split.class_counts
    first = f"Data: {int(counts.sum()):,} training images of {len(counts):,} classes"
    if counts.min() == counts.max():
        return f"{first}, {int(counts[0]):,} of each."
    ends = [
        f"{int(counts[k]):,} of {names[k]!r}" if names else f"{int(counts[k]):,} of class {k}"
        for k in (int(counts.argmax()), int(counts.argmin()))
    ]
    factor = int(counts.max()) / int(counts.min())
    shown = f"{factor:,.0f}" if factor >= _USUAL else f"{factor:.2g}"
    is_small = _BALANCED <= factor < _USUAL
    small = f" The papers begin at {_USUAL}, so expect small gains." if is_small else ""
    return f"{first}, from {ends[0]} to {ends[1]}: imbalance factor {shown}.{small}"


def _about_batches(split: ClassSplit, batch_size: int, accumulated: int, sampler: str | None) -> str:
    images, share = batch_size * accumulated, _share(split, sampler)
    drawn = "" if sampler is None else f" ({images * _share(split):.1g} without the sampler)"
    mean = f"{images * share:.2g} tail images on average{drawn}"
    missing = (1 - share) ** images
    how_many = f"{100 * missing:.1g} % have" if missing >= 1e-4 else "almost none has"
    what = f"An update of {accumulated} (accumulate_grad_batches)" if accumulated > 1 else "A batch"
    return f"Batches: {batch_size} images. {what} has {mean}, {how_many} none (docs/choosing.md)."


_ABOUT_BALANCED = (
    f"Methods: these classes are balanced, so the methods for long tails are not needed. Papers begin at {_USUAL}.",
    "Objective: plain training, and SAM in its last fifth, which gains on balanced data, too (docs/family.md).",
)


def _about_methods(sampler: str | None) -> list[str]:
    none = "none. The loss makes up for the sizes of the classes already, and a balanced sampler would do so again."
    rare = f"{sampler} for ImbSAM and SSE-SAM, because too few batches would have tail images. Their loss is plain."
    return [
        "Loss: LogitAdjustedLoss. On CIFAR-10-LT it gained 6 points, more than any objective (docs/results.md).",
        f"Sampler: {none if sampler is None else rare}",
        "Objective: SAM (rho 0.2) in the last fifth of the training. There it was as good as any (docs/family.md).",
        "Compared with it: plain training, and ImbSAM and SSE-SAM, which led there with cross-entropy.",
    ]


def _about_length(epochs: int) -> str:
    source = "as published for CIFAR-100-LT (docs/results.md)"
    if epochs == _EPOCHS_OF_LARGE_SET:
        source = "as Kang et al. (ICLR 2020) train on ImageNet-LT"
    return f"Length: {epochs} epochs, {source}. It must be enough for ERM to fit its training images."


def _about_few_images(names: Sequence[str], counts: "np.ndarray[Any, Any]", tested: Sequence[int] | None) -> list[str]:
    numbers, what = (counts, "training") if tested is None else (np.asarray(tested), "test")
    few = int((numbers < FEW_IMAGES).sum())
    if not few:
        return []
    rarest = np.argsort(numbers, kind="stable")[: min(_NAMED, few)]
    named = ", ".join(f"{names[k]!r} ({numbers[k]})" if names else f"class {k} ({numbers[k]})" for k in rarest)
    number = "1 class has" if few == 1 else f"{few:,} classes have"
    more = " and more" if few > _NAMED else ""
    text = f"Too few to judge: {number} fewer than {FEW_IMAGES} {what} images: {named}{more}"
    return [f"{text}. Collect more (docs/photos.md)."]
