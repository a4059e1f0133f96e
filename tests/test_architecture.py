"""Who may import what, read from the source: ARCHITECTURE.md's invariants."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "onnxqt"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each part imports only from parts before its own; the parts of one line do not know each other.
ORDER = (
    {"errors"},
    {"numerics"},
    {"schemes", "profiles", "requantize", "devices"},
    {"runtime", "data", "ops", "metrics", "overrides", "tensors"},
    {"files", "model"},
    {"opset"},
    {"ingest"},
    {"plan"},
    {"calibrate"},
    {"table"},
    {"trim", "vendors"},
    {"export", "pictures"},
    {"candidates", "mixed", "ptq"},
    {"compiler"},
    {"emulate"},
    {"verify"},
    {"evaluate"},
    {"report", "survey"},
    {"cost"},
    {"advice", "compare", "html", "matrix"},
    {"pipeline"},
    {"budget"},
    {"cli"},
)
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
# The same inside parts of several files; `__init__` stands for what the part gives to others.
INSIDE = {
    "cli": (
        {"output", "options", "progress", "writing"},
        {"edge_page", "matrix_page", "program_page", "training"},
        {"advise", "backends", "compare", "edge", "program", "quantize", "report", "survey", "tables"},
        {"__init__"},
    ),
    "data": (
        {"form", "preprocessing"},
        {"content"},
        {"numpy_files"},
        {"images", "tensor_files", "text_files"},
        {"samples"},
        {"source"},
        {"iterables"},
        {"__init__"},
    ),
    "html": (
        {"text"},
        {"source", "svg"},
        {"charts", "command", "form", "outcomes"},
        {"accuracy", "backends", "course", "devices", "layers", "provenance", "treatment"},
        {"tensors"},
        {"page"},
        {"__init__"},
    ),
    "advice": ({"bench"}, {"facts", "sensitivity"}, {"search"}, {"plain"}, {"__init__"}),
    "matrix": ({"advice", "task"}, {"cells", "run"}, {"floats"}, {"bench"}, {"files"}, {"__init__"}),
}
# Judges files, not the code that wrote them.
ALONE = {"emulate": {"errors", "numerics", "requantize", "profiles", "runtime"}}

NOWHERE = frozenset[str]()
FOREIGN = {
    "click": {f"cli/{name}.py" for names in INSIDE["cli"] for name in names} - {"cli/progress.py", "cli/writing.py"},
    "PIL": {"data/images.py"},
    "flatbuffers": {"vendors/onnxruntime.py"},
    "safetensors": {"table/files.py"},
    "rich": {"cli/output.py", "cli/progress.py", "cli/edge_page.py", "cli/survey.py"},
    "onnxruntime": {"runtime.py", "trim/trainer.py", "trim/worker.py"},
    "matplotlib": {"pictures.py"},
    "tensorboardX": {"trim/history.py"},
    "torch": NOWHERE,
    "jinja2": {"html/page.py"},
    "markupsafe": {"html/page.py"},
    **dict.fromkeys(("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"), NOWHERE),
}
CALLS = {
    "print": NOWHERE,  # the command line has click.echo
    "input": NOWHERE,
    "exit": {"trim/worker.py"},  # the worker is a program of its own
    "quit": NOWHERE,
    "eval": NOWHERE,
    "exec": NOWHERE,
}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    """`model` for model.py, `trim` for everything in trim/, empty for the package's own __init__."""
    name = relative(path).split("/")[0].removesuffix(".py")
    return "" if name == "__init__" else name


def modules(path: Path) -> Iterator[str]:
    """Full names of the modules, or of the names in them, that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} is a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_parts(path: Path) -> set[str]:
    """The parts of this package that a file imports."""
    names = (name.split(".") for name in modules(path))
    return {name[1] for name in names if name[0] == "onnxqt" and name[1] != "__version__"}


def inner_parts(path: Path, part: str) -> set[str]:
    """The files of its own part that a file imports."""
    files = {file for names in INSIDE[part] for file in names}
    names = (name.split(".") for name in modules(path))
    return {
        name[2] if len(name) > 2 and name[2] in files else "__init__" for name in names if name[:2] == ["onnxqt", part]
    }


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    if not part:
        return
    assert part in RANK, f"give '{part}' its place in ORDER and in ARCHITECTURE.md"
    for imported in own_parts(path) - {part}:
        assert RANK[imported] < RANK[part], f"{part} must not import {imported}"
    assert own_parts(path) - {part} <= ALONE.get(part, set(RANK))


@pytest.mark.parametrize("part", INSIDE)
def test_imports_go_one_way_inside(part: str) -> None:
    rank = {name: rank for rank, names in enumerate(INSIDE[part]) for name in names}
    files = {path.stem: path for path in FILES if part_of(path) == part}
    assert set(files) == set(rank)
    for name, path in files.items():
        for imported in inner_parts(path, part):
            assert rank[imported] < rank[name], f"{part}/{name}.py must not import {imported}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_foreign_packages_stay_where_they_belong(path: Path) -> None:
    for name in modules(path):
        allowed = FOREIGN.get(name.split(".")[0])
        assert allowed is None or relative(path) in allowed, f"{relative(path)} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_the_command_line_prints_and_exits_and_nothing_unpickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        builtin = isinstance(node.func, ast.Name)
        module = node.func.value if isinstance(node.func, ast.Attribute) else None
        of_sys = isinstance(module, ast.Name) and module.id == "sys"
        if builtin or of_sys:
            assert relative(path) in CALLS.get(called(node), {relative(path)}), f"line {node.lineno}"
        pickles = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
        assert all(isinstance(value, ast.Constant) and value.value is False for value in pickles)


def test_onnxruntime_training_stays_in_the_training_process() -> None:
    """Its kernels can kill the process they run in, so nothing that a user's process imports may import it."""
    private = ("onnxruntime.training", "onnxruntime.capi")
    importers = {relative(path) for path in FILES if any(name.startswith(private) for name in modules(path))}
    assert importers == {"trim/trainer.py"}
    importers = {relative(path) for path in FILES if any("onnxqt.trim.trainer" in name for name in modules(path))}
    assert importers == {"trim/worker.py"}
    assert not any("onnxqt.trim.worker" in name for path in FILES for name in modules(path))


def test_every_part_that_is_placed_exists() -> None:
    assert {part_of(path) for path in FILES} - {""} == set(RANK)
