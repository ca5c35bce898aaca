"""The order of the house: rooms on levels, imports that lead down, sizes that fit a screen."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "adaround_ext"
# From below to above. A module imports from its own room and from the levels below; rooms of one
# level do not know each other.
LEVELS = (
    ("ops", "process", "reference", "distributed"),
    ("checks", "files", "tensors", "linalg"),
    ("config", "layers"),
    ("grid", "presets", "report", "statistics", "tracing"),
    ("result",),
    ("activations", "planning", "replay", "rounding", "transforms"),
    ("export",),
    ("model",),
    ("mixed_precision",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
TOP = {"__init__", "__main__"}
FORMER = {"native", "packing", "reference_solvers"}  # their names are elsewhere now, for a release
MOST_LINES, MOST_OF_A_FUNCTION, MOST_MODULES = 350, 60, 14


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports_of(module: str) -> frozenset[str]:
    """The package's modules that a module imports anywhere, also inside of functions."""
    names = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [(alias.name, alias.name) for alias in node.names]
    inside = [[name.removeprefix("adaround_ext.") for name in pair] for pair in names]
    return frozenset(
        next((name for name in pair if name in MODULES), module) for pair in inside
    ) - {module}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_a_level() -> None:
    assert {room_of(module) for module in MODULES} == LEVEL.keys() | TOP | FORMER


def test_imports_lead_down() -> None:
    for module in MODULES.keys() - TOP - FORMER:
        room = room_of(module)
        for other in {room_of(name) for name in imports_of(module)} - {room}:
            assert LEVEL.get(other, len(LEVELS)) < LEVEL[room], f"{module} imports from {other}"


def test_no_module_imports_itself_by_others() -> None:
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(imports_of(module)):
                walk(other, (*way, module))
            done.add(module)

    for module, path in MODULES.items():
        if path.stem != "__init__":  # which collects names of what it holds
            walk(module, ())


def test_the_oracle_stands_alone() -> None:
    users = [module for module in MODULES if room_of(module) not in {"reference", *FORMER}]
    assert not [user for user in users if "reference" in map(room_of, imports_of(user))]


def test_sizes() -> None:
    for module, path in MODULES.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, module
    for folder in {path.parent for path in MODULES.values()} - {ROOT}:
        assert len(list(folder.glob("*.py"))) - 1 <= MOST_MODULES, folder


def test_functions_fit_a_screen() -> None:
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                statements = node.body[ast.get_docstring(node) is not None :]
                if statements:
                    lines = (statements[-1].end_lineno or 0) - statements[0].lineno + 1
                    assert lines <= MOST_OF_A_FUNCTION, f"{module}.{node.name} has {lines} lines"


def test_the_map_is_the_tree() -> None:
    """CONTRIBUTING.md has a line for every module, under its room."""
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    folders: list[str] = []
    listed = []
    for line in filter(None, text.splitlines()):
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name.removesuffix("/")]
        if not name.endswith("/"):
            listed.append(".".join(folders).removesuffix(".py"))
    packages = {module for module, path in MODULES.items() if path.stem == "__init__"}
    assert sorted(listed) == sorted(MODULES.keys() - packages - TOP - FORMER)
