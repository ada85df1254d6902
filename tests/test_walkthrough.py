"""docs/walkthrough.ipynb: every cell runs and the key numbers hold. The committed file holds such a run's figures.

The notebook ends with a dict `numbers`. It is read from a fresh run here, and from the output that was committed.
"""

import ast
import copy
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"


def committed() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def figures(cell: dict) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def complaints_about_outputs(notebook: dict) -> list[str]:
    """What is missing in the outputs, or should not be there."""
    found = []
    for i, cell in enumerate(code_cells(notebook)):
        if cell["execution_count"] != i + 1:
            found.append(f"code cell {i} was not run in order")
        if ("plt.show()" in source(cell)) != (figures(cell) == 1):
            found.append(f"code cell {i} has {figures(cell)} figures")
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                found.append(f"code cell {i} shows an error or a warning")
    if sum(map(figures, code_cells(notebook))) < 5:
        found.append("hardly any figures")
    return found


def complaints_about_numbers(numbers: dict) -> list[str]:
    n = numbers
    claims = {
        "primal and dual are equal": n["duality_gap"] < 1e-5 and n["largest_duality_gap_of_all_alphas"] < 1e-5,
        "the networks' w is the exact w*": n["w_error"] < 1e-3,
        "the networks' w of semi is that of bisection": n["semi_w_error"] < 1e-3,
        "A_tot is M[q] - M[nu], without the bias": n["mixer_error"] < 1e-9,
        "Eq. 9 gives the best additive advantage": n["additive_error"] < 1e-4,
        "Eq. 11 gives the product of the local shares": n["policy_error"] < 1e-3,
        "weighted BC is far above BC and the data": n["return_weighted_bc"]
        > max(n["return_bc"], n["return_behaviour"]) + 0.5,
        "so it is with semi": n["return_weighted_bc_semi"] > max(n["return_bc"], n["return_behaviour"]) + 0.5,
        "BC is below the data": n["return_bc"] < n["return_behaviour"] - 0.1,
        "nothing is above the optimum": max(n["return_weighted_bc"], n["return_weighted_bc_semi"])
        <= n["return_optimum"] + 1e-9,
        "the printed form loses its mass": 0 <= n["printed_mean_w"] < 0.2,
        "semi has E[w | s] = 1": n["semi_worst_mean_w"] < 1e-6,
        "semi tends to the behaviour": n["semi_total_variation_at_alpha_100"] < 1e-2,
        "exact tends to the behaviour": n["exact_total_variation_at_alpha_100"] < 1e-2,
    }
    return [claim for claim, holds in claims.items() if not holds]


def committed_numbers() -> dict:
    (output,) = code_cells(committed())[-1]["outputs"]
    return ast.literal_eval("".join(output["data"]["text/plain"]))


@pytest.fixture(scope="module")
def executed() -> dict:
    """The notebook after a fresh run in the repository's root; a cell that fails is an exception."""
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute(env=env)
    return notebook


def test_every_cell_runs(executed):
    assert complaints_about_outputs(executed) == []


def test_key_numbers_of_a_fresh_run(executed):
    (output,) = code_cells(executed)[-1]["outputs"]
    numbers = ast.literal_eval(output["data"]["text/plain"])
    assert complaints_about_numbers(numbers) == []
    for name, value in committed_numbers().items():
        if name.startswith("return"):
            assert numbers[name] == pytest.approx(value, abs=1e-3), name


def test_committed_notebook_has_been_run():
    assert complaints_about_outputs(committed()) == []
    assert complaints_about_numbers(committed_numbers()) == []


def test_committed_notebook_names_no_machine():
    text = [output.get("text", "") for cell in code_cells(committed()) for output in cell["outputs"]]
    assert not any(word in "".join(lines) for lines in text for word in ("/home/", "/root/", "/tmp/", "site-packages"))


def test_code_lines_are_short():
    long = [line for cell in code_cells(committed()) for line in source(cell).splitlines() if len(line) > 120]
    assert long == []


@pytest.mark.parametrize("folder", [".", "docs"])
def test_the_root_is_found(folder):
    """The first cell finds comadice_losses.py wherever in the repository the notebook is opened."""
    code = source(code_cells(committed())[0]) + "\nimport comadice_losses; print(comadice_losses.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT / folder,
        timeout=120,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.stdout.strip() == str(ROOT / "comadice_losses.py"), done.stderr


def broken_outputs(name: str) -> dict:
    notebook = copy.deepcopy(committed())
    drawn = next(cell for cell in code_cells(notebook) if figures(cell))
    if name == "no figure":
        drawn["outputs"] = []
    elif name == "error":
        drawn["outputs"].append({"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []})
    elif name == "warning":
        drawn["outputs"].append({"output_type": "stream", "name": "stderr", "text": "UserWarning"})
    else:
        for cell in code_cells(notebook):
            cell["outputs"], cell["execution_count"] = [], None
    return notebook


@pytest.mark.parametrize("name", ["no figure", "error", "warning", "never run"])
def test_broken_outputs_are_seen(name):
    assert complaints_about_outputs(broken_outputs(name))


@pytest.mark.parametrize(
    "name, value",
    [
        ("duality_gap", 1e-4),
        ("w_error", 0.01),
        ("semi_w_error", 0.01),
        ("mixer_error", 0.1),
        ("additive_error", 0.01),
        ("policy_error", 0.01),
        ("return_weighted_bc", 0.0),
        ("return_weighted_bc", 2.0),
        ("return_weighted_bc_semi", 0.0),
        ("return_bc", 0.1),
        ("printed_mean_w", 0.9),
        ("printed_mean_w", float("nan")),
        ("semi_worst_mean_w", 0.1),
        ("semi_total_variation_at_alpha_100", 0.05),
        ("w_error", float("nan")),
    ],
)
def test_wrong_numbers_are_seen(name, value):
    assert len(complaints_about_numbers(committed_numbers() | {name: value})) == 1
