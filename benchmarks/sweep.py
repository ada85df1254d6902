"""The grid objective x advantage x alpha x seed on one dataset. Each objective is trained as one batched computation.

    python -m benchmarks.sweep --data data/mamujoco/hopper/medium-replay --steps 20000 --out sweep.csv

Every member of the grid is what `python comadice_train.py` trains with its flags and seed, with three exceptions. The
batches differ, since in comadice_train.py they depend on the steps of evaluations. If w* is computed both ways, all
critics have a q, so the mixer's first weights differ. And semi's q has the values of td, and a residual of 0. The ratio
between episodes is off, since w* is what is compared.
Of the --train flags, these have no effect here: objective, advantage, residual, alpha, episode_alpha, neighbours,
critic_lr_decay, steps, and those of the groups Task and Run, except compile. Plain BC is a member too, once per
--bc-lr. A member's score is the mean return of its last evaluations, since single ones are noisy. On a GPU the update
is one CUDA graph, and the evaluations run in processes beside it.
"""

import csv
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import environments.cpu  # noqa: F401 -- before torch

# isort: split
import torch
import tyro
from tensordict import TensorDict
from tqdm import tqdm

import comadice_train
from comadice_bc import POLICY_KEYS, make_policy_update, ratio_stats, set_schedule, with_ratios
from comadice_eval import eval_env, evaluation
from comadice_mixer import make_policy
from environments.checks import BadInput, check_positive, pick_device, run_script
from offline_data.dataset import open_dataset
from offline_data.durable import check_new
from offline_data.facts import data_facts, mean_abs_reward
from offline_data.replay import initial_rows, make_replay, minibatches
from support.flags import program
from support.presets import OBJECTIVES
from support.runs import check_seeds
from support.seeds import Graph, adam, make_generators, make_stacked, seed_states


@dataclass
class Args:
    data: str
    """dataset directory"""
    out: str = "sweep.csv"
    """CSV file to write, one row per member"""
    objectives: list[comadice_train.Objective] = field(default_factory=lambda: list(OBJECTIVES))
    """objectives to try"""
    advantages: list[Literal["td", "q"]] = field(default_factory=lambda: ["td", "q"])
    """what w* is computed from (`printed` and `released_nu` always use q)"""
    alphas: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0])
    """values of alpha"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """seeds of each setting"""
    bc_lrs: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3])
    """learning rates of plain BC"""
    steps: int = 20_000
    """gradient steps of each stage"""
    last: int = 10
    """evaluations, spread over the last fifth of the policy's training"""
    episodes: int = 32
    """episodes per evaluation"""
    processes: int = 2
    """number of processes that simulate"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    train: comadice_train.Args = field(default_factory=comadice_train.Args)
    """the other arguments of comadice_train.py"""


def resolved(train: comadice_train.Args, rows: TensorDict) -> comadice_train.Args:
    """The flags of comadice_train.py, filled in as there. alpha is set for each member."""
    return comadice_train.resolve(replace(train, alpha=None), mean_abs_reward(rows))


def train_critics(objective: str, rows: TensorDict, card: dict, args: Args) -> list[tuple[dict, torch.Tensor]]:
    """Lines 3 to 8 for alphas x seeds at once.

    Returns (the member's setting and seed, w* of all transitions) for each member and advantage.
    """
    both = objective in ("semi", "exact")
    advantages = args.advantages if both else ["q"]
    # --advantage q of semi brings values of its own. Here it has those of td, since the two ways are compared.
    train = resolved(replace(args.train, objective=objective, advantage="td" if both else "q"), rows)
    train = replace(train, advantage="q" if "q" in advantages else "td", residual=0.0)
    members = [(alpha, seed) for alpha in args.alphas for seed in args.seeds]
    device, seeds = rows["state"].device, [seed for _, seed in members]
    critics, target = make_stacked(lambda: comadice_train.make_critics(card, train).to(device), seeds)
    alpha = torch.tensor([a * train.reward_scale for a, _ in members], device=device).reshape(critics.lam.shape)
    optimizer, data = comadice_train.make_optimizer(critics, train), data_facts(rows, train)
    update = Graph(comadice_train.make_critic_update(critics, target, optimizer, train, data, alpha))
    generators = make_generators(seeds, 1, rows)
    replay = make_replay(rows, comadice_train.CRITIC_KEYS, generators=generators)
    starts = {"pairs": False, "drawn_from": initial_rows(rows), "generators": generators}
    initial = make_replay(rows, comadice_train.INIT_KEYS, **starts)
    sources = [(replay, train.batch_size), (initial, train.init_batch_size)]
    sources += [(replay, train.batch_size)] * comadice_train.draws_for_q(train)
    batches = minibatches(0, {args.steps}, *sources)
    for _, *drawn in tqdm(batches, total=args.steps, desc=f"{objective}: {len(members)} critics", mininterval=2):
        update(*drawn)
    model, first, results = comadice_train.make_critics(card, train).to(device), rows[initial_rows(rows)[:1000]], []
    for (a, seed), state in zip(members, seed_states({"target": target}, generators)):
        model.load_state_dict(state["target"])
        for advantage in advantages:
            w = comadice_train.dataset_ratio(model, rows, replace(train, alpha=a, advantage=advantage), data)
            with torch.no_grad():
                nu_init = comadice_train.nu_tot(model, first).mean().item() / train.reward_scale
            name = {"objective": objective, "advantage": advantage, "alpha": a, "seed": seed}
            results.append((name | {"lr": train.lr, "nu_init": nu_init}, w))
    return results


def play(card: dict, sizes: tuple, parameters: dict, episodes: int, seed: int, step: int) -> tuple[float, float]:
    """A policy's mean return and its winrate in percent (nan if there are no battles). Runs in a worker process."""
    torch.set_num_threads(1)
    if not ENVS:
        ENVS["env"] = eval_env(card, episodes)
    policy = make_policy(*sizes)
    policy.load_state_dict(parameters)
    result = evaluation(policy, ENVS["env"], episodes, seed, step)
    return result["return"], math.nan if result["winrate"] is None else 100 * result["winrate"]


def train_policies(
    members: list[tuple[dict, torch.Tensor]], rows: TensorDict, card: dict, args: Args, pool
) -> list[dict]:
    """Lines 9 to 12 for members with the same learning rate at once. Returns one row per member."""
    device, seeds = rows["state"].device, [name["seed"] for name, _ in members]
    # These three belong to the critics. Some of their values contradict the default objective.
    train = resolved(replace(args.train, objective=None, advantage=None, lambda_scale=None), rows)
    train = replace(train, lr=members[0][0]["lr"], steps=args.steps)
    sizes = card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], train.hidden, train.action_scale
    policy, average = make_stacked(lambda: make_policy(*sizes).to(device), seeds)
    # comadice_train.py refuses a ratio that is zero everywhere or not finite. Here such a member is trained with w = 1,
    # and not played.
    finite = [bool(torch.isfinite(w).all()) and bool(w.mean() > 0) for _, w in members]
    weighted = with_ratios(rows, {m: members[m][1] if ok else None for m, ok in enumerate(finite)})
    generators = make_generators(seeds, 2, rows)
    optimizer, weight = adam(list(policy.parameters()), train.lr, device), torch.ones((), device=device)
    update = Graph(make_policy_update(policy, average, optimizer, weight, len(members), args.train.compile))
    at = {args.steps - round(i * args.steps / 5 / args.last) for i in range(args.last)}
    jobs = []
    replay = make_replay(weighted, POLICY_KEYS, pairs=False, generators=generators)
    batches = minibatches(0, {args.steps}, (replay, args.train.batch_size))
    for step, batch in tqdm(batches, total=args.steps, desc=f"{len(members)} policies", mininterval=2):
        set_schedule(optimizer, weight, step, train)
        update(batch)
        if step in at:
            states = seed_states({"policy": average}, generators)
            parameters = [{k: v.cpu() for k, v in state["policy"].items()} for state in states]
            each = [(p, name["seed"]) for p, (name, _) in zip(parameters, members)]
            jobs.append([pool.submit(play, card, sizes, p, args.episodes, seed, step) for p, seed in each])
    table = []
    for m, (name, w) in enumerate(tqdm(members, desc="evaluations", mininterval=2)):
        played = torch.tensor([job[m].result() if finite[m] else (math.nan, math.nan) for job in jobs])
        (score, winrate), spread = played.mean(0).tolist(), played[:, 0].std(correction=min(1, args.last - 1)).item()
        table.append(name | {"return": score, "winrate": winrate, "std_over_evaluations": spread, **ratio_stats(w)})
    return table


