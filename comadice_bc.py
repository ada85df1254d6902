"""ComaDICE, lines 9 to 12 of Algorithm 1: weighted behavioural cloning (Eq. 11). Without a ratio it is plain BC.

    python comadice_bc.py --env mamujoco --task hopper                    # BC
    python comadice_bc.py --env mamujoco --task hopper --best 0.1         # BC on the best 10% of episodes
    python comadice_bc.py --env mamujoco --task hopper \\
        --checkpoint runs/mamujoco/hopper/medium-replay/comadice/seed0    # with w* of that run

What is played is an average of the policy's weights over the last steps, and the learning rate falls to 0. Neither is
in the paper. A single policy's return swings by hundreds from one step to the next (RESULTS.md), the average's less.
"""

import environments.threads  # noqa: F401 -- before torch

# isort: split
from dataclasses import dataclass, field
from typing import Literal

from support.flags import parse


@dataclass
class Args:
    """Train BC, BC on the best episodes, or the policies of a ComaDICE run.

    The flags come in four groups. Task: --env to --data. Method: --checkpoint and --best. Optimisation: --steps to
    --hidden. Run: --seeds to --overwrite.
    """

    # Task
    env: str | None = None
    """simulator: mamujoco, smacv2, smacv1, smax (default mamujoco, or what --data holds)"""
    task: str | None = None
    """task of that simulator (default hopper or zerg_5_vs_5, or what --data holds)"""
    quality: str | None = None
    """quality of the dataset (default medium-replay, of battles medium, or what --data holds)"""
    data: str | None = None
    """a dataset directory, instead of data/ENV/TASK/QUALITY"""

    # Method
    checkpoint: str | None = None
    """a ComaDICE run whose saved ratio w* weights the data; plain BC without it"""
    best: float = 1.0
    """share of the episodes, the best by return, that are cloned; 1: all of them"""

    # Optimisation
    steps: int = 200_000
    """gradient steps"""
    lr: float = 1e-3
    """Adam's learning rate (Table 4: 1e-4)"""
    lr_decay: bool = True
    """let the learning rate fall linearly to 0"""
    ema: float = 0.999
    """decay of the average of the policies' weights, which is what is played; 0: no average"""
    batch_size: int = 128
    """transitions in a batch (Table 4)"""
    hidden: int = 256
    """hidden units of the local networks (Table 4)"""

    # Run
    seeds: list[int] = field(default_factory=lambda: [0])
    """one run for each seed; they are trained together"""
    out: str = "runs"
    """run directories go to OUT/ENV/TASK/QUALITY/ALGO/seedN"""
    evals: int = 100
    """evaluations over the training (Table 4)"""
    eval_episodes: int = 32
    """episodes per evaluation (Table 4)"""
    workers: int = 1
    """processes that simulate evaluation episodes"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    data_device: Literal["auto", "cpu", "device"] = "auto"
    """where the dataset lies: with the CPU, on --device, or (auto) there if it fits; a resumed run keeps its place"""
    tf32: bool = False
    """on a GPU: matrix products in TF32, faster and less exact"""
    graph: bool = True
    """on a GPU: replay the update as a CUDA graph"""
    compile: bool = False
    """torch.compile the loss: for a GPU, on a CPU it is slower"""
    quiet: bool = False
    """no progress bars"""
    logger: Literal["none", "csv", "tensorboard", "wandb"] = "none"
    """also keep the rows of metrics.csv for csv, tensorboard or wandb, offline (support/loggers.py)"""
    resume: bool = False
    """go on with runs that were stopped, leave finished ones as they are, extend them with more --steps"""
    overwrite: bool = False
    """replace runs that are already there"""


if __name__ == "__main__":  # before what takes seconds to import: --help and a typo answer at once
    ARGS = parse(Args)

# isort: split
import copy
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs import EnvBase

from comadice_eval import evaluation, try_eval_env
from comadice_losses import DIVERGENCES, effective_sample_size, episode_ratio, policy_loss
from comadice_mixer import make_policy
from environments import stops
from environments.checks import BadInput, check_positive, pick_device, run_script
from offline_data.dataset import episode_returns, last_rows
from offline_data.replay import make_replay, minibatches, transition_rows
from support.bars import Bar
from support.report import report
from support.runs import (
    LOOK,
    Diverged,
    check_args,
    check_checkpoint,
    check_parameters,
    end_runs,
    eval_steps,
    finish_run,
    give_up,
    load_checkpoint,
    load_dataset,
    same_step,
    save_checkpoints,
    start_runs,
)
from support.seeds import (
    Graph,
    adam,
    load_seeds,
    make_generators,
    name_seeds,
    per_seed,
    seed_states,
    set_gradients,
    stack,
    update_target,
)

# What Eq. 11 needs of a transition.
POLICY_KEYS = [("agents", "observation"), ("agents", "action"), ("agents", "action_mask"), "w"]

AVERAGED = 0.1  # the played average covers about this share of the steps so far, as long as --ema allows


def check_policy_stage(args):
    """Raises BadInput for a flag of the policies' training out of its range."""
    check_positive(args, "lr")
    if not 0 <= args.ema < 1:
        raise BadInput(f"--ema is {args.ema}: give a number in [0, 1)")


