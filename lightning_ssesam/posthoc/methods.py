"""The corrections by name: each is found on the outputs of a network, and changes the network."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssesam._validation import check_choice
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.losses import BalancedSoftmaxLoss, LDAMLoss, LogitAdjustedLoss, VSLoss
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.posthoc.choosing import TauChoice, group_recalls
from lightning_ssesam.posthoc.functional import (
    BalancedTraining,
    fit_scales,
    fit_temperature,
    logit_shift,
    retrained,
    tau_normalized,
)
from lightning_ssesam.posthoc.outputs import Outputs, check_features, classifier_of, with_layer
from lightning_ssesam.split import ClassSplit


@dataclass(frozen=True)
class Correction:
    """A correction that was found for a network: of the logits, or a new last linear layer.

    Attributes:
        method: Name of the method, one of :data:`METHODS`.
        values: Numbers that were chosen or found: ``"tau"`` or ``"temperature"``, if there are any.
        scale: Factors of the logits, ``(C,)``; None if they stay.
        shift: Summands of the logits, ``(C,)``; None if they stay.
        layer: Last linear layer to put in the place of the old one; None if it stays.
    """

    method: str
    values: dict[str, float]
    scale: Tensor | None = None
    shift: Tensor | None = None
    layer: nn.Module | None = None

    def __call__(self, outputs: Outputs) -> Outputs:
        """Return the outputs that the corrected network would have."""
        if self.layer is not None:
            return with_layer(outputs, self.layer)
        mirrored = None if outputs.mirrored is None else self(outputs.mirrored)
        return replace(outputs, logits=affine(outputs.logits, self.scale, self.shift), mirrored=mirrored)

    def __str__(self) -> str:
        numbers = [f"{name} {value:.4g}" for name, value in self.values.items()]
        return ", ".join(numbers if self.method in self.values else [self.method, *numbers])

    def apply_to(self, model: LongTailClassifier) -> None:
        """Correct a classifier, also in the checkpoints that it is saved in from now on.

        A new last layer takes the place of the old one and of an earlier correction of its logits.
        """
        if self.layer is None:
            model.correct(1.0 if self.scale is None else self.scale, 0.0 if self.shift is None else self.shift)
            return
        classifier_of(model.backbone).load_state_dict(self.layer.state_dict())
        model.correction = None


@dataclass(frozen=True)
class Evidence:
    """What a correction is found on.

    Attributes:
        network: Network from inputs to logits, with the last linear layer.
        split: Class split, with the class counts of the training set.
        val: Outputs for the validation samples.
        train: Function that returns the outputs for the training samples without augmentation.
        loss: Loss of the training.
        choice: How tau is chosen.
        training: How LWS and cRT are trained.
    """

    network: nn.Module
    split: ClassSplit
    val: Outputs
    train: Callable[[], Outputs]
    loss: nn.Module | None = None
    choice: TauChoice = field(default_factory=TauChoice)
    training: BalancedTraining = field(default_factory=BalancedTraining)

    @property
    def logit_scale(self) -> float:
        """Factor that the loss of the training has on the logits: that of LDAM, otherwise 1."""
        return self.loss.scale if isinstance(self.loss, LDAMLoss) else 1.0


def affine(logits: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Return ``logits * scale + shift`` in the dtype of the logits."""
    scaled = logits if scale is None else logits * scale.to(logits)
    return scaled if shift is None else scaled + shift.to(logits)


def _with_best_tau(evidence: Evidence, make: Callable[[float], Correction]) -> Correction:
    before = group_recalls(evidence.val, evidence.split)
    return make(evidence.choice.best(lambda tau: group_recalls(make(tau)(evidence.val), evidence.split), before))


def _logit_adjustment(evidence: Evidence) -> Correction:
    # The logits of LDAM are cosines. Its loss multiplies them, which makes the summands smaller.
    shift = logit_shift(evidence.split) / evidence.logit_scale
    return _with_best_tau(evidence, lambda tau: Correction("logit_adjustment", {"tau": tau}, shift=tau * shift))


def _tau_norm(evidence: Evidence) -> Correction:
    layer = classifier_of(evidence.network)
    weight: Tensor = layer.weight.detach().cpu()  # type: ignore[operator]

    def make(tau: float) -> Correction:
        return Correction("tau_norm", {"tau": tau}, layer=_without_bias(layer, tau_normalized(weight, tau)))

    return _with_best_tau(evidence, make)


