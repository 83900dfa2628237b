"""The rules of the house, read from the source."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ddpm_jax"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ROOMS = {"diffusion", "models", "data", "training", "evaluation", "interop", "planning"}
# Where a Config may go, besides the programs.
HALL = {
    "config",
    "experiment",
    "generate",
    "objective",
    "program",
    "run_config",
    "setup",
    "studies",
}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 350, 60


class Import(NamedTuple):
    module: str  # who imports
    target: str  # what, as far as can be told: "ddpm_jax.config.Config", "jax.numpy"
    late: bool  # inside a function or under TYPE_CHECKING


def _imports(module: str, path: Path) -> list[Import]:
    found = []

    def visit(node: ast.AST, late: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found.extend(Import(module, f"{node.module}.{alias.name}", late) for alias in node.names)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        late = late or typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, late)

    visit(ast.parse(path.read_text()), False)
    return found


IMPORTS = [found for module, path in MODULES.items() for found in _imports(module, path)]
PROGRAMS = {
    module.removeprefix("ddpm_jax.")
    for module, path in MODULES.items()
    if 'if __name__ == "__main__"' in path.read_text()
}


def room(name: str) -> str:
    """ "ddpm_jax.training.step" -> "training"; "" for what is not of this package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "ddpm_jax" and len(parts) > 1 else ""


def of(library: str) -> list[Import]:
    return [x for x in IMPORTS if x.target == library or x.target.startswith(library + ".")]


def within() -> list[Import]:
    """Imports of one room from another."""
    return [x for x in IMPORTS if room(x.target) and room(x.target) != room(x.module)]


def test_the_source_was_read():
    assert {"train", "sample"} <= PROGRAMS
    assert {"diffusion", "models", "data", "training"} <= {room(module) for module in MODULES}
    assert len(of("jax")) > 10
    assert any(x.late for x in of("tensorflow"))


def test_diffusion_imports_jax_numpy_and_itself_only():
    allowed = {"jax", "numpy", "ddpm_jax"} | sys.stdlib_module_names
    mine = [x for x in IMPORTS if room(x.module) == "diffusion"]
    assert [x for x in mine if x.target.split(".")[0] not in allowed] == []
    assert [x for x in mine if room(x.target) not in ("", "diffusion")] == []


def test_only_models_imports_flax():
    assert [x for x in of("flax") if room(x.module) not in ("models", "interop")] == []
    assert of("flax.linen")
    assert [x for lib in ("flax.training", "flax.jax_utils", "flax.metrics") for x in of(lib)] == []


def test_only_data_imports_tensorflow_and_late():
    found = of("tensorflow") + of("tensorflow_datasets")
    assert [x for x in found if room(x.module) not in ("data", "evaluation")] == []
    assert [x for x in found if not x.late] == []


def test_only_figures_imports_matplotlib_and_late():
    assert {(x.module, x.late) for x in of("matplotlib")} == {("ddpm_jax.figures", True)}


def test_only_one_module_imports_orbax():
    assert {x.module for x in of("orbax")} == {"ddpm_jax.training.checkpoint"}


def test_nothing_uses_pmap():
    assert [module for module, path in MODULES.items() if "pmap(" in path.read_text()] == []


def test_models_and_diffusion_lie_at_the_bottom():
    bottom = {"diffusion", "models", "images", "progress", "fields", "distributed"}
    found = [(room(x.module), room(x.target)) for x in within() if room(x.module) in bottom]
    assert found == [("progress", "distributed")]  # the first process alone shows a bar


def test_diffusion_and_training_do_not_know_each_other():
    pair = {"diffusion", "training"}
    assert [x for x in within() if {room(x.module), room(x.target)} == pair] == []


def test_arrows_run_one_way():
    up = HALL | PROGRAMS
    assert [x for x in within() if room(x.module) in ROOMS and room(x.target) in up] == []
    below = ("diffusion", "fields", "limits", "normalizer")
    assert [x for x in within() if room(x.module) == "config" and room(x.target) not in below] == []


def test_programs_never_import_each_other():
    programs = [x for x in within() if room(x.target) in PROGRAMS]
    assert programs == []


def test_config_stops_at_the_programs():
    knows = {room(x.module) for x in within() if room(x.target) == "config"}
    assert knows <= HALL | PROGRAMS


def test_there_is_no_drawer_for_everything():
    assert [m for m in MODULES if m.split(".")[-1] in ("utils", "util", "helpers", "misc", "common")] == []


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module):
    assert len(MODULES[module].read_text().splitlines()) <= MAX_MODULE_LINES


def _code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function, without its docstring."""
    doc = function.body[0]
    is_doc = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    return function.end_lineno - function.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if is_doc else 0)


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    functions = [x for x in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(x, ast.FunctionDef)]
    assert {f.name: _code_lines(f) for f in functions if _code_lines(f) > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_has_a_docstring(module):
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree)
    public = [x for x in tree.body if isinstance(x, ast.FunctionDef | ast.ClassDef) and not x.name.startswith("_")]
    overloads = [x for x in public if "overload" in map(ast.unparse, x.decorator_list)]
    assert [x.name for x in public if not ast.get_docstring(x) and x not in overloads] == []


def test_the_package_alone_is_light_and_all_of_it_touches_no_device():
    script = f"""
import importlib, sys
import ddpm_jax
heavy = [m for m in ("jax", "tensorflow", "tensorflow_datasets", "orbax", "torch", "flax") if m in sys.modules]
assert heavy == [], heavy
from ddpm_jax import config, diffusion
assert not {{"tensorflow", "orbax", "torch", "flax"}} & set(sys.modules)
from ddpm_jax import models
assert not {{"tensorflow", "orbax", "torch"}} & set(sys.modules)
for module in {list(MODULES)!r}:
    importlib.import_module(module)
assert not {{"tensorflow", "tensorflow_datasets", "torch", "matplotlib"}} & set(sys.modules)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120
    )
