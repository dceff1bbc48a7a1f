"""The commands ``fit``, ``validate`` and ``test``: Lightning's command line around a LongTailClassifier."""

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.callbacks import StageSwitch
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.command_parser import CommandParser, link_data_to_model
from lightning_ssesam.experiments.console import held_back, limited_threads
from lightning_ssesam.experiments.lifetimes import bound_forks
from lightning_ssesam.experiments.loggers import METRICS_ARE_DELETED
from lightning_ssesam.experiments.network_check import check_network, problems_of_parts
from lightning_ssesam.experiments.resume import SaveConfig, folder_of_run
from lightning_ssesam.experiments.switches import needs_switch, problem_of, repeated
from lightning_ssesam.experiments.training_options import (
    check_checkpoint_option,
    defaults,
    one_checkpoint,
    split_options,
    translate_method,
)
from lightning_ssesam.experiments.trust import (
    check_functions,
    check_plain,
    guard_loading,
    read_checkpoint,
    say,
)
from lightning_ssesam.lightning_internals import hyperparameters
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.module_checks import check_optimizer
from lightning_ssesam.trainer_calls import callbacks_of

TRAINING_COMMANDS = ("fit", "validate", "test")


class TrainingCLI(LightningCLI):
    """Lightning's command line, whose model takes class counts and channels from the data module.

    Args:
        command: The command that is run, one of :data:`TRAINING_COMMANDS`.
        stack: Stack of what is released when the command has ended.
        show_messages: Called when all parts are built, before anything runs.
        defaults: Default values of options, by dotted names. None takes a default away.
        seeds_workers: Seeds of Lightning for the processes of data loaders. Those of ``compare`` get none.
    """

    def __init__(
        self,
        command: str,
        stack: ExitStack,
        show_messages: Callable[[], None],
        defaults: Mapping[str, Any],
        seeds_workers: bool = True,
    ) -> None:
        self._stack, self._show_messages = stack, show_messages
        self._defaults, self._seeds_workers = defaults, seeds_workers
        self._checkpoint: str | None = None
        self._trust = False
        # A parser takes long to make, and the others are not needed. Lightning asks for the names of all.
        vars(self)["subcommands"] = lambda: {command: LightningCLI.subcommands()[command]}
        super().__init__(
            LongTailClassifier,
            LongTailDataModule,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "lightning-ssesam"},
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Called when a command's parser is made: take the one whose errors are one line."""
        parser = CommandParser(**{"dump_header": [f"lightning.pytorch=={pl.__version__}"], **kwargs})
        parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Called when a command's parser is made: link counts and channels, add options, set the defaults."""
        link_data_to_model(parser)
        parser.add_argument(
            "--trust_checkpoint",
            type=bool,
            default=False,
            help="Permission for the checkpoint to hold more than plain data. Loading such a file can run any code.",
        )
        parser.add_argument(
            "--method", type=str | None, help="Name of a method of the comparison in --config, or of a built-in one."
        )
        parser.set_defaults(dict(self._defaults))

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Called to read the options: take the checkpoint out, of which Lightning would read the hyperparameters."""
        super().parse_arguments(parser, args)
        command = self.config["subcommand"]
        given = self.config[command]
        self._trust = given["trust_checkpoint"]
        if (path := given.get("ckpt_path")) is not None:
            self._checkpoint = one_checkpoint(str(path))
            given["ckpt_path"] = None
            if not self._trust:
                check_plain(self._checkpoint)
            elif os.path.isfile(self._checkpoint):
                values = hyperparameters(read_checkpoint(self._checkpoint, trust=True))
                self.config = parser.parse_object({command: {"model": values}}, self.config)
        if given["method"] is not None:
            expected = "an option of the command, not of a file"
            raise bad_argument("method", expected, got_text=f"{given['method']!r} from a file")
        for name in ("trust_checkpoint", "method"):
            self.config[command].pop(name)
        check_functions(self.config[command].as_dict())

    @override
    def before_instantiate_classes(self) -> None:
        """Called before model and data are made: put the checkpoint back."""
        if self._checkpoint is not None:
            self.config[str(self.subcommand)]["ckpt_path"] = self._checkpoint
        if not self._seeds_workers:
            os.environ["PL_SEED_WORKERS"] = "0"

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Called when model and data are made: attach the switch that the objective needs, and guard the loading."""
        options: Namespace = self.config_init[self.subcommand]["trainer"]
        given = options.get("callbacks") or []
        callbacks = [*given] if isinstance(given, list) else [given]
        if problem := repeated(callbacks):
            raise ArgumentError(f"`--trainer.callbacks`: {problem}")
        is_added = needs_switch(self.model.objective, callbacks)
        if is_added:
            options["callbacks"] = [*callbacks, StageSwitch()]
        trainer = super().instantiate_trainer(**kwargs)
        if is_added and self.subcommand == "fit":
            # When a checkpoint has been loaded.
            callbacks_of(trainer).append(LambdaCallback(on_fit_start=_announce_switch))
        guard_loading(trainer, self._trust)
        return trainer

    def before_run(self) -> None:
        """Called before a command runs: keep what an earlier run has left in its folder, and show the messages."""
        command = str(self.subcommand)
        if command == "fit":
            self._check_training()
        folder = folder_of_run(self.trainer, command, self.config[command].as_dict())
        self.config_init[command]["ckpt_path"] = self._stack.enter_context(folder)
        self._show_messages()
        warnings.filterwarnings("ignore", METRICS_ARE_DELETED)

    def _check_training(self) -> None:
        """Refuse what would fail within the training, where every error is taken for one of the user's code."""
        if problem := problem_of(self.model.objective, callbacks_of(self.trainer)):
            raise ArgumentError(f"`--trainer.callbacks`: {problem}")
        for name in ("check_val_every_n_epoch", "accumulate_grad_batches"):
            if (number := getattr(self.trainer, name)) is not None:
                check_integer(name, number, minimum=1)
        if self.trainer.is_global_zero:
            with isolate_rng(include_cuda=False):
                self.datamodule.prepare_data()
            # It makes its data sets once: here, with the numbers that are drawn for them. Other modules do so again.
            if type(self.datamodule).setup is LongTailDataModule.setup:
                self.datamodule.setup("fit")
            check_network(self.model, self.datamodule)
        try:
            made: Any = self.model.configure_optimizers()
        except (ValueError, TypeError):
            raise
        except Exception:
            # On the device of the training it may work, such as a fused optimizer.
            return
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        check_optimizer(optimizer)
        for part, problem in problems_of_parts(self.model, optimizer, lambda: self.trainer).items():
            raise ArgumentError(f"`--model.{part}`: {problem}")

    before_fit = before_validate = before_test = before_run


def _announce_switch(*_: Any) -> None:
    say(f"Stage 2 begins after {StageSwitch.default_at:.0%} of the training: StageSwitch is attached.")


def run_training_command(command: str, options: Sequence[str]) -> None:
    """Run ``fit``, ``validate`` or ``test`` with options of the command line."""
    with ExitStack() as stack:
        given = split_options(options)
        check_checkpoint_option(given)
        folder = stack.enter_context(TemporaryDirectory())
        arguments, comparison = translate_method(given, Path(folder))
        if comparison is not None:
            stack.enter_context(limited_threads(comparison.get("threads", 1)))
        # Lightning warns about arguments that differ from those of the program.
        sys.argv = [sys.argv[0], command, *arguments]
        # The Trainer handles SIGTERM: it ends the step first.
        stack.enter_context(bound_forks())
        show_messages = stack.enter_context(held_back())
        preset = defaults(split_options(arguments))
        TrainingCLI(command, stack, show_messages, preset, seeds_workers=comparison is None)
