"""The commands ``fit``, ``validate`` and ``test``: Lightning's command line around a LongTailClassifier."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.experiments.command_parser import CommandParser
from lightning_ssesam.experiments.console import held_back
from lightning_ssesam.experiments.lifetimes import bound_forks
from lightning_ssesam.experiments.resume import SaveConfig, prepare_folder
from lightning_ssesam.models import LongTailClassifier

TRAINING_COMMANDS = ("fit", "validate", "test")


class TrainingCLI(LightningCLI):
    """Lightning's command line, whose model takes class counts and channels from the data module.

    Args:
        before_run: Called when all parts are built, before anything runs.
        *args: See :class:`~lightning.pytorch.cli.LightningCLI`.
        **kwargs: See :class:`~lightning.pytorch.cli.LightningCLI`.
    """

    def __init__(self, before_run: Callable[[], None], *args: Any, **kwargs: Any) -> None:
        self._before_run = before_run
        super().__init__(*args, **kwargs)

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Called when a command's parser is made: take the one whose errors are one line."""
        parser = CommandParser(**{"dump_header": [f"lightning.pytorch=={pl.__version__}"], **kwargs})
        parser.add_argument("-c", "--config", action="config", help="YAML file with any of the options below.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Called when a command's parser is made: link the class counts and the channels."""
        parser.link_arguments("data.class_counts", "model.class_counts", apply_on="instantiate")
        parser.link_arguments("data.in_channels", "model.in_channels", apply_on="instantiate")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, and the arguments that each does not have."""
        return {name: names for name, names in LightningCLI.subcommands().items() if name in TRAINING_COMMANDS}

    def before_run(self) -> None:
        """Called before a command runs: keep what an earlier run has left in its folder, and show the messages."""
        command = str(self.subcommand)
        checkpoint = prepare_folder(self.trainer, command, self.config[command].as_dict())
        self.config_init[command]["ckpt_path"] = checkpoint
        self._before_run()

    before_fit = before_validate = before_test = before_run


def run_training_command(command: str, options: Sequence[str]) -> None:
    """Run ``fit``, ``validate`` or ``test`` with options of the command line."""
    # Lightning warns about arguments that differ from those of the program.
    sys.argv = [sys.argv[0], command, *options]
    # The Trainer handles SIGTERM: it ends the step first.
    with bound_forks(), held_back() as release:
        TrainingCLI(
            release,
            LongTailClassifier,
            LongTailDataModule,
            save_config_callback=SaveConfig,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "lightning-ssesam"},
        )
