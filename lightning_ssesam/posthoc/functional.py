"""The corrections as functions of tensors. They know nothing of Lightning, and change none of their arguments.

In all functions, ``logits`` are ``(N, C)``, ``targets`` are class indices ``(N,)``, and ``features`` are what the last
linear layer of a network gets, ``(N, D)``.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ssesam._validation import bad_argument, check_below_one, check_integer, check_positive, check_radius
from lightning_ssesam.data.samplers import ClassBalancedSampler
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.losses.functional import Counts, counts_of
from lightning_ssesam.split import as_labels
from lightning_ssesam.targets import IGNORE_INDEX


def logit_shift(class_counts: Counts, tau: float = 1.0) -> Tensor:
    r"""Return what post-hoc logit adjustment adds to the logits (Menon et al., ICLR 2021, arXiv:2007.07314, eq. 9).

    .. math:: -\tau \log \pi_j, \quad \pi_j = n_j / \sum_k n_k

    A class without training samples, which only a split may have, gets the smallest of these numbers: nothing is known
    about it, so it is not preferred.

    Args:
        class_counts: Training samples n of each class, ``(C,)``, or a split that has them.
        tau: Strength, a finite number >= 0; 1 is the paper's value, 0 changes nothing.

    Returns:
        The summands ``(C,)``, float64, on the CPU.

    Raises:
        ArgumentError: If a count is not an integer >= 1, or ``tau`` is out of range.

    Example:
        >>> logit_shift([75, 25])
        tensor([0.2877, 1.3863], dtype=torch.float64)
    """
    counts = counts_of(class_counts).double()
    priors = torch.where(counts > 0, counts, counts.max()) / counts.sum()
    return -check_radius("tau", tau) * priors.log()


def tau_normalized(weight: Tensor, tau: float = 1.0) -> Tensor:
    r"""Return the weights of a tau-normalised classifier (Kang et al., ICLR 2020, arXiv:1910.09217, eq. 6).

    .. math:: \tilde w_j = w_j / \lVert w_j \rVert^\tau

    The bias of the layer is dropped, as in the authors' code. A row of zeros stays as it is.

    Args:
        weight: Weights of the last linear layer, ``(C, D)``.
        tau: Strength, a finite number >= 0; 1 gives all rows the norm 1, 0 changes nothing.

    Raises:
        ArgumentError: If ``tau`` is out of range.

    Example:
        >>> tau_normalized(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])
    """
    norms = weight.detach().norm(dim=1, keepdim=True)
    return weight.detach() / torch.where(norms > 0, norms, 1.0) ** check_radius("tau", tau)


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    r"""Return the temperature by which to divide the logits (Guo et al., ICML 2017, arXiv:1706.04599, section 4.2).

    It is the T > 0 with the smallest mean of :math:`-\log \mathrm{softmax}(z / T)_y`, found by L-BFGS in float64. The
    predicted classes stay the same.

    Args:
        logits: Logits z of validation samples, ``(N, C)``.
        targets: Classes y of the samples, ``(N,)``.

    Raises:
        ArgumentError: If shapes or classes do not fit, or no T is best. That is so if all samples are classified right,
            or if the logits are no better than chance.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]]).repeat(4, 1)
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 4)
        1.8205
    """
    logits, targets = _checked(logits, targets)
    logits = logits.double()
    truth = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    if not bool((truth < logits.amax(1)).any()):
        raise ArgumentError("No temperature fits: every sample is classified right. Use more validation samples.")
    if not bool(truth.mean() > logits.mean()):
        raise ArgumentError("No temperature fits: on the validation samples, the logits are no better than chance.")
    # Near the solution, whatever the unit of the logits.
    start = logits.std(dim=1).mean().log()
    log_temperature = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [log_temperature], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits / log_temperature.exp(), targets)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return float(log_temperature.detach().exp())


@dataclass(frozen=True)
class BalancedTraining:
    """How LWS and cRT are trained: SGD on batches in which every class is drawn equally often.

    The rate falls to 0 along a cosine. All defaults but ``steps`` are those of Kang et al., ICLR 2020, on ImageNet-LT;
    their 5 and 10 epochs are 1,130 and 2,260 steps.

    Args:
        steps: Number of optimizer steps, an integer >= 1.
        batch_size: Samples in a batch, an integer >= 1.
        lr: Learning rate of the first step, a finite number > 0.
        momentum: Momentum, a number in [0, 1).
        weight_decay: Weight decay, a finite number >= 0.
        seed: Seed of the draws and of the new classifier, an integer >= 0.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    steps: int = 1000
    batch_size: int = 512
    lr: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            check_integer(name, getattr(self, name), minimum=1)
        check_integer("seed", self.seed, minimum=0)
        check_positive("lr", self.lr)
        check_below_one("momentum", self.momentum)
        check_radius("weight_decay", self.weight_decay)


