"""What the baselines share: one stage of training that a stopped run goes on with, and the five alike scripts."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import EnvBase
from tqdm import tqdm

from comadice_bc import evaluation
from comadice_eval import try_eval_env
from environments.checks import check_positive, pick_device
from offline_data.replay import make_replay, minibatches
from support.report import report
from support.runs import (
    RunArgs,
    check_args,
    check_discount,
    eval_steps,
    finish_run,
    load_dataset,
    random_state,
    save_checkpoint,
    set_random_state,
    start_runs,
)
from support.seeds import Graph, adam


def check(args: RunArgs, *positive: str):
    """Raises BadInput for a flag out of its range; `positive` are those of this method that must be positive
    numbers."""
    check_args(args)
    check_positive(args, *positive)
    check_discount(args)


def training(
    algo: str,
    parts: dict,
    rows: TensorDict,
    keys: list,
    args: RunArgs,
    seed: int,
    card: dict,
    env: EnvBase | None,
    metrics: list[dict],
):
    """The run of a method that learns all it has in one stage. A generator of (batch of rows' `keys`, losses), one a
    step.

    The caller makes its update on the batch and puts what metrics.csv shall show into `losses` (name -> scalar tensor).
    `parts` are the modules and optimisers that a checkpoint holds, "policy" among them is the one that is evaluated. A
    stopped run goes on where it was; a finished one yields nothing. The rows of metrics.csv go to `metrics`.
    """
    run = start_runs(replace(args, seeds=[seed]), algo, card, rows, {})[seed]
    start, seconds, began = run.state["step"], run.state["seconds"], time.perf_counter() - run.state["wall"]
    metrics += run.metrics
    run.metrics = metrics  # one list: the caller's
    if run.finished:
        return
    if start:
        for name, part in parts.items():
            part.load_state_dict(run.state[name])
        set_random_state(run.state["random"])  # after the initialisations of the parts have drawn from it
    at, replay = eval_steps(args), make_replay(rows, keys, device=pick_device(args.device))
    clock = time.perf_counter()
    for step, batch in tqdm(
        minibatches(start, at, (replay, args.batch_size)),
        initial=start,
        total=args.steps,
        desc=f"{algo} seed {seed}",
        mininterval=1,
    ):
        losses = {}
        yield batch, losses
        if step in at:
            row = {"stage": "policy", "step": step} | {k: v.item() for k, v in losses.items()}
            seconds += time.perf_counter() - clock
            row |= evaluation(parts["policy"], env, args, seed)
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "seconds": seconds, "wall": time.perf_counter() - began, "random": random_state()}
            save_checkpoint(run, state, row)
            clock = time.perf_counter()
    finish_run(run, args, card, 1, args.steps, run.state["seconds"], run.state["wall"])


def train_seed(algo: str, networks: nn.Module, update: Callable, rows: TensorDict, keys: list, args: RunArgs, seed: int,
               card: dict, env: EnvBase | None) -> list[dict]:
    """One run directory; returns the rows of its metrics.csv. `train` says what the arguments are."""
    target = copy.deepcopy(networks)
    optimizer = adam(list(networks.parameters()), args.lr, pick_device(args.device))
    policy = getattr(networks, "policy", networks)  # BCQ's networks act themselves
    parts = {"policy": policy, "target": target, "optimizer": optimizer}
    if policy is not networks:
        parts["networks"] = networks
    step, metrics = Graph(lambda batch: update(networks, target, optimizer, batch, args), args.graph), []
    for batch, losses in training(algo, parts, rows, keys, args, seed, card, env, metrics):
        losses |= step(batch)
    return metrics


def train(
    algo: str,
    make_networks: Callable,
    update: Callable,
    keys: list,
    args: RunArgs,
    prepare: Callable = lambda rows: rows,
):
    """Trains a method for args.seeds, one after another, and reports.

    make_networks(card, args) gives all that it learns. update(networks, target, optimizer, batch, args) is one step on
    a batch of the rows' `keys`, and returns what metrics.csv shall show. prepare(rows) may add keys to the dataset's
    rows.
    """
    device = pick_device(args.device, args.tf32)
    rows, card = load_dataset(args, device)
    env, rows, curves = try_eval_env(card, args.eval_episodes, args.workers), prepare(rows), []
    for seed in args.seeds:
        torch.manual_seed(seed)
        networks = make_networks(card, args).to(device)
        curves.append(train_seed(algo, networks, update, rows, keys, args, seed, card, env))
    report({algo.upper(): curves}, card, args, f"learning_curve_{algo}.png")
