"""Trainings on the workers of a Dask cluster: one started here, one that runs, or one that a job scheduler makes."""

import functools
import logging
import os
import pickle
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from multiprocessing import current_process
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_ssesam import _version
from lightning_ssesam._validation import bad_argument
from lightning_ssesam.errors import ArgumentError, WorkersLostError
from lightning_ssesam.experiments.console import at_level
from lightning_ssesam.experiments.lifetimes import end_with_parent
from lightning_ssesam.experiments.parser_messages import cut
from lightning_ssesam.experiments.progress import Begun, EpochEnd, Report, listen
from lightning_ssesam.experiments.runs import Run
from lightning_ssesam.experiments.sources import is_foreign_file
from lightning_ssesam.experiments.tasks import Pool, Task, run_on_free_gpu

try:
    import cloudpickle
    import dask
    import distributed
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"`--cluster` needs the package {error.name!r}. Install it: pip install 'lightning-ssesam[cluster]'"
    ) from error

if TYPE_CHECKING:
    from distributed import Client, Worker

# Seconds to wait for the scheduler.
_PATIENCE = 30
# A resource of Dask of which every worker has one, since a process has one random state: one training at a time.
_TRAINING = "lightning-ssesam training"
_YAML_KEYS = ("class_path", "init_args", "scale", "adapt", "resources")

_one_training = threading.Lock()


def check_cluster(cluster: str) -> str:
    """Return the name of a cluster, or raise ``ArgumentError`` if it is of no known kind, or cannot be reached.

    Args:
        cluster: ``"local"``, the address of a scheduler, its scheduler file (.json), or a YAML file of a cluster.
    """
    expected = "'local', an address such as tcp://scheduler:8786, a scheduler file (.json), or a YAML file"
    if not isinstance(cluster, str) or not (cluster == "local" or "://" in cluster or Path(cluster).suffix):
        raise bad_argument("cluster", expected, cluster)
    if cluster != "local" and "://" not in cluster and not Path(cluster).is_file():
        raise bad_argument("cluster", expected, got_text=f"{cluster!r}, and there is no such file")
    if _is_yaml(cluster):
        _class_of(_read(cluster), cluster)
    elif cluster != "local":
        with _without_tracebacks(), _client(cluster):
            pass
    return cluster


def _is_yaml(cluster: str) -> bool:
    return cluster != "local" and "://" not in cluster and Path(cluster).suffix != ".json"


@contextmanager
def workers(cluster: str, jobs: int) -> Iterator[Pool]:
    """Yield a pool of the workers of a cluster. Workers that come later train, too; what lost ones did is done again.

    A worker makes one run at a time, in the folder of this process if it has that folder. If workers have the resource
    ``GPU``, each run takes one.

    Args:
        cluster: Name of the cluster, see :func:`check_cluster`.
        jobs: Number of workers of a cluster that is started here.

    Raises:
        ArgumentError: If the cluster cannot be reached or made, or if its workers have another version of the package.
        WorkersLostError: If a training has ended worker after worker, or the scheduler is gone.
    """
    with _connected(cluster, jobs) as (client, resources):
        topic, reports = f"lightning-ssesam-{uuid.uuid4().hex}", SimpleQueue[Report]()

        def hear(event: tuple[Any, list[Any]]) -> None:
            values = event[1]
            reports.put(Begun(*values) if len(values) == len(Begun._fields) else EpochEnd(*values))

        client.subscribe_topic(topic, hear)
        executor = client.get_executor(pure=False, retries=0, resources={_TRAINING: 1, **resources})

        def submit(task: Task) -> Future[Run]:
            key, content = f"{task.name}-{uuid.uuid4().hex}", _dumped(task)
            future: Future[Run] = executor.submit(_run, content, os.getcwd(), _facts(), topic, key=key)
            return future

        try:
            yield Pool(submit, lambda: _drained(reports))
        except CancelledError as error:
            reason = "The scheduler of the cluster is gone. Start it again, and then this command"
            raise WorkersLostError(f"{reason}: it goes on with the runs that are missing.") from error
        except distributed.KilledWorker as error:
            reason = f"Workers were lost one after the other in the training {str(error.task).rpartition('-')[0]!r}"
            raise WorkersLostError(f"{reason}. Is memory short? See the workers' logs.") from error
        finally:
            executor.shutdown(wait=False)


