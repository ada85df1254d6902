"""ComaDICE, lines 9 to 12 of Algorithm 1: weighted behavioural cloning (Eq. 11). Without a ratio it is plain BC.

    python comadice_bc.py --env mamujoco --task hopper                    # BC
    python comadice_bc.py --env mamujoco --task hopper --best 0.1         # BC on the best 10% of episodes
    python comadice_bc.py --env mamujoco --task hopper \\
        --checkpoint runs/mamujoco/hopper/medium-replay/comadice/seed0    # with w* of that run

The policy that is played is an average of the trained policy's weights over the last steps, and the learning rate falls
to 0. Neither is in the paper. They make neighbouring evaluations more alike. Nor is --action-scale in the paper: robots
play 0.85 times the mean action, those of ComaDICE 0.8 times (docs/PAPER.md).
"""

import environments.cpu  # noqa: F401 -- before torch

# isort: split
from dataclasses import dataclass, field
from typing import Literal

from support.flags import parse


@dataclass
class Args:
    """Train BC, BC on the best episodes, or the policies of a ComaDICE run.

    The flags come in four groups. Task: --env to --data. Method: --checkpoint to --action-scale. Optimisation: --steps
    to --hidden. Run: --seeds to --overwrite.
    """

    # Task
    env: str | None = None
    """simulator: mamujoco, smacv2, smacv1, smax (default: mamujoco, or that of --data)"""
    task: str | None = None
    """task of that simulator (default: hopper or zerg_5_vs_5, or that of --data)"""
    quality: str | None = None
    """quality of the dataset (default: that of --data, or medium-replay for robots and medium for battles; demo if that
    is missing and a demo comes with the code)"""
    data: str | None = None
    """a dataset directory, instead of data/ENV/TASK/QUALITY"""

    # Method
    checkpoint: str | None = None
    """a ComaDICE run whose saved ratio w* weights the data, which is drawn as in that run; plain BC without it. Other
    flags are not taken from that run. ComaDICE's default has --action-scale 0.8"""
    best: float = 1.0
    """share of the episodes, the best by return, that are cloned; 1: all of them"""
    action_scale: float = 0.85
    """robots' policies play this multiple of their mean action, clipped to the simulator's box; 1: the mean"""

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
    """processes that simulate evaluation episodes; the start states depend on it"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    data_device: Literal["auto", "cpu", "device"] = "auto"
    """where the dataset is kept: cpu, device (that of --device), or auto (on --device if it fits there)"""
    tf32: bool = False
    """on a GPU: matrix products in TF32, faster and less exact"""
    graph: bool = True
    """on a GPU: replay the update as a CUDA graph"""
    compile: bool = False
    """torch.compile the loss: for a GPU, on a CPU it is slower"""
    quiet: bool = False
    """no progress bars"""
    logger: Literal["none", "csv", "tensorboard", "wandb"] = "none"
    """also log metrics.csv's rows with TorchRL's csv, tensorboard or (offline) wandb logger (support/loggers.py)"""
    resume: bool = False
    """go on with runs that were stopped, leave finished ones as they are, extend them with more --steps and --evals"""
    overwrite: bool = False
    """replace runs that are already there"""


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    ARGS = parse(Args)

# isort: split
import math

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs import EnvBase

from comadice_eval import evaluation, try_eval_env
from comadice_losses import effective_sample_size, policy_loss
from comadice_mixer import make_policy
from environments.checks import BadInput, check_positive, pick_device, run_script
from offline_data.dataset import last_rows
from offline_data.replay import best_transitions, episode_weights, make_replay
from support.report import report
from support.runs import (
    Diverged,
    Run,
    check_args,
    check_checkpoint,
    check_policy_stage,
    end_runs,
    finish_run,
    give_up,
    load_dataset,
    load_ratio_run,
    next_group,
    start_runs,
)
from support.seeds import Graph, adam, make_generators, make_stacked, per_seed, set_gradients, target_update
from support.stages import Evaluations, Stage

# The entries of a transition that Eq. 11 needs.
POLICY_KEYS = [("agents", "observation"), ("agents", "action"), ("agents", "action_mask"), "w"]

AVERAGED = 0.1  # the average covers about this share of the steps so far, until --ema limits it


# ---------------------------------------------------------------- the data of Eq. 11


def usable(w: Tensor) -> bool:
    """Whether a ratio w [T] can be divided by its mean."""
    return 0 < w.mean().item() < math.inf


def with_ratios(rows: TensorDict, ratios: dict[int, Tensor | None]) -> TensorDict:
    """The dataset with one more key per row, "w": the transition's ratio over the mean ratio. It is 0 on last rows.

    `ratios` holds each seed's ratio [T], or None for w = 1. "w" is [N] for one seed and [N, S] for S seeds. Eq. 11's
    optimum does not depend on the scale of w. Since w is divided by its mean, the size of a gradient step hardly
    depends on it either.
    Raises Diverged for a ratio that is zero everywhere, or whose mean is not finite.
    """
    is_transition = (~last_rows(rows)).to(rows["reward"].dtype)
    columns = []
    for seed, w in ratios.items():
        column = is_transition.clone()
        if w is not None:
            if not usable(w):
                why = f"the ratio w* can't be used (its mean is {w.mean():.3g}), the critics diverged"
                raise Diverged([seed], f"{why}: use a larger --alpha or another --objective, or leave this seed out")
            column[is_transition > 0] = w / w.mean()
        columns.append(column)
    rows = rows.clone(recurse=False).unlock_()
    rows["w"] = torch.stack(columns, -1) if len(columns) > 1 else columns[0]
    return rows.lock_()


def ratio_stats(w: Tensor) -> dict[str, float]:
    """Mean, share of zeros and effective sample size of a ratio."""
    zero = (w == 0).float().mean().item()
    return {"mean_w": w.mean().item(), "w_zero": zero, "ess": effective_sample_size(w).item()}


# ---------------------------------------------------------------- line 11: one step


def policy_losses(policy, batch: TensorDict) -> tuple[Tensor]:
    """Eq. 11 on one batch [B], as a loss. It is a tuple of one, since per_seed wants a tuple."""
    agents = batch["agents"]
    log_prob = policy.log_prob(agents["observation"], agents["action"], agents.get("action_mask", None))
    return (policy_loss(batch["w"], log_prob),)  # Eq. 11


def make_policy_update(policy, average, optimizer, average_step: Tensor, n_seeds: int = 1, compiled: bool = False):
    """Line 11 as a function of a batch [B]: one Adam step, then the average moves towards the policy by `average_step`.

    It returns the loss, a scalar. Stacked policies of S seeds take batches [S, B] with w [S, B, S], and return [S].
    """
    parameters = list(policy.parameters())
    losses_of = per_seed(policy_losses, [policy], n_seeds, compiled)
    update_average = target_update(average, policy, average_step)

    def update(batch: TensorDict) -> Tensor:
        if n_seeds > 1:
            batch = batch.copy()
            batch["w"] = batch["w"].diagonal(0, 0, 2).T  # each seed's own ratio
        (loss,) = losses_of(batch)
        set_gradients(loss.sum(), parameters)
        optimizer.step()  # line 11: eta
        update_average()
        return loss.detach()

    return update


def set_schedule(optimizer, average_step: Tensor, step: int, args):
    """Writes this step's learning rate and the average's step into the tensors that the update reads.

    The average is exponential with decay --ema, but covers at most a tenth of the steps so far. Early on it would
    otherwise be mostly the untrained policy.
    """
    for group in optimizer.param_groups:
        group["lr"].fill_(args.lr * (1 - (step - 1) / args.steps) if args.lr_decay else args.lr)
    average_step.fill_(max(1 - args.ema, 1 / (AVERAGED * (step - 1) + 1)) if args.ema else 1.0)


# ---------------------------------------------------------------- lines 9 to 12


def train_policies(
    rows: TensorDict, card: dict, args, runs: list[Run], env: EnvBase | None, label: str,
    drawn_from: Tensor | None = None, weights: Tensor | None = None,
):  # fmt: skip
    """Lines 9 to 12 for runs at the same step: args.steps gradient steps on Eq. 11, with args.evals evaluations.

    "w" [T] in a run's state is the transitions' ratio, None for BC. Transitions are drawn from the row numbers
    `drawn_from` [K], by default from all T, in proportion to `weights` [K], by default equally. Each evaluation is
    saved in the runs' directories.
    """
    device, seeds = pick_device(args.device), [run.seed for run in runs]
    sizes = card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], args.hidden, args.action_scale
    policy, average = make_stacked(lambda: make_policy(*sizes).to(device), seeds)  # line 1: eta, shared by all agents
    optimizer, average_step = adam(list(policy.parameters()), args.lr, device), torch.ones((), device=device)
    generators = make_generators(seeds, 2, rows)
    parts = {"eta": policy, "policy": average, "policy_optimizer": optimizer}  # "policy" is what is played
    stage = Stage("policies", label, args, runs, parts, generators)
    ratios = {run.seed: run.state["w"] for run in runs}
    stats = {seed: {} if w is None else ratio_stats(w) for seed, w in ratios.items()}
    replay = make_replay(
        with_ratios(rows, ratios), POLICY_KEYS, pairs=False, generators=generators, device=device,
        drawn_from=drawn_from, weights=weights,
    )  # fmt: skip
    update = Graph(make_policy_update(policy, average, optimizer, average_step, len(seeds), args.compile), args.graph)

    def play(seed: int, parameters: dict, row: dict) -> dict:
        player = make_policy(*sizes)
        player.load_state_dict(parameters)
        return row | evaluation(player, env, args.eval_episodes, seed, row["step"]) | stats[seed]

    # line 9: training the local policies
    with Evaluations(stage, play) as evaluations:  # they run beside the updates
        for step, batch in stage.steps((replay, args.batch_size)):  # line 10
            set_schedule(optimizer, average_step, step, args)
            loss = update(batch)  # line 11
            if step in stage.eval_steps:  # --evals times
                row = {"stage": "policy", "step": step}
                evaluations.add([row | {"policy_loss": value} for value in loss.reshape(-1).tolist()])
        evaluations.end()  # line 12


# ---------------------------------------------------------------- the script


def name_of(args: Args) -> str:
    """The name of the run's method, which is also its directory's."""
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
    drawn_from = None if args.best == 1 else best_transitions(rows, args.best)
    runs = start_runs(args, algo, card, rows, {"w": w})
    for run in runs.values():
        run.state["w"] = w  # on the data's device; that of a resumed run's checkpoint is on the CPU
    while group := next_group(runs):
        try:
            train_policies(rows, card, args, group, env, algo, drawn_from, weights)  # lines 9 to 12
            for run in group:
                finish_run(run, args, card, len(group))
        except Diverged as error:
            give_up(runs, error)
    return end_runs(runs)  # line 13: the policies are in the runs' checkpoints


def load_ratio(run: str, rows: TensorDict, card: dict) -> tuple[Tensor, Tensor | None]:
    """w* of a ComaDICE run on this dataset, [T], and the episode_weights that it drew with.

    Raises BadInput if the run has no w*, one that can't be used, or one of another dataset.
    """
    source = load_ratio_run(run)
    check_checkpoint(source, card, run)
    if not usable(source["w"]):
        raise BadInput(f"{run}: its ratio w* can't be used, since its mean is {source['w'].mean():.3g}")
    config = source["config"]
    drawn = episode_weights(rows, config["episode_alpha"], config["f"], config["neighbours"])
    return source["w"].to(rows["state"].device), drawn


def main(args: Args):
    check_args(args)
    check_policy_stage(args)
    check_positive(args, "action_scale")
    if not 0 < args.best <= 1:
        raise BadInput(f"--best is {args.best}: give a share of the episodes in (0, 1]")
    if args.best < 1 and args.checkpoint is not None:
        raise BadInput("--best and --checkpoint are two ways to weight the data: give one of them")
    device = pick_device(args.device, args.tf32)
    rows, card = load_dataset(args, device, name_of(args))  # line 1: the offline data D
    w, weights = (None, None) if args.checkpoint is None else load_ratio(args.checkpoint, rows, card)
    env = try_eval_env(card, args.eval_episodes, args.workers)
    curves = {name_of(args): train_seeds(args, rows, card, w, env, weights)}
    report(curves, card, args, f"learning_curve_{name_of(args)}.png")


if __name__ == "__main__":
    run_script(main, ARGS)
