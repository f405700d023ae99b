"""The rules of the layout: which room may import which, where each library may be imported, and how long files are."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From top to bottom. A package or module imports only rooms above it, and its own parts.
ROOMS = (
    *("errors", "config", "config_reference", "hashing", "storage", "huggingface", "processes", "display"),
    *("corpus", "cleaning", "tokenizer", "shards", "order"),  # text to ids: numpy, never torch
    *("model", "dialects", "objectives", "training"),  # ids to weights: torch
    *("export", "finetune", "prompting", "evaluation"),  # weights to use
    *("cli", "tools", "__main__"),  # know everybody
)
TORCHLESS = ROOMS[: ROOMS.index("model")]
# Each of these libraries is imported only by the modules that are its door.
DOORS = {
    "rich": ("display",),
    "matplotlib": ("display/plots",),
    "yaml": ("config",),
    "deepspeed": ("training/engine",),
    "transformers": ("huggingface", "export/parity"),  # parity.py runs alone, with nothing of ours imported
    "peft": ("huggingface",),
    "tensorboard": ("training/watch",),
}
MOST_LINES = 450
LINES_OF_A_SCRIPT = 12
TEXT_SIDE = ("corpus", "cleaning", "tokenizer", "shards", "order")
TEXT_SIDE_LINES = 13_620  # labelled pairs took 110; the text side is complete: new features belong elsewhere


@cache
def modules() -> dict[str, Path]:
    """Return the file of every module, by name without `pretrain.`. A package has the name of its folder."""
    found = {}
    for path in sorted((ROOT / "pretrain").rglob("*.py")):
        parts = path.relative_to(ROOT / "pretrain").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> list[tuple[str, str]]:
    """Return each import of a file with its time: "now", "later" (in a function), or "types" (for type checkers)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        when = "types" if node in typing_only else "later" if node in late else "now"
        if isinstance(node, ast.Import):
            found += [(alias.name, when) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", when) for alias in node.names]
    return found


def ours(name: str, known: dict[str, Path]) -> str | None:
    """Return our module that an imported name is, or comes from."""
    name = name.removeprefix("pretrain.") if name.startswith("pretrain.") else ""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_stands_in_a_room():
    assert {room(name) for name in modules() if name} == set(ROOMS)


def test_no_room_imports_a_room_below_it():
    known, upward = modules(), []
    for name, path in known.items():
        for imported, _ in imports(path):
            target = ours(imported, known)
            if name and target and ROOMS.index(room(target)) > ROOMS.index(room(name)):
                upward.append(f"{name} imports {target}")
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    graph = {
        name: {target for imported, when in imports(path) if when == "now" and (target := ours(imported, known))}
        for name, path in known.items()
    }
    left = dict(graph)
    while free := [name for name, targets in left.items() if not targets & left.keys() - {name}]:
        for name in free:
            del left[name]
    assert left == {}, "each of these imports another of them"


def test_no_package_is_imported_by_its_own_parts():
    """Importing a name from one's own package would import the whole package."""
    known, found = modules(), []
    for name, path in known.items():
        if path.stem != "__init__":
            packages = {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)}
            found += [f"{name} imports {t}" for i, _ in imports(path) if (t := ours(i, known)) in packages]
    assert found == []


@pytest.mark.parametrize("configuration", [False, True], ids=["text side", "configuration of a run"])
def test_text_becomes_ids_and_configurations_are_read_without_torch(configuration):
    names = [f"pretrain.{name}" for name in modules() if room(name) in TORCHLESS]
    if configuration:
        names = ["pretrain.training.config"]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nsys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("library", DOORS)
def test_a_library_enters_by_its_door(library):
    doors = tuple(door.replace("/", ".") for door in DOORS[library])
    found = [
        name
        for name, path in modules().items()
        if any(imported.split(".")[0] == library and when != "types" for imported, when in imports(path))
        and not any(name == door or name.startswith(f"{door}.") for door in doors)
    ]
    assert found == []


def test_no_script_has_the_name_of_a_module_of_the_standard_library():
    assert {path.stem for path in (ROOT / "launch").glob("*.py")}.isdisjoint(sys.stdlib_module_names)


def test_a_script_only_starts_its_stage():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "launch").glob("*.py")}
    assert {name: count for name, count in lines.items() if count > LINES_OF_A_SCRIPT} == {}


def test_no_file_is_longer_than_a_reader_can_hold():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_the_text_side_does_not_grow():
    known = modules()
    text = [path for name, path in known.items() if room(name) in TEXT_SIDE]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in text) <= TEXT_SIDE_LINES


def test_tests_mirror_the_rooms():
    """A folder of tests has the name of a room. `road` has tests of several rooms, `helpers` has shared code."""
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders - {"road"} <= set(ROOMS)
