"""A callback that corrects a classifier when its training has ended."""

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice, check_radius
from lightning_ssesam.callbacks.deferred_reweighting import DeferredReweighting
from lightning_ssesam.callbacks.needs import unfit
from lightning_ssesam.data.unaugmented import unaugmented
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.posthoc import METHODS, BalancedTraining, Evidence, TauChoice, find_correction
from lightning_ssesam.posthoc.evaluation import classifier_outputs, first_loader, validating
from lightning_ssesam.posthoc.methods import BALANCING, balanced_already, check_method, saved_corrections
from lightning_ssesam.posthoc.outputs import Outputs
from lightning_ssesam.trainer_calls import callbacks_of

Method = Literal["logit_adjustment", "tau_norm", "lws", "crt", "temperature"]


class CorrectAfterTraining(Callback):
    """Corrects a ``LongTailClassifier`` when its training has ended, before ``Trainer.test`` and ``save_checkpoint``.

    It works when ``Trainer.fit`` ends, on the weights that the training leaves. Checkpoints that ``ModelCheckpoint``
    has saved before are not changed: correct them with ``lightning-ssesam adjust``. For a module of your own, use the
    functions of :mod:`lightning_ssesam.posthoc`.

    Attributes:
        found: Method and numbers of the last correction, such as ``{"method": "tau_norm", "tau": 0.7}``; None before.

    Args:
        method: One of ``"logit_adjustment"``, ``"tau_norm"``, ``"lws"``, ``"crt"`` and ``"temperature"``.
        tau: Strength of logit adjustment and tau-normalisation, a finite number >= 0; by default it is chosen on the
            validation data.
        choice: Way to choose tau; by default the mean recall of all classes decides.
        training: Training of LWS and cRT.

    Raises:
        ArgumentError: If an argument is out of range.
        MisconfigurationException: When training starts, if the module is no ``LongTailClassifier``, is one with
            ``multi_label``, or is corrected already, there are no validation data, or there are several processes.
    """

    def __init__(
        self,
        method: Method,
        tau: float | None = None,
        choice: TauChoice | None = None,
        training: BalancedTraining | None = None,
    ) -> None:
        self.method = check_choice("method", method, list(METHODS))
        self.tau = None if tau is None else check_radius("tau", tau)
        for name, value, kind in (("choice", choice, TauChoice), ("training", training, BalancedTraining)):
            if value is not None and not isinstance(value, kind):
                raise bad_argument(name, f"a {kind.__name__}", value)
        if tau is not None and choice is not None:
            raise bad_argument("choice", "None if `tau` is given", choice)
        self.choice, self.training = choice, training
        self._choice = (choice or TauChoice()) if tau is None else TauChoice([tau])
        self.found: dict[str, Any] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run starts: refuses what cannot be corrected at its end."""
        if stage != "fit":
            return
        _check(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a checkpoint is loaded: refuses to train a corrected classifier."""
        model = _check(trainer, pl_module)
        check_method(self.method, model.backbone)
        if not trainer.enable_validation:
            raise MisconfigurationException(
                "CorrectAfterTraining needs validation data, but the Trainer has none. Give it a loader for validation."
            )
        if model.correction is not None:
            raise MisconfigurationException(
                "CorrectAfterTraining needs a classifier without a correction, but this one has been corrected"
                " already. Set `model.correction = None` to train it again."
            )
        self.found = None

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after ``on_train_end``, in which a callback may have put other weights in: corrects the module."""
        model = _check(trainer, pl_module)
        if self.method in BALANCING and (phrase := _balanced_by(trainer, model)):
            rank_zero_warn(
                f"CorrectAfterTraining: {phrase} has made up for the class sizes, and {self.method} does so"
                " again. Compare with the classifier without it."
            )
        data: Any = getattr(trainer, "datamodule", None)
        validation = first_loader(trainer.val_dataloaders)

        def outputs_of(batches: Any) -> Outputs:
            return classifier_outputs(model, batches, data)

        def train() -> Outputs:
            return outputs_of(unaugmented(trainer.train_dataloader, validation))

        # The strategy has moved the module back.
        device = model.device
        model.to(trainer.strategy.root_device)
        try:
            with validating(trainer, model), isolate_rng():
                val, training = outputs_of(validation), self.training or BalancedTraining()
                evidence = Evidence(model.backbone, model.split, val, train, model.loss, self._choice, training)
                correction = find_correction(self.method, evidence)
        except ArgumentError as error:
            # The results of hours are not lost for this.
            rank_zero_warn(f"CorrectAfterTraining: the classifier stays as it was trained. {error}")
            return
        finally:
            model.to(device)
        correction.apply_to(model)
        self.found = {"method": correction.method, **correction.values}
        rank_zero_info(f"CorrectAfterTraining: {correction}")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is made: notes the correction, so that it is not made twice."""
        if self.found is not None:
            saved_corrections(checkpoint).append(dict(self.found))


def _check(trainer: Trainer, pl_module: LightningModule) -> LongTailClassifier:
    if not isinstance(pl_module, LongTailClassifier):
        need = "CorrectAfterTraining needs a LongTailClassifier (for other modules, use lightning_ssesam.posthoc)"
        raise unfit(pl_module, "split", need)
    if pl_module.split.multi_label:
        raise MisconfigurationException(
            "CorrectAfterTraining needs data with one class a sample, but this classifier has `multi_label=True`. Train"
            " it without CorrectAfterTraining."
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"CorrectAfterTraining works in one process, but this training has {trainer.world_size}. Correct its"
            " checkpoint afterwards: `lightning-ssesam adjust CHECKPOINT`."
        )
    return pl_module


def _balanced_by(trainer: Trainer, model: LongTailClassifier) -> str:
    """Return what has made up for the class sizes in a training, as a phrase; an empty text for nothing."""
    if any(isinstance(callback, DeferredReweighting) for callback in callbacks_of(trainer)):
        return "DeferredReweighting"
    data: Any = getattr(trainer, "datamodule", None)
    return balanced_already(model.loss, getattr(data, "sampler", None))