# ---------------------------------------------------------------- the data of Eq. 11


def with_ratios(rows: TensorDict, ratios: dict[int, Tensor | None]) -> TensorDict:
    """The dataset with a row key "w": each transition's ratio over the mean ratio, 0 on last rows.

    `ratios` holds each seed's ratio [T], None for w = 1. For S seeds w is [N, S], for one seed [N]. Eq. 11's optimum
    does not depend on the ratio's scale; with mean 1 the size of a gradient step does not either. Raises Diverged for a
    ratio that is zero everywhere or not finite.
    """
    first = (~last_rows(rows)).to(rows["reward"].dtype)
    columns = []
    for seed, w in ratios.items():
        columns.append(first.clone())
        if w is not None:
            if not (torch.isfinite(w).all() and w.mean() > 0):
                why = f"the ratio w* can't be used (its mean is {w.mean():.3g}), the critics diverged"
                raise Diverged([seed], f"{why}: use a larger --alpha or another --objective, or leave this seed out")
            columns[-1][first > 0] = w / w.mean()
    rows = rows.clone(recurse=False).unlock_()
    rows["w"] = torch.stack(columns, -1) if len(columns) > 1 else columns[0]
    return rows.lock_()


def ratio_stats(w: Tensor) -> dict[str, float]:
    """Mean, share of zeros and effective sample size of a ratio over the whole dataset."""
    zero = (w == 0).float().mean().item()
    return {"mean_w": w.mean().item(), "w_zero": zero, "ess": effective_sample_size(w).item()}


def best_transitions(rows: TensorDict, share: float) -> Tensor:
    """The row of each transition of the best episodes by return, [T']: `share` of the episodes, at least one."""
    returns = episode_returns(rows)
    best = torch.zeros_like(returns, dtype=torch.bool)
    best[returns.topk(max(round(share * len(returns)), 1)).indices] = True
    first = transition_rows(rows)
    return first[best[rows["episode"][first, 0]]]


def episode_weights(rows: TensorDict, alpha: float, f: str) -> Tensor | None:
    """Each transition's share of the draws, [T]: its episode's ratio (losses.episode_ratio); None with alpha 0."""
    if not alpha:
        return None
    w = episode_ratio(episode_returns(rows), alpha, DIVERGENCES[f])
    return w[rows["episode"][transition_rows(rows), 0]]


# ---------------------------------------------------------------- line 11: one step


def policy_losses(policy, batch: TensorDict) -> tuple[Tensor]:
    """Eq. 11 on one batch [B], as a loss."""
    agents = batch["agents"]
    log_prob = policy.log_prob(agents["observation"], agents["action"], agents.get("action_mask", None))
    return (policy_loss(batch["w"], log_prob),)  # Eq. 11