ENVS = {}


def main(args: Args):
    check_positive(args, "last", "episodes", "processes")
    if min(args.alphas, default=0) <= 0:
        raise BadInput("--alphas must be positive")
    check_seeds(args.seeds)
    if args.steps < 5 * args.last:
        raise BadInput(
            f"--steps {args.steps} is too small for {args.last} evaluations in its last fifth: give at least "
            f"{5 * args.last}"
        )
    check_new("--out", args.out)
    device = pick_device(args.device)
    rows, card = open_dataset(args.data)
    if device.type == "cuda":
        rows = rows.to(device)
    table, began = [], time.time()
    with ProcessPoolExecutor(args.processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        bc, uniform = {"objective": "bc", "advantage": "", "alpha": ""}, torch.ones(card["samples"], device=device)
        rates = [(lr, seed) for lr in args.bc_lrs for seed in args.seeds]
        members = [(bc | {"seed": seed, "lr": lr, "nu_init": math.nan}, uniform) for lr, seed in rates]
        for objective in args.objectives:
            members += train_critics(objective, rows, card, args)
        for lr in dict.fromkeys(name["lr"] for name, _ in members):
            table += train_policies([m for m in members if m[0]["lr"] == lr], rows, card, args, pool)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print(
        f"\n{card['env']} {card['task']} {card['quality']}: behaviour {card['return_mean']:.4g}, {args.steps} steps "
        f"per stage, {time.time() - began:.0f} s on "
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device}"
    )
    battles = card["discrete"]
    print(
        f"| objective | w* from | alpha | lr | return |{' won % |' * battles} E[w] | w = 0 | ess | nu_tot(s0) "
        f"|\n|{'---|' * (9 + battles)}"
    )
    cells = {}
    for row in table:
        cells.setdefault((row["objective"], row["advantage"], row["alpha"], row["lr"]), []).append(row)
    for key, runs in cells.items():
        score = lambda key, runs=runs: torch.tensor([r[key] for r in runs])
        spread = lambda key, runs=runs: torch.tensor([r[key] for r in runs]).std(correction=min(1, len(runs) - 1))
        won = f" {score('winrate').mean():.1f} ± {spread('winrate'):.1f} |" * battles
        w, zero, ess, nu = (sum(r[k] for r in runs) / len(runs) for k in ("mean_w", "w_zero", "ess", "nu_init"))
        returns = f"{score('return').mean():.4g} ± {spread('return'):.3g}"
        print(f"| {' | '.join(map(str, key))} | {returns} |{won} {w:.3g} | {zero:.2f} | {ess:.3f} | {nu:.3g} |")


if __name__ == "__main__":
    run_script(main, tyro.cli(Args, prog=program()))