def _lws(evidence: Evidence) -> Correction:
    train = evidence.train()
    scales = fit_scales(train.logits * evidence.logit_scale, train.targets, evidence.training)
    return Correction("lws", {}, scale=scales)


def _crt(evidence: Evidence) -> Correction:
    layer = classifier_of(evidence.network)
    check_features(evidence.val)
    train = evidence.train()
    features = check_features(train).to(next(layer.parameters()).device)
    new = retrained(layer, features, train.targets, evidence.training, evidence.logit_scale)
    return Correction("crt", {}, layer=new)


def _temperature(evidence: Evidence) -> Correction:
    temperature = fit_temperature(evidence.val.logits, evidence.val.targets)
    number = torch.full((evidence.val.logits.shape[1],), 1 / temperature)
    return Correction("temperature", {"temperature": temperature}, scale=number)


METHODS: dict[str, Callable[[Evidence], Correction]] = {
    "logit_adjustment": _logit_adjustment,
    "tau_norm": _tau_norm,
    "lws": _lws,
    "crt": _crt,
    "temperature": _temperature,
}
"""The corrections by name."""

BALANCING = ("logit_adjustment", "tau_norm", "lws")
"""Those that make up for the class sizes, on top of what the training has done for it."""

KEY = "posthoc"
"""Key in a checkpoint of the corrections that its classifier has had."""


def saved_corrections(checkpoint: dict[str, Any]) -> list[Any]:
    """Return the list of a checkpoint with the method and the numbers of each correction, which may grow."""
    if not isinstance(checkpoint.get(KEY), list):
        checkpoint[KEY] = []
    found: list[Any] = checkpoint[KEY]
    return found


def check_method(method: str, network: nn.Module) -> None:
    """Raise ``ArgumentError`` if a method is known not to work with a network, before anything is computed."""
    if method not in ("tau_norm", "crt"):
        return
    layer = classifier_of(network)
    if method == "crt" and not callable(getattr(layer, "reset_parameters", None)):
        raise ArgumentError(f"crt cannot begin a {type(layer).__name__} anew: it has no method `reset_parameters`.")
    if method == "tau_norm" and not _follows_norms(layer):
        raise ArgumentError(f"tau_norm changes nothing: a {type(layer).__name__} normalises its weights itself.")


def find_correction(method: str, evidence: Evidence) -> Correction:
    """Return the correction of a network by a method.

    Args:
        method: Name of the method, one of :data:`METHODS`.
        evidence: Network and outputs to find it on. They are not changed.

    Raises:
        ArgumentError: If there is no such method, or it cannot work with the network or the samples.
    """
    check_method(check_choice("method", method, list(METHODS)), evidence.network)
    return METHODS[method](evidence)


def _without_bias(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Return a copy of a layer with other weights, and zeros for its bias."""
    new = copy.deepcopy(layer)
    parameters = dict(new.named_parameters())
    if not parameters.keys() <= {"weight", "bias"}:
        raise ArgumentError(f"The last linear layer has more than a weight and a bias: {', '.join(parameters)}.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weight if name == "weight" else torch.zeros_like(parameter))
    return new


def _follows_norms(layer: nn.Module) -> bool:
    """Return whether the outputs of a layer change with the norms of its weights."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    inputs = torch.ones_like(weight[:1])
    with torch.no_grad():
        outputs = [_without_bias(layer, factor * weight)(inputs) for factor in (1, 2)]
    return not torch.equal(*outputs)


def balanced_already(loss: nn.Module | None, sampler: object = None) -> str:
    """Return what has already made up for the class sizes in a training, as a phrase; an empty text for nothing.

    Args:
        loss: Loss of the training.
        sampler: Sampler of the training set; None if it was shuffled.
    """
    name = type(loss).__name__
    is_adjusted = isinstance(loss, BalancedSoftmaxLoss) or any(
        isinstance(loss, kind) and any(getattr(loss, value) > 0 for value in values)
        for kind, values in {LogitAdjustedLoss: ["tau"], VSLoss: ["gamma", "tau"], LDAMLoss: ["max_margin"]}.items()
    )
    if is_adjusted:
        return f"its loss {name}"
    weight = getattr(loss, "weight", None)
    if isinstance(weight, Tensor) and bool((weight != weight[:1]).any()):
        return f"the class weights of its loss {name}"
    return "" if sampler is None else "the sampler of its training set"