def make_policy_update(policy, average, optimizer, weight: Tensor, seeds: int = 1, compiled: bool = False):
    """One Adam step on Eq. 11 as a function of a batch [B], and the average's step towards the policy by `weight`.

    Policies of S seeds, stacked, take batches [S, B] with w [S, B, S].
    """
    parameters = list(policy.parameters())
    losses_of = per_seed(policy_losses, [policy], seeds, compiled)

    def update(batch: TensorDict) -> Tensor:
        if seeds > 1:
            batch = batch.copy()
            batch["w"] = batch["w"].diagonal(0, 0, 2).T  # each seed's own ratio
        (loss,) = losses_of(batch)
        set_gradients(loss.sum(), parameters)
        optimizer.step()
        update_target(average, policy, weight)
        return loss.detach()

    return update


def set_schedule(optimizer, weight: Tensor, step: int, args):
    """Writes this step's learning rate, and the average's `weight`, into the tensors that the update reads.

    The average is exponential with decay --ema, but covers no more than a tenth of the steps so far: early on it would
    otherwise be mostly the untrained policy.
    """
    for group in optimizer.param_groups:
        group["lr"].fill_(args.lr * (1 - (step - 1) / args.steps) if args.lr_decay else args.lr)
    weight.fill_(max(1 - args.ema, 1 / (AVERAGED * (step - 1) + 1)) if args.ema else 1.0)


# ---------------------------------------------------------------- lines 9 to 12


def train_policies(
    rows: TensorDict, card: dict, args, seeds: list[int], states: list[dict], env: EnvBase | None, label: str,
    first: Tensor | None = None, weights: Tensor | None = None,
):  # fmt: skip
    """Lines 9 to 12 for several seeds together: args.steps gradient steps on Eq. 11 with args.evals evaluations.

    `states` are the seeds' checkpoints, all at the same step. "w" [T] in them are the transitions' ratios, None for BC.
    `first` are the rows of the transitions to draw from, without it all; they are drawn in proportion to `weights`. A
    generator: after every evaluation, which
    runs in a thread beside the updates, it yields for each seed (what a checkpoint needs, row of metrics.csv).
    """
    device, start, seconds = pick_device(args.device), states[0]["step"], states[0]["seconds"]
    sizes = card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], args.hidden
    each = []
    for seed in seeds:
        torch.manual_seed(seed)
        each.append(make_policy(*sizes).to(device))
    policy, average = stack(each), stack(copy.deepcopy(each))
    optimizer = adam(list(policy.parameters()), args.lr, device)
    generators = make_generators(seeds, 2, rows)
    parts = {"eta": policy, "policy": average, "policy_optimizer": optimizer}  # "policy" is what is played
    if start:
        load_seeds(parts, generators, states)
    stats = [{} if state["w"] is None else ratio_stats(state["w"]) for state in states]
    weighted = with_ratios(rows, {seed: state["w"] for seed, state in zip(seeds, states)})
    replay = make_replay(weighted, POLICY_KEYS, False, generators, device, first, weights)
    weight = torch.ones((), device=device)
    update = Graph(make_policy_update(policy, average, optimizer, weight, len(seeds), args.compile), args.graph)
    at, began, step = eval_steps(args), time.perf_counter() - states[0]["wall"], start
    bar = Bar(f"{label} {name_seeds(seeds)}", args.steps, start, args.quiet)

    def progress() -> list[dict]:
        check_parameters(policy, seeds, f"step {step} of the policies")
        state_of = {"step": step, "seconds": seconds, "unplayed": []}
        return [state | state_of for state in seed_states(parts, generators)]

    def play(policies: list[dict], step: int) -> list[dict]:
        results = []
        for seed, state in zip(seeds, policies):
            player = make_policy(*sizes)
            player.load_state_dict(state)
            results.append(evaluation(player, env, args.eval_episodes, seed, step))
        return results

    def finish(saved: list[dict], unplayed: list[dict], results) -> list[tuple[dict, dict]] | None:
        """The finished evaluation, or None where a stop cut it short."""
        try:
            table = [own["row"] | result | stat for own, result, stat in zip(unplayed, results.result(), stats)]
        except stops.Stopped:
            return None
        bar.say(table)
        return [(state | {"wall": time.perf_counter() - began}, row) for state, row in zip(saved, table)]

    with ThreadPoolExecutor(1) as beside:
        waiting = []  # for evaluations: what to save then, what to save if a stop cuts them short, the results to be

        def evaluate(saved: list[dict], unplayed: list[dict]):
            results = beside.submit(play, [own["policy"] for own in unplayed], unplayed[0]["row"]["step"])
            waiting.append((saved, unplayed, results))

        for i, unplayed in enumerate(zip(*(state.get("unplayed", []) for state in states))):  # cut short before
            evaluate([{"unplayed": state["unplayed"][i + 1 :]} for state in states], list(unplayed))
        batches = minibatches(start, at, (replay, args.batch_size))
        clock = time.perf_counter()
        for step, batch in bar(batches):  # line 10
            set_schedule(optimizer, weight, step, args)
            loss = update(batch)  # line 11
            if step in at:
                table = [{"stage": "policy", "step": step, "policy_loss": value} for value in loss.reshape(-1).tolist()]
                bar.say(table)
                seconds += time.perf_counter() - clock
                now = progress()
                evaluate(now, [{"policy": state["policy"], "row": row} for state, row in zip(now, table)])
                while len(waiting) > 1 and (finished := finish(*waiting[0])):
                    yield finished
                    del waiting[0]
                clock = time.perf_counter()
            elif step % LOOK == 0:
                check_parameters(policy, seeds, f"step {step} of the policies")
        while step == args.steps and waiting and (finished := finish(*waiting[0])):
            yield finished
            del waiting[0]
        if step < args.steps or waiting:  # a stop was asked for
            if step > start:
                seconds += time.perf_counter() - clock
                wall, now = time.perf_counter() - began, progress()
                cut = [[unplayed[s] for _, unplayed, _ in waiting] for s in range(len(seeds))]
                yield [(state | {"wall": wall, "unplayed": own}, None) for state, own in zip(now, cut)]
            stops.leave()


