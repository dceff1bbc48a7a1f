"""A branch that contrasts views of the images, beside the classifier (balanced contrastive learning)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssesam._validation import bad_argument, check_integer, check_positive, check_radius
from lightning_ssesam.losses.contrastive import BalancedContrastiveLoss
from lightning_ssesam.targets import IGNORE_INDEX


class ContrastiveBranch(nn.Module):
    """The second branch of balanced contrastive learning (Zhu et al., CVPR 2022, arXiv:2207.09052).

    ``LongTailClassifier(contrast=ContrastiveBranch(...))`` trains on batches of several views of each image, such as
    :class:`~lightning_ssesam.data.SeveralViews` makes: a tensor ``(N, V, C, H, W)`` or a list of V tensors
    ``(N, C, H, W)``, V >= 2. The first view is classified, the others are contrasted with those of all images of the
    batch. The loss of an image is

    ``loss_weight * (loss of its first view) + weight * (balanced contrastive loss of its other views)``.

    The features are the inputs of the classifier, the last ``nn.Linear`` of the network with an output for each class.
    Two layers with a batch norm between them project them. Two others make the centres of the classes from the weights
    of the classifier. All views go through one forward. Validation and predictions are those of the classifier.

    The samples of a batch depend on each other, so passes are full. ``passes="split"`` is refused.

    Args:
        weight: Factor on the contrastive loss, a finite number >= 0; 0.6 for CIFAR and 0.35 for ImageNet-LT.
        loss_weight: Factor on the loss of the classifier, a finite number >= 0; 2 for CIFAR and 1 for ImageNet-LT.
        temperature: Temperature of the contrastive loss, a finite number > 0; 0.1 for CIFAR and 0.07 for ImageNet-LT.
        dim: Features of a projection, an integer >= 1; 128 for CIFAR and 1024 for ImageNet-LT.
        hidden: Features between the two layers, an integer >= 1; by default as many as the classifier has inputs.

    Raises:
        ArgumentError: If an argument is out of range, or the network has no such classifier; from a training step, if a
            batch has no views.
    """

    def __init__(
        self,
        weight: float = 0.6,
        loss_weight: float = 2.0,
        temperature: float = 0.1,
        dim: int = 128,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = check_radius("weight", weight)
        self.loss_weight = check_radius("loss_weight", loss_weight)
        self.temperature = check_positive("temperature", temperature)
        self.dim = check_integer("dim", dim, minimum=1)
        self.hidden = None if hidden is None else check_integer("hidden", hidden, minimum=1)

    def attach(self, network: nn.Module, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
        """Make the layers for a network. :class:`~lightning_ssesam.LongTailClassifier` calls it once.

        Args:
            network: Network whose classifier is an ``nn.Linear`` with ``num_classes`` outputs.
            num_classes: C, an integer >= 1.
            ignore_index: Target that does not count.
        """
        inputs = classifier_of(network, num_classes).in_features
        self.loss = BalancedContrastiveLoss(self.temperature, ignore_index)
        self.projection = _projection(inputs, self.hidden or inputs, self.dim)
        self.center_projection = _projection(inputs, self.hidden or inputs, self.dim)
        self.num_classes = num_classes

    def losses(
        self,
        views: Any,
        targets: Tensor,
        network: nn.Module,
        classify: Callable[[Tensor], Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the losses ``(N,)`` of a batch.

        Args:
            views: Views of the images, ``(N, V, C, H, W)`` or a list of V tensors.
            targets: Class indices ``(N,)``.
            network: Network that :meth:`attach` was called with.
            classify: Function from images to logits, which calls the network.
            loss: Loss of the classifier, ``(logits, targets) -> (N,)``.
        """
        images, number = join_views(views)
        layer = classifier_of(network, self.num_classes)
        with _inputs_of(layer) as seen:
            logits = classify(images)
        size = len(logits) // number
        # As in the published code, the first view takes part in the batch norm of the projection.
        features = self.projection(seen[0]).unflatten(0, (number, size))[1:].transpose(0, 1)
        contrast: Tensor = self.loss(features, targets, self.center_projection(layer.weight))
        return self.loss_weight * loss(logits[:size], targets) + self.weight * contrast


def join_views(views: Any) -> tuple[Tensor, int]:
    """Return the images of all views, view after view, ``(V * N, ...)``, and V.

    Raises:
        ArgumentError: If there are not at least two views of each image.
    """
    expected = "batches with V >= 2 views of each image, (N, V, C, H, W) or a list of V tensors, as SeveralViews makes"
    if isinstance(views, list | tuple) and len(views) > 1 and all(isinstance(view, Tensor) for view in views):
        if len({view.shape for view in views}) == 1:
            return torch.cat(list(views)), len(views)
    # One tensor of four dimensions is a batch of images without views.
    elif isinstance(views, Tensor) and views.ndim >= 3 and views.ndim != 4 and views.shape[1] > 1:
        return views.transpose(0, 1).flatten(0, 1), views.shape[1]
    got = f"shape {tuple(views.shape)}" if isinstance(views, Tensor) else f"a {type(views).__name__} of {len(views)}"
    raise bad_argument("contrast", f"None, or to get {expected}", got_text=f"a batch of {got}")


def classifier_of(network: nn.Module, num_classes: int) -> nn.Linear:
    """Return the last linear layer of a network that has an output for each class.

    Raises:
        ArgumentError: If there is none.
    """
    fitting = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    if not fitting:
        expected = f"a network with an nn.Linear of {num_classes} outputs at its end, which `contrast` needs"
        raise bad_argument("backbone", expected, got_text=f"a {type(network).__name__} without")
    return fitting[-1]


def _projection(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs)
    )


@contextmanager
def _inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a layer gets as its input, as long as the context lasts."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