def _dumped(task: Task) -> bytes:
    """Return a task with the user's own modules, as they are here: a worker may have imported them before a change."""
    files = {module: getattr(module, "__file__", None) for module in list(sys.modules.values())}
    known = cloudpickle.list_registry_pickle_by_value()
    own = [module for module, file in files.items() if file and module.__name__ not in known and _is_own(file)]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        content: bytes = cloudpickle.dumps(task)
        return content
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


_is_own = functools.cache(is_foreign_file)


def _drained(reports: "SimpleQueue[Report]") -> Iterable[Report]:
    with suppress(Empty):
        while True:
            yield reports.get_nowait()


@contextmanager
def _connected(cluster: str, jobs: int) -> Iterator[tuple["Client", Mapping[str, float]]]:
    """Yield a client of a cluster with at least one worker, and the resources that a training takes."""
    with ExitStack() as stack:
        stack.enter_context(_without_tracebacks())
        address: Any = cluster
        resources: Mapping[str, float] = {}
        if cluster == "local":
            address = stack.enter_context(_started(jobs))
        elif _is_yaml(cluster):
            made, resources = _make(cluster, jobs)
            address = stack.enter_context(made)
        client = stack.enter_context(_client(address))
        if not (known := client.scheduler_info(n_workers=-1)["workers"]):
            print(f"Waiting for a worker of {client.scheduler.address}.")
            client.wait_for_workers(1)
            known = client.scheduler_info(n_workers=-1)["workers"]
        has_gpus = any("GPU" in worker["resources"] for worker in known.values())
        _check_workers(client)
        client.register_plugin(OneTraining(is_bound=cluster == "local"))
        print(f"Training on the workers of {client.scheduler.address}, {len(known)} so far.")
        yield client, {**({"GPU": 1} if has_gpus else {}), **resources}


def _client(address: Any) -> "Client":
    """Return a client of a scheduler: of its address, its scheduler file, or the object of a cluster."""
    is_file = isinstance(address, str) and "://" not in address
    where = {"scheduler_file": address} if is_file else {"address": address}
    try:
        return distributed.Client(**where, timeout=_PATIENCE, set_as_default=False)
    except (OSError, TimeoutError, ValueError, ImportError) as error:
        text = " ".join(str(error).split())
        got = f"{str(address)!r} ({cut(text)})"
        raise bad_argument("cluster", "a scheduler that can be reached", got_text=got) from error


def _without_tracebacks() -> AbstractContextManager[None]:
    """Return a block in which Dask prints no traceback when the scheduler is gone: an error says so."""
    return at_level(logging.CRITICAL, logging.getLogger("distributed.client"))


@contextmanager
def _started(jobs: int) -> Iterator[Any]:
    """Yield a cluster of this machine, whose workers end with this process."""
    resources = {"GPU": 1} if torch.cuda.is_available() else {}
    # A worker may have a loader's processes. The memory is the user's concern.
    with (
        dask.config.set({"distributed.worker.daemon": False}),
        distributed.LocalCluster(
            n_workers=jobs, threads_per_worker=1, memory_limit=0, dashboard_address=None, resources=resources
        ) as cluster,
    ):
        yield cluster


def _read(path: str) -> dict[str, Any]:
    expected = f"a YAML file with class_path and any of {', '.join(_YAML_KEYS[1:])}"
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise bad_argument("cluster", expected, got_text=f"{path!r} ({' '.join(str(error).split())})") from error
    is_right = isinstance(content, dict) and isinstance(content.get("class_path"), str)
    if not is_right or content.keys() - set(_YAML_KEYS):
        got = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise bad_argument("cluster", expected, got_text=f"{path!r} with {got}")
    return dict(content)


