"""What the baselines share: one stage of training that a stopped run goes on with, and the five alike scripts."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import EnvBase

from comadice_bc import check_policy_stage, set_schedule
from comadice_eval import evaluation, try_eval_env
from environments import stops
from environments.checks import check_positive, pick_device
from offline_data.dataset import last_rows
from offline_data.replay import make_replay, minibatches
from support.bars import Bar
from support.report import report
from support.runs import (
    LOOK,
    Diverged,
    Run,
    check_args,
    check_discount,
    check_parameters,
    end_runs,
    eval_steps,
    finish_run,
    give_up,
    load_dataset,
    random_state,
    save_checkpoint,
    set_random_state,
    start_runs,
)
from support.seeds import Graph, adam, load_part, update_target


@dataclass
class RunArgs:
    """The flags that all baselines have."""

    env: str | None = None
    """simulator: mamujoco, smacv2, smacv1, smax (default mamujoco, or what --data holds)"""
    task: str | None = None
    """task of that simulator (default hopper or zerg_5_vs_5, or what --data holds)"""
    quality: str | None = None
    """quality of the dataset (default medium-replay, of battles medium, or what --data holds)"""
    data: str | None = None
    """a dataset directory, instead of data/ENV/TASK/QUALITY"""
    out: str = "runs"
    """run directories go to OUT/ENV/TASK/QUALITY/ALGO/seedN"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """one run for each seed, one after another"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    data_device: Literal["auto", "cpu", "device"] = "auto"
    """where the dataset lies: with the CPU, on --device, or (auto) there if it fits; a resumed run keeps its place"""
    tf32: bool = False
    """on a GPU: matrix products in TF32, faster and less exact"""
    graph: bool = True
    """on a GPU: replay the update as a CUDA graph"""
    quiet: bool = False
    """no progress bars"""
    logger: Literal["none", "csv", "tensorboard", "wandb"] = "none"
    """also keep the rows of metrics.csv for csv, tensorboard or wandb, offline (support/loggers.py)"""
    resume: bool = False
    """go on with runs that were stopped, leave finished ones as they are, extend them with more --steps"""
    overwrite: bool = False
    """replace runs that are already there"""

    steps: int = 200_000
    """gradient steps (of each stage, where there are two)"""
    lr: float = 1e-3
    """Adam's learning rate"""
    lr_decay: bool = True
    """let the learning rate fall linearly to 0, as in comadice_bc.py"""
    ema: float = 0.999
    """decay of the average of the policy's weights, which is what is played, as in comadice_bc.py; 0: no average"""
    gamma: float = 0.99
    """discount (Table 4)"""
    tau: float = 0.05
    """step of the target networks towards the networks, ComaDICE's default (the authors of all five: 0.005)"""
    reward_scale: float | None = None
    """rewards are multiplied by it first (default: 0.2 / mean absolute reward, as in comadice_train.py)"""
    layer_norm: bool = True
    """LayerNorm in q and v, as in comadice_train.py"""
    batch_size: int = 128
    """transitions in a batch (Table 4)"""
    hidden: int = 256
    """hidden units of the local networks (Table 4)"""
    evals: int = 100
    """evaluations over the training of the policy (Table 4)"""
    eval_episodes: int = 32
    """episodes an evaluation (Table 4)"""
    workers: int = 1
    """processes that simulate evaluation episodes"""


def check(args: RunArgs, *positive: str):
    """Raises BadInput for a flag out of its range; `positive` are those of this method that must be positive
    numbers, or None where the data give them."""
    check_args(args)
    check_policy_stage(args)
    check_positive(args, *(name for name in (*positive, "reward_scale") if getattr(args, name) is not None))
    check_discount(args)


def resolve(args: RunArgs, mean_abs_reward: float, defaults: dict[str, float]) -> RunArgs:
    """Fills in --reward-scale, and the method's own `defaults` of flags that depend on the data, where not given."""
    own = {"reward_scale": 0.2 / mean_abs_reward} | defaults
    # Four digits, so that it does not depend on the order in which a machine adds up.
    return replace(args, **{name: float(f"{x:.4g}") for name, x in own.items() if getattr(args, name) is None})


def scaled(rows: TensorDict, scale: float) -> TensorDict:
    """The dataset with its rewards multiplied by `scale`."""
    rows = rows.clone(recurse=False).unlock_()
    rows["reward"] = scale * rows["reward"]
    return rows.lock_()


