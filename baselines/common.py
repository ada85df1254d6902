"""What the five baselines share: checks of their flags, training that can be stopped and resumed, and the script."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import EnvBase

from baselines.run_args import RunArgs
from comadice_bc import set_schedule
from comadice_eval import evaluation, try_eval_env
from environments import stops
from environments.checks import check_positive, pick_device
from offline_data.facts import mean_abs_reward
from offline_data.replay import make_replay, minibatches
from support.bars import Bar
from support.presets import four_digits
from support.report import report
from support.runs import (
    LOOK,
    Diverged,
    Run,
    check_args,
    check_discount,
    check_parameters,
    check_policy_stage,
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
from support.seeds import Graph, adam, load_part, target_update


def check(args: RunArgs, *positive: str):
    """Raises BadInput for a flag out of its range. `positive` names the method's flags that must be positive.

    They may also be None: then the data give their value.
    """
    check_args(args)
    check_policy_stage(args)
    check_positive(args, *(name for name in (*positive, "reward_scale") if getattr(args, name) is not None))
    check_discount(args)


def resolve(args: RunArgs, mean_abs_reward: float, defaults: dict[str, float]) -> RunArgs:
    """Fills in --reward-scale and the flags in `defaults`, which depend on the data, if they were not given."""
    own = {"reward_scale": 0.2 / mean_abs_reward} | defaults
    return replace(args, **{name: four_digits(x) for name, x in own.items() if getattr(args, name) is None})


def scaled(rows: TensorDict, scale: float) -> TensorDict:
    """The dataset with its rewards multiplied by `scale`."""
    rows = rows.clone(recurse=False).unlock_()
    rows["reward"] = scale * rows["reward"]
    return rows.lock_()


def train_seed(
    algo: str, networks: nn.Module, update: Callable, rows: TensorDict, keys: list, args: RunArgs, run: Run, card: dict,
    env: EnvBase | None,
):  # fmt: skip
    """Trains one run from its last checkpoint to its end. `train` explains the arguments."""
    seed = run.seed
    device = pick_device(args.device)
    target, optimizer = copy.deepcopy(networks), adam(list(networks.parameters()), args.lr, device)
    policy = getattr(networks, "policy", networks)  # BCQ has no separate policy
    average, weight = copy.deepcopy(policy), torch.ones((), device=device)
    parts = {"policy": average, "networks": networks, "target": target, "optimizer": optimizer}  # "policy" is played
    start, seconds, began = run.state["step"], run.state["seconds"], time.perf_counter() - run.state["wall"]
    step = start
    if start:
        for name, part in parts.items():
            load_part(part, run.state[name])
        set_random_state(run.state["random"])  # last, since making the parts drew random numbers

    update_target, update_average = target_update(target, networks, args.tau), target_update(average, policy, weight)

    def step_of(batch: TensorDict) -> dict:
        metrics = update(networks, target, optimizer, batch, args)
        update_target()
        update_average()
        return metrics

    def progress() -> dict:
        check_parameters(networks, [seed], f"step {step}")
        state = {name: part.state_dict() for name, part in parts.items()}
        return state | {"step": step, "seconds": seconds, "random": random_state(), "unplayed": []}

    def evaluate(state: dict, row: dict):
        """Adds the evaluation's results to the row, and saves. If a stop cuts it short, the resumed run repeats it."""
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
    if step < args.steps:  # after a stop was asked for
        if step > start:
            seconds += time.perf_counter() - clock
            save_checkpoint(run, progress() | {"wall": time.perf_counter() - began}, None)
        stops.leave()
    finish_run(run, args, card, 1)


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

    make_networks(card, args) makes all that is learned. update(networks, target, optimizer, batch, args) is one step on
    a batch of the rows' `keys`. It returns values for metrics.csv. train_seed moves the target networks after it.
    prepare(rows) may add keys to the dataset's rows, whose rewards are scaled before. defaults(card, unit) gives the
    values of flags that depend on the data; `unit` is their mean absolute reward. Flags for temperatures are in units
    of the recorded reward, as ComaDICE's alpha is.
    """
    device = pick_device(args.device, args.tf32)
    rows, card = load_dataset(args, device, algo)
    unit = mean_abs_reward(rows)
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