# ---------------------------------------------------------------- the script


def name_of(args: Args) -> str:
    """The run's method, as its directory is called."""
    if args.checkpoint is not None:
        return "weighted-bc"
    return "bc" if args.best == 1 else f"bc-best{100 * args.best:g}"


def train_seeds(
    args: Args, rows: TensorDict, card: dict, w: Tensor | None, env: EnvBase | None, weights: Tensor | None = None
) -> list[list[dict]]:
    """BC for args.seeds, each in its own run directory; returns the rows of each seed's metrics.csv.

    Seeds at the same step are trained together.
    """
    algo = name_of(args)
    first = None if args.best == 1 else best_transitions(rows, args.best)
    runs = start_runs(args, algo, card, rows, {"w": w})
    while groups := same_step(runs):
        try:
            seeds = groups[0]
            states = [runs[seed].state | {"w": w} for seed in seeds]
            for progress in train_policies(rows, card, args, seeds, states, env, algo, first, weights):
                save_checkpoints(runs, seeds, progress)
            for seed in seeds:
                state = runs[seed].state
                finish_run(runs[seed], args, card, len(seeds), args.steps, state["seconds"], state["wall"])
        except Diverged as error:
            give_up(runs, error)
    return end_runs(runs)


def main(args: Args):
    check_args(args)
    check_policy_stage(args)
    if not 0 < args.best <= 1:
        raise BadInput(f"--best is {args.best}: give a share of the episodes in (0, 1]")
    if args.best < 1 and args.checkpoint is not None:
        raise BadInput("--best and --checkpoint are two ways to weight the data: give one of them")
    device = pick_device(args.device, args.tf32)
    rows, card = load_dataset(args, device, name_of(args))
    w = weights = None
    if args.checkpoint is not None:
        source = load_checkpoint(args.checkpoint)
        check_checkpoint(source, card, args.checkpoint)
        w = source.get("w")
        if w is None:
            raise BadInput(
                f"{args.checkpoint} holds no ratio: it is a run of BC, or was stopped before its ratio was computed"
            )
        w, config = w.to(rows["state"].device), source["config"]
        weights = episode_weights(rows, config["episode_alpha"], config["f"])
    env = try_eval_env(card, args.eval_episodes, args.workers)
    curves = {name_of(args): train_seeds(args, rows, card, w, env, weights)}
    report(curves, card, args, f"learning_curve_{name_of(args)}.png")


if __name__ == "__main__":
    run_script(main, ARGS)
