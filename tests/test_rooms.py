"""The house: which file may import which, and where Lightning's private names stand.

`FLOORS` is the order of the rooms, from the ground up. A room may import rooms below it and on its own floor, and there
is no circle. Imports are read from the sources, with those inside functions and those for types alone.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_ssesam
from lightning_ssesam.lightning_internals import EXACT_RESUME, STEP

PACKAGE = Path(lightning_ssesam.__file__).parent
FLOORS = [
    # Torch alone: from the targets of a batch to the gradient.
    ["_version", "errors", "tensors", "trees"],
    ["_validation", "class_order", "layers", "snapshots", "norms"],
    ["forward_state", "weights", "ascent", "after_sum"],
    ["split", "step_options", "targets"],
    ["terms", "objectives", "variants", "class_objectives"],
    ["staged"],
    ["plan", "mixing", "gradient_sum", "ascent_states", "displacement", "engine"],
    ["graph_guard", "graphs"],
    # The step, and all that it needs of Lightning.
    ["factories"],
    ["lightning_internals", "trainer_calls", "step_logs", "batches", "selection", "optimizer_closure", "module_checks"],
    ["processes", "passes", "step_state"],
    ["graph_step"],
    ["exact_resume", "trainer_support"],
    ["mixin"],
    # What people combine.
    ["metrics", "average_precision", "calibration", "losses", "data", "models", "configs", "templates"],
    ["curvature", "posthoc"],
    ["callbacks"],
    # Comparisons, searches, the command line.
    ["experiments"],
    # Import paths that are documented, and the package's own names.
    ["compare", "sweep", "suggest", "runs", "curvature.command", "curvature.checkpoints", "cli", "__main__", ""],
]
TORCH_ONLY = [room for floor in FLOORS[:8] for room in floor]


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imports_of(name):
    """The modules that a module imports: the project's without the name of the package, others by their first part."""
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, name
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        for target in targets:
            first, _, rest = target.partition(".")
            if first != "lightning_ssesam":
                yield first
                continue
            # A name that is no module belongs to the module before it.
            while rest and rest not in SOURCES:
                rest = rest.rpartition(".")[0]
            yield f"lightning_ssesam.{rest}"


def room_of(name):
    """The longest entry of the floors that a module is, or lies in."""
    rooms = [room for floor in FLOORS for room in floor]
    fitting = [room for room in rooms if name == room or (room and name.startswith(f"{room}."))]
    assert fitting, f"{name} has no room"
    return max(fitting, key=len)


LEVELS = {room: number for number, floor in enumerate(FLOORS) for room in floor}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_lead_down(name):
    for target in imports_of(name):
        if target.startswith("lightning_ssesam."):
            lower = target.removeprefix("lightning_ssesam.")
            assert LEVELS[room_of(lower)] <= LEVELS[room_of(name)], f"{name} imports {lower}"


def test_no_circle():
    graph = {
        name: {t.removeprefix("lightning_ssesam.") for t in imports_of(name) if t.startswith("lightning_ssesam.")}
        - {name}
        for name in SOURCES
    }
    # Raises CycleError, which names the circle.
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) >= set(SOURCES)


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_the_ground_floor_needs_torch_only(name):
    outside = {target for target in imports_of(name) if not target.startswith("lightning_ssesam.")}
    standard = {
        "abc",
        "collections",
        "contextlib",
        "warnings",
        "copy",
        "dataclasses",
        "functools",
        "itertools",
        "math",
        "numbers",
        "operator",
        "random",
        "sys",
    }
    assert outside <= standard | {"typing", "zlib", "torch", "typing_extensions"}


def private_names(name):
    """The private attributes, imports and names in strings of a module, that the project does not define itself."""
    found, tree = set(), SOURCES[name]
    in_texts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in in_texts:
            continue
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(part for part in node.value.split(".") if part.isidentifier())
    return {item for item in found if item.startswith("_") and not item.startswith("__")}


def own_names():
    own = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "loss")
                own.update({node.attr} if is_self else ())
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    return own


# Private names of torch, torchmetrics, jsonargparse and Python, each in the file that uses it.
OTHERS = {
    "_fields", "_make", "_replace",  # NamedTuple
    "_plot",  # torchmetrics, its recipe for metrics
    "_BatchNorm", "_NormBase", "_ConvTransposeNd", "_buffers", "_compiled_call_impl", "_dynamo", "_functorch",
    "_modules", "_parameters", "_torchdynamo_orig_callable", "_version", "_foreach_add_", "_foreach_copy_",
    "_foreach_mul_", "_foreach_norm", "_orig_mod", "_weight_norm", "_backward_hooks", "_iterator",
}  # fmt: skip


def test_private_names_of_lightning_stand_in_one_file():
    """At most 15, each held by the preflight, none anywhere else."""
    own = own_names()
    held = {part for path in (*STEP, *EXACT_RESUME) for part in path.split(".") if part.startswith("_")}
    assert len(held) <= 15
    inside = private_names("lightning_internals") - own - OTHERS
    assert inside == held
    for name in SOURCES:
        if name != "lightning_internals":
            assert not private_names(name) - own - OTHERS, name


def lines_of(node):
    """The lines of a function's body without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_files_and_functions_are_short(name):
    """No file above 400 lines, no function body above 40."""
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.FunctionDef):
            assert lines_of(node) <= 40, f"{name}.{node.name}"
    path = PACKAGE.joinpath(*name.split(".")) if name else PACKAGE
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert len(source.read_text().splitlines()) <= 400