@contextmanager
def _refused(path: str) -> Iterator[None]:
    """Turn whatever a class of somebody else raises into a sentence on the YAML file."""
    try:
        yield
    except Exception as error:
        got = f"{path!r} ({type(error).__name__}: {cut(' '.join(str(error).split()))})"
        raise bad_argument("cluster", "a YAML file of a cluster that can be made", got_text=got) from error


def _class_of(content: Mapping[str, Any], path: str) -> Callable[..., Any]:
    module, _, name = content["class_path"].rpartition(".")
    with _refused(path):
        found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _make(path: str, jobs: int) -> tuple[Any, Mapping[str, float]]:
    """Make the cluster of a YAML file, and ask for its workers. Return it with the resources of a training."""
    content = _read(path)
    kind = _class_of(content, path)
    with _refused(path):
        cluster = kind(**(content.get("init_args") or {}))
        if adapt := content.get("adapt"):
            # Nothing is asked for until there is a worker.
            cluster.adapt(**{**adapt, "minimum": max(1, adapt.get("minimum") or 0)})
        else:
            cluster.scale(content.get("scale", jobs))
    return cluster, content.get("resources") or {}


def _facts() -> dict[str, str]:
    """Return what must be the same where a training is made and where its command runs."""
    python = ".".join(map(str, sys.version_info[:2]))
    # A login node often has a build of torch without CUDA.
    torch_version = torch.__version__.partition("+")[0]
    return {"lightning-ssesam": _version.__version__, "torch": torch_version, "Python": python}


def _check_workers(client: "Client") -> None:
    for address, facts in client.run(_facts, on_error="return").items():
        if isinstance(facts, BaseException):
            raise ArgumentError(f"The worker {address} cannot train: {type(facts).__name__}: {facts}") from facts
        _compare(facts, _facts(), address)


def _compare(facts: Mapping[str, str], expected: Mapping[str, str], address: str) -> None:
    for name, version in expected.items():
        if facts.get(name) != version:
            found = f"The worker {address} has {name} {facts.get(name)}, and this command {version}"
            raise ArgumentError(f"{found}. Results of the two could not be compared. Install the same versions.")


class OneTraining(distributed.WorkerPlugin):
    """Lets a worker make one run at a time.

    Args:
        is_bound: Whether the worker ends with the process that has started it.
    """

    name = "lightning-ssesam"

    def __init__(self, is_bound: bool) -> None:
        self.is_bound = is_bound

    async def setup(self, worker: "Worker") -> None:
        """Called when a worker begins."""
        if self.is_bound:
            end_with_parent()
        await worker.set_resources(**{_TRAINING: 1})


class _StopIfUnwanted(Callback):
    """Ends a training whose command is gone. A thread cannot be killed.

    Args:
        is_wanted: Function that returns whether somebody waits for the training.
    """

    def __init__(self, is_wanted: Callable[[], bool]) -> None:
        self.is_wanted = is_wanted

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before a batch: raise if nobody waits."""
        if not self.is_wanted():
            raise CancelledError("The command that asked for this training has ended.")


def _run(content: bytes, folder: str, expected: Mapping[str, str], topic: str) -> Run:
    """Make a run in a thread of a worker, and report to those who listen to a topic."""
    worker = distributed.get_worker()
    key = worker.get_current_task()

    def is_wanted() -> bool:
        known = worker.state.tasks.get(key)
        return known is not None and known.state != "cancelled"

    _compare(_facts(), expected, worker.address)
    with _one_training, _in_folder(folder):
        # Dask starts workers as daemons, which may have no processes of their own, as a loader has.
        current_process().daemon = False
        task: Task = pickle.loads(content)
        experiment = replace(task.experiment, callbacks=[*task.experiment.callbacks, _StopIfUnwanted(is_wanted)])
        listen(lambda report: worker.log_event(topic, list(report)))
        try:
            return run_on_free_gpu(task._replace(experiment=experiment))
        finally:
            listen(None)


@contextmanager
def _in_folder(folder: str) -> Iterator[None]:
    """Work in a folder, and find modules there, if this machine has it."""
    if not os.path.isdir(folder):
        yield
        return
    before = os.getcwd()
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        yield
    finally:
        os.chdir(before)