def train_seed(algo: str, networks: nn.Module, update: Callable, rows: TensorDict, keys: list, args: RunArgs, run: Run,
               card: dict, env: EnvBase | None):
    """One run, from where it is to its end, in one stage. `train` explains the arguments."""
    seed = run.seed
    device = pick_device(args.device)
    target, optimizer = copy.deepcopy(networks), adam(list(networks.parameters()), args.lr, device)
    policy = getattr(networks, "policy", networks)  # BCQ's networks act themselves
    average, weight = copy.deepcopy(policy), torch.ones((), device=device)
    parts = {"policy": average, "networks": networks, "target": target, "optimizer": optimizer}  # "policy" is played
    start, seconds, began = run.state["step"], run.state["seconds"], time.perf_counter() - run.state["wall"]
    step = start
    if start:
        for name, part in parts.items():
            load_part(part, run.state[name])
        set_random_state(run.state["random"])  # after the initialisations of the parts have drawn from it

    def step_of(batch: TensorDict) -> dict:
        metrics = update(networks, target, optimizer, batch, args)
        update_target(average, policy, weight)
        return metrics

    def progress() -> dict:
        check_parameters(networks, [seed], f"step {step}")
        state = {name: part.state_dict() for name, part in parts.items()}
        return state | {"step": step, "seconds": seconds, "random": random_state(), "unplayed": []}

    def evaluate(state: dict, row: dict):
        """Adds the evaluation to the row, and saves. What a stop cuts short is left for the run that goes on."""
        try:
            row = row | evaluation(average, env, args.eval_episodes, seed, row["step"])
        except stops.Stopped:
            save_checkpoint(run, state | {"unplayed": [row]}, None)
            raise
        bar.say([row])
        save_checkpoint(run, state | {"wall": time.perf_counter() - began}, row)

    graph, at = Graph(step_of, args.graph), eval_steps(args)
    bar = Bar(f"{algo} seed {seed}", args.steps, start, args.quiet)
    for row in run.state.get("unplayed", []):
        evaluate({"unplayed": []}, row)
    batches = minibatches(start, at, (make_replay(rows, keys, device=device), args.batch_size))
    clock = time.perf_counter()
    for step, batch in bar(batches):
        set_schedule(optimizer, weight, step, args)
        metrics = graph(batch)
        if step in at:
            row = {"stage": "policy", "step": step} | {name: value.item() for name, value in metrics.items()}
            seconds += time.perf_counter() - clock
            evaluate(progress(), row)
            clock = time.perf_counter()
        elif step % LOOK == 0:
            check_parameters(networks, [seed], f"step {step}")
    if step < args.steps:  # a stop was asked for
        if step > start:
            seconds += time.perf_counter() - clock
            save_checkpoint(run, progress() | {"wall": time.perf_counter() - began}, None)
        stops.leave()
    finish_run(run, args, card, 1, args.steps, run.state["seconds"], run.state["wall"])


def train(
    algo: str,
    make_networks: Callable,
    update: Callable,
    keys: list,
    args: RunArgs,
    prepare: Callable = lambda rows: rows,
    defaults: Callable = lambda card, unit: {},
):
    """Trains a method for args.seeds, one after another, and reports.

    make_networks(card, args) gives all that it learns. update(networks, target, optimizer, batch, args) is one step on
    a batch of the rows' `keys`, and returns what metrics.csv shall show. prepare(rows) may add keys to the dataset's
    rows. defaults(card, unit) are values of flags that depend on the data, whose mean absolute reward is `unit`.
    Rewards are scaled before all that, temperatures are flags in units of the recorded reward, as ComaDICE's alpha is.
    """
    device = pick_device(args.device, args.tf32)
    rows, card = load_dataset(args, device, algo)
    unit = rows["reward"][~last_rows(rows)].double().abs().mean().item() or 1.0
    own = defaults(card, unit)
    args = resolve(args, unit, own)
    print(f"{algo}: {', '.join(f'{name} {getattr(args, name):g}' for name in ('tau', 'reward_scale', *own))}")
    env = try_eval_env(card, args.eval_episodes, args.workers)
    rows = prepare(scaled(rows, args.reward_scale))
    runs = start_runs(args, algo, card, rows, {})
    for seed, run in runs.items():
        if run.finished:
            continue
        torch.manual_seed(seed)
        networks = make_networks(card, args).to(device)
        try:
            train_seed(algo, networks, update, rows, keys, args, run, card, env)
        except Diverged as error:
            give_up(runs, error)
    report({algo.upper(): end_runs(runs)}, card, args, f"learning_curve_{algo}.png")
