"""What the five baselines share: checks of their flags, training that can be stopped and resumed, and the script."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call
from torchrl.envs import EnvBase

from baselines.run_args import RunArgs
from comadice_bc import set_schedule
from comadice_eval import evaluation, try_eval_env
from environments.checks import BadInput, check_positive, pick_device
from offline_data.facts import mean_abs_reward
from offline_data.replay import episode_weights, make_replay
from support.presets import four_digits
from support.report import report
from support.runs import (
    Diverged,
    Run,
    check_args,
    check_discount,
    check_policy_stage,
    end_runs,
    finish_run,
    give_up,
    load_dataset,
    next_group,
    start_runs,
)
from support.seeds import Graph, adam, make_generators, make_stacked, per_seed, set_gradients, target_update
from support.stages import Evaluations, Stage

# The simulator clips continuous actions to [-1, 1]. So policies play clipped actions, and q is asked for these.
# Recorded actions are given to q unclipped, since the reward's cost of control is that of the unclipped action.
BOX = 1.0
# The entries of a row that all methods need.
KEYS = [("agents", "observation"), ("agents", "action"), ("agents", "action_mask"), "reward", "terminated"]


class Twins(nn.ModuleList):
    """Two networks of the same shape. Called like one of them, it returns both values, [2, ...]."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.stack([network(*inputs) for network in self])


class Method(NamedTuple):
    """What differs from one method to the next.

    A flag that is a temperature is given in units of the recorded reward. The losses multiply it by args.reward_scale.
    """

    name: str
    make_networks: Callable
    """(card, args) -> a module of all that is learned"""
    losses: Callable
    """(networks, target, batch, args) -> {name: value}. "loss" is minimised, the others are for metrics.csv. It is the
    sum of the values' loss, the policy's loss and so on. They share no trained parameter, as with one optimiser each"""
    keys: list
    """the entries of a row that the losses need"""
    prepare: Callable = lambda rows: rows
    """the dataset, its rewards already scaled -> the dataset, perhaps with more entries"""
    defaults: Callable = lambda card, unit: {}
    """(card, mean absolute reward) -> the values of flags that depend on the data"""
    noise: Callable | None = None
    """(card, args, B, generator) -> {name: [B, ...]}, the random numbers of an update with continuous actions. B comes
    first, as in all entries of a batch; the losses move the samples in front of it"""


def check(args: RunArgs, *positive: str):
    """Raises BadInput for a flag out of its range. `positive` names the method's flags that must be positive.

    They may also be None: then the data give their value.
    """
    check_args(args)
    check_policy_stage(args)
    check_positive(args, *(name for name in (*positive, "reward_scale") if getattr(args, name) is not None))
    if not 0 <= args.episode_alpha < 1e38:
        raise BadInput(f"--episode-alpha is {args.episode_alpha}: give 0 or a positive number below 1e38")
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


def frozen(module: nn.Module) -> Callable:
    """The module as a function whose parameters are constants: a gradient flows to its inputs alone."""
    constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return lambda *inputs: functional_call(module, constants, inputs)


def add_noise(batch: TensorDict, method: Method, card: dict, args: RunArgs, generators: list[torch.Generator]):
    """The batch [B] or [S, B] with the random numbers of one update under "noise", drawn by each seed's generator.

    They are drawn before the update and not inside. So each seed uses its own generator, under vmap too, and a CUDA
    graph reads new numbers at every replay.
    """
    if method.noise is None or card["discrete"]:
        return batch
    size = batch.batch_size[-1]
    drawn = [TensorDict(method.noise(card, args, size, generator), [size]) for generator in generators]
    batch = batch.copy()
    batch["noise"] = (torch.stack(drawn) if len(drawn) > 1 else drawn[0]).to(batch["reward"].device)
    return batch


def played(networks: nn.Module) -> nn.Module:
    """What is played: the policy, or all networks if the method's policy is implicit in q."""
    return getattr(networks, "policy", networks)


def make_update(networks, target, average, optimizer, average_step: Tensor, losses: Callable, args, n_seeds: int = 1):
    """One update as a function of a batch [B], or [S, B] for stacked networks of S seeds.

    It returns the values for metrics.csv. After Adam's step the target networks move towards the networks, and
    `average` towards the policy.
    """
    parameters = list(networks.parameters())
    losses_of = per_seed(lambda *inputs: losses(*inputs, args), [networks, target], n_seeds)
    update_target = target_update(target, networks, args.tau)
    update_average = target_update(average, played(networks), average_step)

    def update(batch: TensorDict) -> dict[str, Tensor]:
        values = losses_of(batch)
        set_gradients(values["loss"].sum(), parameters)
        optimizer.step()
        update_target()
        update_average()
        return {name: value.detach() for name, value in values.items() if name != "loss"}

    return update


def train_runs(
    method: Method, rows: TensorDict, args: RunArgs, runs: list[Run], card: dict, env: EnvBase | None,
    weights: Tensor | None,
):  # fmt: skip
    """Trains runs at the same step from their last checkpoints to their end.

    The T transitions are drawn in proportion to `weights` [T], or equally often for None.
    """
    device, seeds = pick_device(args.device), [run.seed for run in runs]
    networks, target = make_stacked(lambda: method.make_networks(card, args).to(device), seeds)
    average = copy.deepcopy(played(networks)).requires_grad_(False)
    optimizer, average_step = adam(list(networks.parameters()), args.lr, device), torch.ones((), device=device)
    generators = make_generators(seeds, 1, rows)
    parts = {"networks": networks, "target": target, "policy": average, "optimizer": optimizer}  # "policy" is played
    stage = Stage("training", method.name, args, runs, parts, generators)
    replay = make_replay(rows, method.keys, generators=generators, device=device, weights=weights)
    update = make_update(networks, target, average, optimizer, average_step, method.losses, args, len(seeds))
    update = Graph(update, args.graph)

    def play(seed: int, parameters: dict, row: dict) -> dict:
        player = played(method.make_networks(card, args))
        player.load_state_dict(parameters)
        return row | evaluation(player, env, args.eval_episodes, seed, row["step"])

    with Evaluations(stage, play) as evaluations:  # they run beside the updates
        for step, batch in stage.steps((replay, args.batch_size)):
            set_schedule(optimizer, average_step, step, args)
            values = update(add_noise(batch, method, card, args, generators))
            if step in stage.eval_steps:  # --evals times
                each = zip(*(value.reshape(-1).tolist() for value in values.values()))  # one tuple per seed
                evaluations.add([{"stage": "policy", "step": step} | dict(zip(values, own)) for own in each])
        evaluations.end()
    for run in runs:
        finish_run(run, args, card, len(runs))


def train(method: Method, args: RunArgs):
    """Trains a method for args.seeds, together where they are at the same step, and reports."""
    device = pick_device(args.device, args.tf32)
    rows, card = load_dataset(args, device, method.name)
    unit = mean_abs_reward(rows)
    own = method.defaults(card, unit)
    args = resolve(args, unit, own)
    print(f"{method.name}: {', '.join(f'{name} {getattr(args, name):g}' for name in ('tau', 'reward_scale', *own))}")
    env = try_eval_env(card, args.eval_episodes, args.workers)
    weights = episode_weights(rows, args.episode_alpha, "soft_chi2")
    rows = method.prepare(scaled(rows, args.reward_scale))
    runs = start_runs(args, method.name, card, rows, {})
    while group := next_group(runs):
        try:
            train_runs(method, rows, args, group, card, env, weights)
        except Diverged as error:
            give_up(runs, error)
    report({method.name.upper(): end_runs(runs)}, card, args, f"learning_curve_{method.name}.png")
