"""How the files hang together: who may import whom, and what stands alone."""

import ast
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ALONE = ["comadice_losses", "comadice_mixer"]  # need torch alone; anyone may import them
# From the lowest up: a group imports nothing of a later one. The files of the top level are groups of one.
GROUPS = [
    "environments",
    "offline_data",
    "support",
    "comadice_eval",
    "comadice_bc",
    "comadice_train",
    "baselines",
    "benchmarks",
    "tests",
]
# A checkpoint of BCQ or CQL says what its policy is made of, so the evaluation imports that file when it meets one.
LAZY = ("comadice_eval", {"baselines.bcq", "baselines.cql"})


def tracked() -> list[Path]:
    """The .py files that git tracks; where there is no git, those in the folders of GROUPS and at the top level."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "*.py"], capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    return [*ROOT.glob("*.py"), *(file for group in GROUPS for file in (ROOT / group).rglob("*.py"))]


def module_name(file: Path) -> str:
    """environments/smax.py -> environments.smax, and environments/__init__.py -> environments."""
    return ".".join(part for part in file.relative_to(ROOT).with_suffix("").parts if part != "__init__")


MODULES = {module_name(file): file for file in tracked()}


def imports(name: str) -> set[str]:
    """Which modules of ours a module imports, at the top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are written out from the repository's root"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & MODULES.keys()) | ({node.module} if whole - MODULES.keys() else set())
    found |= {f"tests.{module}" for module in found}  # tests import each other by their bare names
    return found & MODULES.keys()


GRAPH = {name: imports(name) for name in MODULES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of the graph, empty where there is none."""
    done, way = set(), []

    def visit(node: str) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        way.append(node)
        found = next(filter(None, map(visit, sorted(graph[node]))), [])
        way.pop()
        done.add(node)
        return found

    return next(filter(None, map(visit, sorted(graph))), [])


def without_lazy() -> dict[str, set[str]]:
    return GRAPH | {LAZY[0]: GRAPH[LAZY[0]] - LAZY[1]}


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_graph_is_that_of_the_files():
    assert len(MODULES) > 40 and LAZY[1] <= GRAPH[LAZY[0]]
    assert {"comadice_bc", "comadice_losses", "environments.cpu", "support.runs"} <= GRAPH["comadice_train"]
    assert "offline_data.collect" in GRAPH["offline_data.__main__"], "imports within functions count"


def test_no_import_circle():
    assert circle(without_lazy()) == []


def test_folders_import_lower_ones_alone():
    rank = {group: i for i, group in enumerate(GROUPS)} | dict.fromkeys(ALONE, -1)
    for name, targets in without_lazy().items():
        for target in targets:
            low, high = rank[target.split(".")[0]], rank[name.split(".")[0]]
            assert low <= high, f"{name} imports {target}"


def test_the_lazy_import_is_within_a_function():
    for node in ast.parse(MODULES[LAZY[0]].read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "baselines" not in ast.dump(node) and "report" not in ast.dump(node)


def test_the_top_level_holds_the_algorithm_alone():
    found = sorted(name for name, file in MODULES.items() if file.parent == ROOT)
    assert found == ["comadice_bc", "comadice_eval", "comadice_losses", "comadice_mixer", "comadice_train"]


@pytest.mark.parametrize("name", ALONE)
def test_files_that_need_torch_alone(name, tmp_path):
    assert GRAPH[name] == set()
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    ours = {"tensordict", "torchrl", *(module.split(".")[0] for module in MODULES)}
    code = f"import sys, {name}; print({name}.__file__); print(*(m for m in sys.modules if m.split('.')[0] in {ours}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / f"{name}.py"), name]


@pytest.mark.parametrize(
    "module",
    [
        "environments",
        "environments.cpu",
        "environments.checks",
        "offline_data",
        "support",
        "baselines",
        "benchmarks",
    ],
)
def test_light_modules_load_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_cpu_settings_come_before_torch():
    """Where a script imports environments.cpu, nothing that it imports before loads torch."""
    for file in tracked():
        nodes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.names[0].name if isinstance(node, ast.Import) else node.module for node in nodes]
        if "environments.cpu" in names:
            before = names[: names.index("environments.cpu")]
            assert {name.split(".")[0] for name in before} <= sys.stdlib_module_names, file


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_memory_is_kept():
    """Ten tensors of 1 MB, allocated and freed 50 times, cause less than a twentieth of the page faults.

    A few are left. For instance, a small allocation may split a freed block, and the heap then grows by a tensor.

    What glibc does by itself depends on where the last allocations lie. So both processes begin with small thresholds,
    with which it returns the memory every time.
    """
    small = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    code = """
import resource, torch
def rounds(times):
    for _ in range(times):
        kept = [torch.ones(2**18) for _ in range(10)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(-rounds(5) + rounds(50))
"""
    faults = {}
    for name, setting in (("kept", "import environments.cpu"), ("returned", "")):
        command, env = [sys.executable, "-c", setting + code], os.environ | small
        faults[name] = int(subprocess.run(command, cwd=ROOT, env=env, timeout=120, capture_output=True).stdout)
    assert 20 * faults["kept"] < faults["returned"] > 1000, faults


@pytest.mark.parametrize("command", ["", "collect", "download", "convert", "info", "list", "plot"])
def test_help_of_the_data_commands(command):
    done = subprocess.run(
        [sys.executable, "-m", "offline_data", *command.split(), "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = {
        "": ["collect", "download", "convert", "info", "list", "plot"],
        "list": ["--root"],
        "collect": ["--task", "--steps"],
        "plot": ["--out"],
        "download": ["--quality", "--base-url"],
        "convert": ["--format", "--return-to-go"],
        "info": ["dataset directory (required)", "--verify"],
    }[command]
    assert all(word in done.stdout for word in said), done.stdout


@pytest.mark.parametrize("arguments, said", [([], "no command is given"), (["train"], "there is no command 'train'")])
def test_unknown_data_command(arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "offline_data", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith(f"error: {said}")
    assert len(done.stderr.splitlines()) == 1
