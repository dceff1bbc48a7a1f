"""What can be tried of an untrained model, so that a wrong part is refused before training."""

import copy
import re
import warnings
from collections.abc import Callable
from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.console import quiet
from lightning_ssesam.graph_step import check_graphs
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.models.contrast import join_views
from lightning_ssesam.models.evaluation import losses_of
from lightning_ssesam.module_checks import check_momentum, check_optimizer, check_selections
from lightning_ssesam.staged import Staged

# Hooks of a data module that may change a batch.
_BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def check_network(model: LongTailClassifier, data: LongTailDataModule) -> None:
    """Send a training sample through a copy of a network and its loss, and refuse wrong shapes.

    The random state does not change. Errors that have other causes than shapes are left to the training, and so are
    data modules whose loaders or hooks may make other batches.

    Args:
        model: Model, on the CPU.
        data: Data module, prepared.

    Raises:
        ArgumentError: If the network does not take the sample, or the loss does not return one loss for it.
    """
    if any(getattr(type(data), name) is not getattr(pl.LightningDataModule, name) for name in _BATCH_HOOKS):
        return
    with isolate_rng(include_cuda=False), torch.no_grad(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.setup("fit")
        loader = data.train_dataloader()
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return
        inputs, targets = loader.collate_fn([loader.dataset[0]])
        if model.contrast is not None:
            inputs, _ = join_views(inputs)
        try:
            # The training gets both as they are. The model as a whole may hold what cannot be copied.
            network, loss = copy.deepcopy((model.backbone, model.loss))
        except Exception:
            return
        try:
            logits = network.eval()(inputs)
            model._check_logits(logits)
        except (RuntimeError, AssertionError) as error:
            if re.search("channels|shape|size|match", str(error)):
                expected = f"a network for inputs of shape {tuple(inputs.shape[1:])}"
                raise bad_argument("backbone", expected, got_text=f"one with the error {str(error)!r}") from error
            return
        # Of several views, the first one is classified.
        _check_loss(loss, logits if model.contrast is None else logits[:1], targets, model.split.multi_label)


def problems_of_parts(
    model: LongTailClassifier, optimizer: Optimizer, make_trainer: Callable[[], pl.Trainer]
) -> dict[str, str]:
    """Return what the training would refuse when it starts, by the part of the model that is wrong.

    Args:
        model: Model, before the training.
        optimizer: Optimizer of its parameters.
        make_trainer: Returns the Trainer of the training. Called only if the options of the step need it.
    """

    def check_options() -> None:
        if model.step_options.cuda_graphs:
            check_graphs(model, model.objective, model.step_options, make_trainer())

    objective, parameters = model.objective, list(model.parameters())
    # The ascents of a Staged are those of the objectives within it.
    selection = "objective" if isinstance(objective, Staged) else "objective.ascent.only"
    checks: list[tuple[str, Callable[[], None]]] = [
        ("optimizer", partial(check_optimizer, optimizer)),
        ("optimizer", partial(check_momentum, objective, optimizer, parameters)),
        (selection, partial(check_selections, objective, model, parameters)),
        ("step_options", check_options),
    ]
    problems: dict[str, str] = {}
    for part, check in checks:
        try:
            check()
        except (ArgumentError, MisconfigurationException) as error:
            problems.setdefault(part, str(error))
    return problems


def _check_loss(loss: nn.Module, logits: Tensor, targets: Tensor, is_multi_label: bool) -> None:
    try:
        losses = losses_of(loss, logits, targets, is_multi_label)
    except ArgumentError:
        if is_multi_label:
            raise
        return
    except Exception:
        return
    shape = tuple(getattr(losses, "shape", ()))
    if is_multi_label:
        return
    # Targets may be class probabilities, with one more dimension.
    if shape[:1] != (1,) or (not targets.is_floating_point() and shape not in ((1,), tuple(targets.shape))):
        expected = "a module that returns a loss for each sample, as with reduction='none'"
        raise bad_argument("loss", expected, got_text=f"one with an output of shape {shape} for one sample")