def fit_scales(logits: Tensor, targets: Tensor, training: BalancedTraining = BalancedTraining()) -> Tensor:
    """Return a factor for the logits of each class: learnable weight scaling, LWS (Kang et al., ICLR 2020, eq. 7).

    The factors begin at 1 and are trained on the cross-entropy of ``logits * factors``. The logits contain the bias, so
    it is scaled, too, as in the authors' code. Nothing else is trained.

    Args:
        logits: Logits of the training samples without augmentation, ``(N, C)``.
        targets: Classes of the samples, ``(N,)``.
        training: How they are trained.

    Returns:
        The factors ``(C,)``, with the dtype and on the device of the logits.

    Raises:
        ArgumentError: If shapes or classes do not fit, or the training diverges.
    """
    logits, targets = _checked(logits, targets)
    scales = logits.new_ones(logits.shape[1]).requires_grad_()
    _train([scales], lambda index: F.cross_entropy(logits[index] * scales, targets[index]), targets, training)
    return scales.detach()


def retrained(
    layer: nn.Module,
    features: Tensor,
    targets: Tensor,
    training: BalancedTraining = BalancedTraining(),
    logit_scale: float = 1.0,
) -> nn.Module:
    """Return a last layer that is trained anew: classifier re-training, cRT (Kang et al., ICLR 2020, section 4).

    A copy of the layer begins with new weights and is trained on the cross-entropy. The rest of the network is not
    needed: the features stay as they are.

    Args:
        layer: Last linear layer, with a method ``reset_parameters`` as those of torch have. It is not changed.
        features: Inputs of the layer for the training samples without augmentation, ``(N, D)``.
        targets: Classes of the samples, ``(N,)``.
        training: How it is trained.
        logit_scale: Factor on the logits in the loss, a number > 0, such as that of an ``LDAMLoss``; 1 by default.

    Raises:
        ArgumentError: If shapes or classes do not fit, the layer cannot begin anew, or the training diverges.
    """
    if not callable(reset := getattr(new := copy.deepcopy(layer), "reset_parameters", None)):
        raise bad_argument("layer", "a layer with a method `reset_parameters`", got_text=type(layer).__name__)
    check_positive("logit_scale", logit_scale)
    parameters = list(new.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        new.cpu()
        reset()
    new.requires_grad_().to(features.device)
    with torch.no_grad():
        num_classes = new(features[:1]).shape[1]
    features, targets = _counted("features", features, targets, num_classes)
    _train(parameters, lambda i: F.cross_entropy(logit_scale * new(features[i]), targets[i]), targets, training)
    return new


def _train(
    parameters: Sequence[Tensor], loss: Callable[[Tensor], Tensor], targets: Tensor, training: BalancedTraining
) -> None:
    """Train parameters on the losses of batches, which get the indices of their samples."""
    sampler = ClassBalancedSampler(targets.cpu(), num_samples=training.batch_size, seed=training.seed)
    # The processes of a training do not share the draws.
    sampler.share(num_replicas=1, rank=0)
    optimizer = torch.optim.SGD(
        parameters, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    for step in range(training.steps):
        sampler.set_epoch(step)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(torch.tensor(list(sampler), device=targets.device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    if not all(bool(p.isfinite().all()) for p in parameters):
        expected = "a rate at which the training with class-balanced batches does not diverge"
        raise bad_argument("lr", expected, training.lr)


def _checked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and classes of the samples that count, or raise ``ArgumentError``."""
    if not logits.is_floating_point() or logits.ndim != 2:
        found = f"{tuple(logits.shape)} of {logits.dtype}"
        raise bad_argument("logits", "of shape (N, C), a floating dtype", got_text=found)
    return _counted("logits", logits, targets, logits.shape[1])


def _counted(name: str, values: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return logits or features, and classes, of the samples whose target is not ignored."""
    if targets.shape != values.shape[:1]:
        raise bad_argument("targets", f"class indices of shape ({len(values)},)", got_text=f"{tuple(targets.shape)}")
    if not bool(values.isfinite().all()):
        raise bad_argument(name, "finite numbers", got_text="some that are not")
    classes = as_labels(targets, "targets", num_classes)
    counts = classes != IGNORE_INDEX
    return values.detach()[counts.to(values.device)], classes[counts].to(values.device)
