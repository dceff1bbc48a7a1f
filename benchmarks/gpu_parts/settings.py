"""What the parts of ``benchmarks/gpu.py`` are told: one JSON file, since each part is a process of its own."""

import logging
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_parts.results import read_all, read_json, write_json

NO_GPU = 78
"""Exit status of a part that needs a GPU and finds none."""


@dataclass
class Settings:
    """The settings of a call.

    Args:
        output: Folder for new results.
        scratch: Folder for what is thrown away in the end.
        folders: Folders with results, ``output`` last.
        images: Folder of each set of images, by name.
        device: ``"gpu"`` or ``"cpu"``.
        tiny: Whether to use tiny networks and few images, to test the script.
        epochs: Epochs of a training.
        seeds: Number of seeds.
        jobs: Trainings at a time; 0 for as many as were measured to be best.
        deadline: Time at which the call ends, as of ``time.time()``.
        source: Fingerprint of the project's code.
    """

    output: str
    scratch: str
    folders: list[str]
    images: dict[str, str] = field(default_factory=dict)
    device: str = "gpu"
    tiny: bool = False
    epochs: int = 200
    seeds: int = 3
    jobs: int = 0
    deadline: float = 0.0
    source: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to use."""
        return self.device == "gpu"

    @property
    def precision(self) -> str:
        """Precision of the Trainer."""
        return "bf16-mixed" if self.on_gpu else "32-true"

    @property
    def modes(self) -> list[str]:
        """Kinds of trainings that are measured."""
        return ["eager", "graphs"] if self.on_gpu else ["eager"]

    def found(self) -> dict[str, Any]:
        """Return the results of all folders by path."""
        return read_all(map(Path, self.folders), self.tiny)

    def write(self) -> Path:
        """Write the settings into the scratch folder, and return the file."""
        path = Path(self.scratch) / "settings.json"
        write_json(path, asdict(self))
        return path


def settings_of_child(is_silent: bool = True) -> tuple[Settings, list[str]]:
    """Return the settings and the further arguments that this process was started with.

    Args:
        is_silent: Whether to silence Lightning, too.

    Raises:
        SystemExit: With :data:`NO_GPU`, if the settings ask for a GPU and there is none.
    """
    settings = Settings(**read_json(Path(sys.argv[1])))
    if settings.on_gpu:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit(NO_GPU)
    if is_silent:
        silence()
    return settings, sys.argv[2:]


def silence() -> None:
    """Silence Lightning in this process."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def about(settings: Settings) -> dict[str, Any]:
    """Return the hardware and the versions, for a result."""
    import platform

    import lightning
    import torch

    import lightning_ssesam

    return {
        "hardware": torch.cuda.get_device_name() if settings.on_gpu else platform.machine(),
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "version": lightning_ssesam.__version__,
        "source": settings.source,
        "tiny": settings.tiny,
    }


def measured(path: str, settings: Settings, **further: Any) -> list[dict[str, Any]]:
    """Return the results with a path that were made with the same code, versions and hardware.

    Args:
        path: Path of the result in a folder.
        settings: Settings of the call.
        further: Entries that have to be the same, too.
    """
    same = {**about(settings), **further}
    found = [read_json(Path(folder) / path) for folder in settings.folders]
    return [one for one in found if one and all(one.get(name) == value for name, value in same.items())]
