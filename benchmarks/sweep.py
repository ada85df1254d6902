"""The grid objective x advantage x alpha x seed on one dataset, each objective's members trained as one batched
computation.

    python -m benchmarks.sweep --data data/mamujoco/hopper/medium-replay --steps 20000 --out sweep.csv

Every member is what `python comadice_train.py` with its flags and seed trains, but for the batches drawn, which depend
there on when a run is evaluated, and for the mixer's first weights where w* is read both ways: then all critics have a
q. The ratio between episodes is off: what is compared is w*. Of the --train flags, alpha, objective, advantage and
those of every script but lr, hidden and batch_size have no effect here. Plain BC is a member too, once per --bc-lr. A
member's score is the mean return over its last evaluations, since a policy's return swings from one checkpoint to the
next. On a GPU the update is one CUDA graph, while the evaluations run in processes beside it.
"""

import csv
import math
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Literal

import environments.threads  # noqa: F401 -- before torch

# isort: split
import torch
import tyro
from tensordict import TensorDict
from tqdm import tqdm

import comadice_train
from comadice_bc import POLICY_KEYS, make_policy_update, ratio_stats, set_schedule, with_ratios
from comadice_eval import eval_env, evaluation
from comadice_mixer import make_policy
from environments.checks import BadInput, pick_device, run_script
from offline_data.dataset import open_dataset
from offline_data.facts import data_facts, mean_abs_reward
from offline_data.replay import initial_rows, make_replay, minibatches
from support.presets import OBJECTIVES
from support.seeds import Graph, adam, make_generators, seed_states, stack


@dataclass
class Args:
    data: str
    """dataset directory"""
    out: str = "sweep.csv"
    """a row a member"""
    objectives: list[comadice_train.Objective] = field(default_factory=lambda: list(OBJECTIVES))
    """objectives to try"""
    advantages: list[Literal["td", "q"]] = field(default_factory=lambda: ["td", "q"])
    """what w* is extracted from (`printed` and `released_nu` have q alone)"""
    alphas: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0])
    """values of alpha"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """seeds of each cell"""
    bc_lrs: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3])
    """learning rates of plain BC"""
    steps: int = 20_000
    """gradient steps of each stage"""
    last: int = 10
    """evaluations, spread over the last fifth of the policy's training"""
    episodes: int = 32
    """episodes an evaluation"""
    processes: int = 2
    """processes that simulate"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    train: comadice_train.Args = field(default_factory=comadice_train.Args)
    """the other arguments of comadice_train.py"""


def resolved(train: comadice_train.Args, rows: TensorDict) -> comadice_train.Args:
    """The flags of comadice_train.py as it fills them in; alpha is each member's own."""
    return comadice_train.resolve(replace(train, alpha=None), mean_abs_reward(rows))


def train_critics(objective: str, rows: TensorDict, card: dict, args: Args) -> list[tuple[dict, torch.Tensor]]:
    """Lines 3-8 for alphas x seeds at once.

    Returns (name of the cell and seed, w* of all transitions) of each member and advantage.
    """
    advantages = args.advantages if objective in ("semi", "exact") else ["q"]
    with_q = "q" if "q" in advantages else "td"
    train = resolved(replace(args.train, objective=objective, advantage=with_q), rows)
    members = [(alpha, seed) for alpha in args.alphas for seed in args.seeds]
    device, each = rows["state"].device, []
    for _, seed in members:
        torch.manual_seed(seed)
        each.append(comadice_train.make_critics(card, train).to(device))
    critics, target = stack(each), stack(deepcopy(each))
    alpha = torch.tensor([a * train.reward_scale for a, _ in members], device=device).reshape(critics.lam.shape)
    optimizer, data = comadice_train.make_optimizer(critics, train), data_facts(rows, train)
    update = Graph(comadice_train.make_critic_update(critics, target, optimizer, train, data, alpha))
    generators = make_generators([seed for _, seed in members], 1, rows)
    replay = make_replay(rows, comadice_train.CRITIC_KEYS, True, generators)
    initial = make_replay(rows, comadice_train.INIT_KEYS, False, generators, first=initial_rows(rows))
    batches = minibatches(0, {args.steps}, (replay, train.batch_size), (initial, train.init_batch_size))
    for _, batch, init in tqdm(batches, total=args.steps, desc=f"{objective}: {len(members)} critics", mininterval=2):
        update(batch, init)
    results, model, first = [], each[0], rows[initial_rows(rows)[:1000]]
    for (a, seed), state in zip(members, seed_states({"target": target}, generators)):
        model.load_state_dict(state["target"])
        for advantage in advantages:
            w = comadice_train.dataset_ratio(model, rows, replace(train, alpha=a, advantage=advantage), data)
            with torch.no_grad():
                nu_init = (
                    model.mixer(model.nu(first["agents", "observation"]), first["state"]).mean().item()
                    / train.reward_scale
                )
            results.append(
                (
                    {
                        "objective": objective,
                        "advantage": advantage,
                        "alpha": a,
                        "seed": seed,
                        "lr": train.lr,
                        "nu_init": nu_init,
                    },
                    w,
                )
            )
    return results


