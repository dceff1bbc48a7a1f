"""The commands ``fit``, ``validate`` and ``test``: Lightning's command line around a LongTailClassifier."""

import sys
from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.experiments.lifetimes import bound_forks
from lightning_ssesam.experiments.resume import SaveConfig, prepare_folder
from lightning_ssesam.models import LongTailClassifier

TRAINING_COMMANDS = ("fit", "validate", "test")


class TrainingCLI(LightningCLI):
    """Lightning's command line, whose model takes class counts and channels from the data module."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Called when a command's parser is made: link the class counts and the channels."""
        parser.link_arguments("data.class_counts", "model.class_counts", apply_on="instantiate")
        parser.link_arguments("data.in_channels", "model.in_channels", apply_on="instantiate")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, and the arguments that each does not have."""
        return {name: names for name, names in LightningCLI.subcommands().items() if name in TRAINING_COMMANDS}

    def before_run(self) -> None:
        """Called before a command runs: keep what an earlier run has left in its folder."""
        command = str(self.subcommand)
        checkpoint = prepare_folder(self.trainer, command, self.config[command].as_dict())
        self.config_init[command]["ckpt_path"] = checkpoint

    before_fit = before_validate = before_test = before_run


def run_training_command(command: str, options: Sequence[str]) -> None:
    """Run ``fit``, ``validate`` or ``test`` with options of the command line."""
    # Lightning warns about arguments that differ from those of the program.
    sys.argv = [sys.argv[0], command, *options]
    # The Trainer handles SIGTERM: it ends the step first.
    with bound_forks():
        TrainingCLI(
            LongTailClassifier,
            LongTailDataModule,
            save_config_callback=SaveConfig,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "lightning-ssesam"},
        )
