"""The notebooks are whole, open in Colab, and run."""

import base64
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
REPOSITORY = re.compile(r'^REPOSITORY = "(https://github\.com/(\S+))"$', re.MULTILINE)
MAX_BYTES = 400_000


def read(path):
    return nbformat.read(path, as_version=4)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_the_four_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["000_flowers", "001_cifar10", "002_ddim", "003_fashion_mnist"]


@by_name
def test_it_is_a_valid_notebook_that_nobody_need_download_for_long(path):
    nbformat.validate(read(path))
    assert path.stat().st_size < MAX_BYTES


@by_name
def test_its_badge_opens_the_notebook_itself_in_colab(path):
    book = read(path)
    (_, repository), *others = REPOSITORY.findall("\n".join(cell.source for cell in code(book)))
    assert others == []
    address = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
    assert badge in book.cells[0].source
    assert badge in (ROOT / "README.md").read_text()


@by_name
def test_only_the_install_cell_talks_to_the_shell_and_only_in_colab(path):
    install, *others = code(read(path))
    assert REPOSITORY.match(install.source)
    assert "pip install --quiet -e ." in install.source
    before, condition, inside = install.source.partition('if "google.colab" in sys.modules')
    assert condition
    shell = re.compile(r"^\s*[!%]", re.MULTILINE)
    assert not shell.search(before)
    assert all(line.startswith("    ") for line in inside.splitlines()[1:])
    assert [cell.source for cell in others if shell.search(cell.source)] == []


@by_name
def test_it_was_run_in_order_and_ended_well(path):
    cells = code(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


@by_name
def test_it_names_no_place_of_one_machine(path):
    assert re.findall(r"/(?:tmp|work|home|root|content|Users)/[\w.-]*", path.read_text()) == []


@by_name
def test_its_names_of_this_package_exist(path):
    """A renamed function is found here at once, not by the slow test."""
    import importlib

    source = "\n".join(cell.source for cell in code(read(path)))
    (imported,) = re.findall(r"^from ddpm_jax import (.+)$", source, re.MULTILINE)
    for name in imported.split(", "):
        module = importlib.import_module(f"ddpm_jax.{name}")
        used = re.findall(rf"(?<![\w./]){name}\.([a-z]\w*|[A-Z]+)\b", source)
        assert used, name
        missing = [attribute for attribute in set(used) if not hasattr(module, attribute)]
        assert missing == [], name


@by_name
@pytest.mark.slow
def test_it_runs(path, tmp_path, program_env, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in (program_env | {"DDPM_JAX_SMALL": "1"}).items():
        monkeypatch.setitem(os.environ, name, value)
    book = read(path)
    client = nbclient.NotebookClient(
        book, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    assert all(cell.execution_count for cell in code(book))
    assert any((tmp_path / "runs").glob("*/checkpoints/*"))
