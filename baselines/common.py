"""What the five baselines share: checks of their flags, training that can be stopped and resumed, and the script."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call
from torchrl.envs import EnvBase

from baselines.run_args import RunArgs
from comadice_bc import set_schedule
from comadice_eval import evaluation, try_eval_env
from environments.checks import check_positive, pick_device
from offline_data.facts import mean_abs_reward
from offline_data.replay import make_replay
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
from support.seeds import (
    Graph,
    adam,
    make_generators,
    make_stacked,
    per_seed,
    set_gradients,
    split_seeds,
    target_update,
)
from support.stages import Evaluations, Stage

BOX = 1.0  # the simulator clips continuous actions to [-1, 1], so recorded actions are clipped too


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


def frozen(module: nn.Module) -> Callable:
    """The module as a function whose parameters are constants: a gradient flows to its inputs alone."""
    constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return lambda *inputs: functional_call(module, constants, inputs)


def add_noise(batch: TensorDict, noise: Callable, card: dict, args: RunArgs, generators: list[torch.Generator]):
    """The batch [B] or [S, B] with the random numbers of one update under "noise", drawn by each seed's generator.

    So a seed draws the same numbers alone and with others, and a CUDA graph gets new ones at every replay.
    """
    size = batch.batch_size[-1]
    drawn = [TensorDict(noise(card, args, size, generator), [size]) for generator in generators]
    batch = batch.copy()
    batch["noise"] = (torch.stack(drawn) if len(drawn) > 1 else drawn[0]).to(batch["reward"].device)
    return batch


def make_update(networks: nn.Module, target: nn.Module, average: nn.Module, optimizer, average_step: Tensor,
                losses: Callable, args: RunArgs, seeds: int = 1):  # fmt: skip
    """One step as a function of a batch [B], or [S, B] for stacked networks of S seeds. It returns
    what `losses` does, but for "loss".

    After Adam's step the target networks and the average of the policy move towards the networks.
    """
    parameters = list(networks.parameters())
    losses_of = per_seed(lambda *inputs: losses(*inputs, args), [networks, target], seeds)
    update_target = target_update(target, networks, args.tau)
    update_average = target_update(average, getattr(networks, "policy", networks), average_step)

    def update(batch: TensorDict) -> dict[str, Tensor]:
        values = losses_of(batch)
        set_gradients(values["loss"].sum(), parameters)
        optimizer.step()
        update_target()
        update_average()
        return {name: value.detach() for name, value in values.items() if name != "loss"}

    return update


def train_runs(
    algo: str, make_networks: Callable, losses: Callable, noise: Callable | None, rows: TensorDict, keys: list,
    args: RunArgs, runs: list[Run], card: dict, env: EnvBase | None,
):  # fmt: skip
    """Trains runs at the same step from their last checkpoints to their end. `train` explains the arguments."""
    device, seeds = pick_device(args.device), [run.seed for run in runs]
    policy_of = lambda networks: getattr(networks, "policy", networks)  # without one, it plays its q
    networks, target = make_stacked(lambda: make_networks(card, args).to(device), seeds)
    average = copy.deepcopy(policy_of(networks)).requires_grad_(False)
    optimizer, average_step = adam(list(networks.parameters()), args.lr, device), torch.ones((), device=device)
    generators = make_generators(seeds, 1, rows)
    parts = {"networks": networks, "target": target, "policy": average, "optimizer": optimizer}  # "policy" is played
    stage = Stage("training", algo, args, runs, parts, generators)
    replay = make_replay(rows, keys, generators=generators, device=device)
    update = make_update(networks, target, average, optimizer, average_step, losses, args, len(seeds))
    update = Graph(update, args.graph)

    def play(seed: int, parameters: dict, row: dict) -> dict:
        player = policy_of(make_networks(card, args))
        player.load_state_dict(parameters)
        return row | evaluation(player, env, args.eval_episodes, seed, row["step"])

    with Evaluations(stage, play) as evaluations:  # they run beside the updates
        for step, batch in stage.steps((replay, args.batch_size)):
            set_schedule(optimizer, average_step, step, args)
            if noise is not None and not card["discrete"]:
                batch = add_noise(batch, noise, card, args, generators)
            values = update(batch)
            if step in stage.at:  # --evals times
                each = split_seeds(tuple(values.values()), seeds)
                named = [dict(zip(values, [value.item() for value in own])) for own in each]
                evaluations.add([{"stage": "policy", "step": step} | row for row in named])
        evaluations.end()
    for run in runs:
        finish_run(run, args, card, len(runs))


def train(
    algo: str,
    make_networks: Callable,
    losses: Callable,
    keys: list,
    args: RunArgs,
    prepare: Callable = lambda rows: rows,
    defaults: Callable = lambda card, unit: {},
    noise: Callable | None = None,
):
    """Trains a method for args.seeds, together where they are at the same step, and reports.

    make_networks(card, args) makes all that is learned. losses(networks, target, batch, args) gives the values of one
    update on a batch of the rows' `keys`, for metrics.csv. Its "loss" is minimised: the sum of the method's losses, no
    parameter in two of them, so that each parameter gets the gradient of the one loss that trains it.
    prepare(rows) may add keys to the dataset's rows, whose rewards are scaled before. defaults(card, unit) gives the
    values of flags that depend on the data; `unit` is their mean absolute reward. Flags for temperatures are in units
    of the recorded reward, as ComaDICE's alpha is. noise(card, args, B, generator) draws the random numbers of an
    update for continuous actions, {name: [B, ...]}.
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
    while group := next_group(runs):
        try:
            train_runs(algo, make_networks, losses, noise, rows, keys, args, group, card, env)
        except Diverged as error:
            give_up(runs, error)
    report({algo.upper(): end_runs(runs)}, card, args, f"learning_curve_{algo}.png")
