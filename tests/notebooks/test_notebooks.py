"""The notebooks: stored outputs are complete, and all run in order, since later ones read the logs of the first."""

import base64
import json
import re
import struct

import nbclient
import nbformat
import pytest

NAMES = [
    "01_quickstart_tour",
    "02_entropy_statistics",
    "03_methods_compared",
    "04_your_own_reward_gate_and_data",
]
MAX_BYTES = 500_000


@pytest.fixture(params=NAMES)
def path(repository, request):
    return repository / "notebooks" / f"{request.param}.ipynb"


def cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def outputs(path):
    return [output for cell in cells(path) for output in cell["outputs"]]


def num_pictures(found):
    return sum("image/png" in output.get("data", {}) for output in found)


def test_all_notebooks_are_tested(repository):
    assert sorted(path.stem for path in (repository / "notebooks").glob("*.ipynb")) == NAMES


def test_stored_outputs_are_complete_small_and_without_machine_paths(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MAX_BYTES
    assert [cell["execution_count"] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
    assert not [output for output in outputs(path) if output["output_type"] == "error"]
    assert not re.search(r"/(home|work|root|tmp|usr)/|site-packages", text)
    pictures = [output["data"]["image/png"] for output in outputs(path) if "image/png" in output.get("data", {})]
    assert pictures
    for picture in pictures:
        width, height = struct.unpack(">II", base64.b64decode(picture)[16:24])
        assert width >= 300
        assert height >= 200
    assert any(
        "egspo" in "".join(output["data"]["text/html"])
        for output in outputs(path)
        if "text/html" in output.get("data", {})
    )


def test_notebooks_define_no_functions_and_only_one_defines_classes(path):
    """The notebook on custom parts is the only one with classes."""
    code = "\n".join("".join(cell["source"]) for cell in cells(path))
    assert not re.search(r"^def ", code, re.MULTILINE)
    assert bool(re.search(r"^class ", code, re.MULTILINE)) == path.stem.startswith("04")


@pytest.mark.slow
def test_notebooks_run_from_scratch(repository, tmp_path, monkeypatch):
    """Run them in a folder with only the configs, so that they neither need nor change earlier runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(repository))
    (tmp_path / "configs").symlink_to(repository / "configs")
    (tmp_path / "notebooks").mkdir()
    for name in NAMES:
        notebook = nbformat.read(repository / "notebooks" / f"{name}.ipynb", as_version=4)
        resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
        fresh = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert num_pictures(fresh) == num_pictures(outputs(repository / "notebooks" / f"{name}.ipynb"))
    assert len(list((tmp_path / "logs" / "notebooks").iterdir())) == 5