def train_policies(
    members: list[tuple[dict, torch.Tensor]], rows: TensorDict, card: dict, args: Args, pool
) -> list[dict]:
    """Lines 9-12 for members of one learning rate at once. Returns a row each."""
    device, each = rows["state"].device, []
    for name, _ in members:
        torch.manual_seed(name["seed"])
        each.append(
            make_policy(card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], args.train.hidden).to(
                device
            )
        )
    policy, average = stack(each), stack(deepcopy(each))
    # A ratio that is zero or not finite trains nothing, and comadice_train.py refuses it: its member is trained on 1
    # and not played.
    finite = [bool(torch.isfinite(w).all()) and bool(w.mean() > 0) for _, w in members]
    weighted = with_ratios(rows, {m: members[m][1] if ok else None for m, ok in enumerate(finite)})
    generators = make_generators([name["seed"] for name, _ in members], 2, rows)
    train = replace(resolved(args.train, rows), lr=members[0][0]["lr"], steps=args.steps)
    optimizer, weight = adam(list(policy.parameters()), train.lr, device), torch.ones((), device=device)
    update = Graph(make_policy_update(policy, average, optimizer, weight, len(members)))
    at = {args.steps - round(i * args.steps / 5 / args.last) for i in range(args.last)}
    jobs = []
    batches = minibatches(
        0, {args.steps}, (make_replay(weighted, POLICY_KEYS, False, generators), args.train.batch_size)
    )
    for step, batch in tqdm(batches, total=args.steps, desc=f"{len(members)} policies", mininterval=2):
        set_schedule(optimizer, weight, step, train)
        update(batch)
        if step in at:
            states = seed_states({"policy": average}, generators)
            parameters = [{k: v.cpu() for k, v in state["policy"].items()} for state in states]
            each = [(p, name["seed"]) for p, (name, _) in zip(parameters, members)]
            jobs.append([pool.submit(play, card, p, train.hidden, args.episodes, seed, step) for p, seed in each])
    table = []
    for m, (name, w) in enumerate(tqdm(members, desc="evaluations", mininterval=2)):
        played = torch.tensor([job[m].result() if finite[m] else (math.nan, math.nan) for job in jobs])
        (score, winrate), spread = played.mean(0).tolist(), played[:, 0].std(correction=min(1, args.last - 1)).item()
        table.append(name | {"return": score, "winrate": winrate, "std_over_evaluations": spread, **ratio_stats(w)})
    return table


ENVS = {}


def play(card: dict, parameters: dict, hidden: int, episodes: int, seed: int, step: int) -> tuple[float, float]:
    """A policy's mean return and its winrate in percent (nan where there are no battles); runs in a worker process."""
    torch.set_num_threads(1)
    if not ENVS:
        ENVS["env"] = eval_env(card, episodes)
    policy = make_policy(card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], hidden)
    policy.load_state_dict(parameters)
    result = evaluation(policy, ENVS["env"], episodes, seed, step)
    return result["return"], math.nan if result["winrate"] is None else 100 * result["winrate"]


def main(args: Args):
    if args.steps < 5 * args.last:
        raise BadInput(
            f"--steps {args.steps} has no {args.last} evaluations in its last fifth: give at least {5 * args.last}"
        )
    device = pick_device(args.device)
    rows, card = open_dataset(args.data)
    if device.type == "cuda":
        rows = rows.to(device)
    table, began = [], time.time()
    with ProcessPoolExecutor(args.processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        members = [
            (
                {"objective": "bc", "advantage": "", "alpha": "", "seed": seed, "lr": lr, "nu_init": math.nan},
                torch.ones(card["samples"], device=device),
            )
            for lr in args.bc_lrs
            for seed in args.seeds
        ]
        for objective in args.objectives:
            members += train_critics(objective, rows, card, args)
        for lr in dict.fromkeys(name["lr"] for name, _ in members):
            table += train_policies([m for m in members if m[0]["lr"] == lr], rows, card, args, pool)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print(
        f"\n{card['env']} {card['task']} {card['quality']}: behaviour {card['return_mean']:.4g}, {args.steps} steps a "
        "stage, "
        f"{time.time() - began:.0f} s on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device}"
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
    run_script(main, tyro.cli(Args))
