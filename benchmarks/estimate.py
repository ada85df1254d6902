"""Estimates how long the runs of a plan would take here. It times each method's updates on noise of each task's sizes.

The updates are those of the methods' own scripts, in run directories that are thrown away, without a simulator.
Evaluations come on top: in comadice_train.py and comadice_bc.py they run beside the updates.
"""

import contextlib
import importlib
import io
import math
import tempfile
import time
from pathlib import Path

import torch
from tensordict import TensorDict
from tqdm import tqdm

from benchmarks.grid import METHODS, Cell
from offline_data.card import DATA_ROOT, check_card, dataset_path, read_json
from offline_data.published import published
from offline_data.writer import DatasetWriter

STEPS = {"cpu": (2, 6, 60, 400), "cuda": (200, 1000)}  # steps of the runs; a GPU's first updates build a graph
ENOUGH = 0.5  # seconds; the longest run takes at least this much more than the shortest, or the difference is noise
EPISODES, LENGTH = 20, 24  # of the dataset of noise


def sizes(cell: Cell) -> tuple[int, int, int, int, bool] | None:
    """(agents, state, observation, action, discrete) of an instance, from its card or from Table 3; None if neither has
    it."""
    path = dataset_path(cell.flags["data"], *cell.instance, DATA_ROOT)
    if (path / "card.json").is_file():
        card = read_json(path / "card.json")
        check_card(path, card)
        return tuple(card[key] for key in ("n_agents", "state_dim", "obs_dim", "action_dim", "discrete"))
    if cell.instance in published():
        return *map(int, published()[cell.instance][0]), cell.instance[0] != "mamujoco"
    return None


def noise(path: Path, n: int, S: int, O: int, A: int, discrete: bool, transitions: int):
    """Writes a dataset of noise with at least that many transitions."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    writer, T = DatasetWriter(path), LENGTH
    for _ in range(max(EPISODES, math.ceil(transitions / LENGTH))):
        end = torch.zeros(T + 1, 1, dtype=torch.bool)
        end[T - 1] = True
        agents = {"observation": draw(T + 1, n, O), "action": draw(T + 1, n, A)}
        if discrete:
            agents["action"] = torch.randint(A, (T + 1, n), generator=generator)
            agents["action_mask"] = torch.ones(T + 1, n, A, dtype=torch.bool)
        team = {"state": draw(T + 1, S), "reward": draw(T + 1, 1), "terminated": end, "done": end.clone()}
        writer.append(TensorDict(team | {"agents": TensorDict(agents, [T + 1, n])}, [T + 1]))
    made = {"by": "python -m benchmarks.paper --plan"}
    card = dict.fromkeys(("env", "task", "quality"), "noise") | {"engine": None, "interface": "benchmark", "made": made}
    writer.close(card)


def measure(cell: Cell, data: str, out: Path, device: str) -> float:
    """Seconds of one step of one seed, in both stages if there are two.

    It is the difference of two runs, so that what happens once per run does not count. On a CPU it is the process's CPU
    time, not the time that passed, since other work may share the machine.
    """
    script = importlib.import_module(METHODS[cell.method][0])
    clock = time.perf_counter if device == "cuda" else time.process_time
    seeds = cell.seeds if device == "cuda" else cell.seeds[:1]
    flags = cell.flags | {"env": None, "task": None, "quality": None, "data": data, "quiet": True}
    flags |= {"evals": 1, "seeds": seeds, "device": device, "overwrite": True}

    def run(steps: int) -> float:
        args = script.Args(**flags | {"out": str(out / str(steps)), "steps": steps})
        began = clock()
        with contextlib.redirect_stdout(io.StringIO()):
            script.main(args)
        return clock() - began

    few, *more = STEPS[device]
    run(few)  # the first run of a process also pays for what libraries do once
    once = run(few)
    for steps in more:
        took = run(steps) - once
        if took > ENOUGH:
            break
    return took / (steps - few) / len(seeds)


def seconds_per_run(cells: list[Cell], device: str) -> dict[str, float | None]:
    """Cell's name -> seconds of its updates for one seed on cpu (one thread) or cuda; None if the sizes are not
    known."""
    torch.set_num_threads(1)
    known, seconds = {}, {}
    shapes = {cell.name: sizes(cell) for cell in cells}
    same = lambda cell: (shapes[cell.name], cell.method, cell.flags.get("mixer_layers"))  # alpha, f: no effect on time
    kinds = len({same(cell) for cell in cells})
    bar = tqdm(total=kinds, desc="measuring", unit="kind")
    with tempfile.TemporaryDirectory() as folder, bar:
        for cell in cells:
            kind = same(cell)
            if kind not in known and shapes[cell.name]:
                batch = max(cell.flags.get("batch_size", 0), cell.flags.get("init_batch_size", 0))
                data = Path(folder, "-".join(map(str, (*shapes[cell.name], batch))))
                if not data.is_dir():
                    noise(data, *shapes[cell.name], batch)
                known[kind] = measure(cell, str(data), Path(folder, f"run{len(known)}"), device)
                bar.update()
            seconds[cell.name] = cell.flags["steps"] * known[kind] if kind in known else None
    return seconds
