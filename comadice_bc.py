"""Second stage of ComaDICE: weighted behavioural cloning (Algorithm 1, lines 9-12; Eq. 11). Without a ratio it is plain BC.

    python comadice_bc.py --env mamujoco --task hopper --quality medium-replay                                # BC
    python comadice_bc.py --env mamujoco --task hopper --quality medium-replay \\
        --checkpoint runs/mamujoco/hopper/medium-replay/comadice/seed0                                        # w* of that run
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import environments.threads  # noqa: F401 -- before torch

# isort: split
import torch
import tyro
from tensordict import TensorDict
from torchrl.envs import EnvBase
from tqdm import tqdm

from comadice_eval import evaluate, try_eval_env
from comadice_losses import effective_sample_size, policy_loss
from comadice_mixer import make_policy
from environments.checks import BadInput, pick_device, run_script
from offline_data.dataset import last_rows
from offline_data.replay import make_replay, minibatches
from support.report import report
from support.runs import (
    RunArgs,
    check_args,
    check_checkpoint,
    equally_far,
    eval_steps,
    finish_run,
    load_checkpoint,
    load_dataset,
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
)

# What Eq. 11 needs of a transition.
POLICY_KEYS = [("agents", "observation"), ("agents", "action"), ("agents", "action_mask"), "w"]


@dataclass
class Args(RunArgs):
    checkpoint: str | None = None
    """a ComaDICE run whose saved ratio w* weights the data; plain BC without it"""
    compile: bool = False
    """torch.compile the loss: for a GPU, on a CPU it is slower"""


def with_ratios(rows: TensorDict, ratios: dict[int, torch.Tensor | None]) -> TensorDict:
    """The dataset with a row key "w": each transition's ratio over the mean ratio (1 where it is None), 0 on last rows.

    `ratios` are those of S seeds, by seed; w is [N, S], for one [N]. Eq. 11's optimum does not depend on the ratio's scale; with mean 1 the size
    of a gradient step does not either. Raises BadInput for a ratio that is zero everywhere or not finite.
    """
    first = (~last_rows(rows)).to(rows["reward"].dtype)
    columns = []
    for seed, w in ratios.items():
        columns.append(first.clone())
        if w is not None:
            if not (torch.isfinite(w).all() and w.mean() > 0):
                raise BadInput(f"seed {seed}: the ratio w* is of no use (its mean is {w.mean():.3g}), the critics diverged: "
                               "use a larger --alpha or another --objective, or leave this seed out")
            columns[-1][first > 0] = w / w.mean()
    rows = rows.clone(recurse=False).unlock_()
    rows["w"] = torch.stack(columns, -1) if len(columns) > 1 else columns[0]
    return rows.lock_()


def ratio_stats(w: torch.Tensor) -> dict:
    """What a reader needs to judge a ratio by, over the whole dataset."""
    return {"mean_w": w.mean().item(), "w_zero": (w == 0).float().mean().item(), "ess": effective_sample_size(w).item()}


def evaluation(policy: torch.nn.Module, env: EnvBase | None, args, seed: int) -> dict:
    """What an evaluation adds to a row of metrics.csv: nothing where there is no simulator."""
    if env is None:
        return {}
    result = evaluate(policy, env, args.eval_episodes, seed)
    return {"return": result["return_mean"], "return_std": result["return_std"], "winrate": result["winrate"], "replayed": result["replayed"]}


def policy_losses(policy, batch: TensorDict) -> tuple[torch.Tensor]:
    """The loss of line 10 on one batch [B]."""
    agents = batch["agents"]
    return (policy_loss(batch["w"], policy.log_prob(agents["observation"], agents["action"], agents.get("action_mask", None))),)  # Eq. 11


def make_policy_update(policy, optimizer, seeds: int = 1, compiled: bool = False):
    """One Adam step on Eq. 11 as a function of a batch [B]; for policies of S seeds, stacked, of [S, B] with w [S, B, S]."""
    parameters = list(policy.parameters())
    losses_of = per_seed(policy_losses, [policy], seeds, compiled)

    def update(batch: TensorDict) -> torch.Tensor:
        if seeds > 1:
            batch = batch.copy()
            batch["w"] = batch["w"].diagonal(0, 0, 2).T  # each seed's own ratio
        (loss,) = losses_of(batch)
        set_gradients(loss.sum(), parameters)
        optimizer.step()  # line 11
        return loss.detach()

    return update


def train_policies(rows: TensorDict, card: dict, args, seeds: list[int], states: list[dict], env: EnvBase | None, label: str):
    """Lines 9-12 of Algorithm 1 for several seeds together: args.steps gradient steps on Eq. 11, evaluated args.evals times on the way.

    `states` are the seeds' checkpoints, equally far; "w" [T] in them are the transitions' ratios, None for plain BC. A
    generator: after every evaluation, which goes on in a thread beside the updates, it yields for each seed (what a
    checkpoint needs, row of metrics.csv).
    """
    device, start, seconds = pick_device(args.device), states[0]["step"], states[0]["seconds"]
    sizes = card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], args.hidden
    policies = []
    for seed in seeds:
        torch.manual_seed(seed)
        policies.append(make_policy(*sizes).to(device))
    policy = stack(policies)
    optimizer = adam(list(policy.parameters()), args.lr, device)
    generators = make_generators(seeds, 2, rows)
    parts = {"policy": policy, "policy_optimizer": optimizer}
    if start:
        load_seeds(parts, generators, states)
    stats = [{} if state["w"] is None else ratio_stats(state["w"]) for state in states]
    replay = make_replay(with_ratios(rows, {seed: state["w"] for seed, state in zip(seeds, states)}), POLICY_KEYS, False, generators, device)
    update = Graph(make_policy_update(policy, optimizer, len(seeds), args.compile), args.graph)
    at, began, played = eval_steps(args), time.perf_counter() - states[0]["wall"], None

    def finish(progress: list[dict], table: list[dict], results) -> list[tuple[dict, dict]]:
        table = [row | result | stat for row, result, stat in zip(table, results.result(), stats)]
        return [(state | {"wall": time.perf_counter() - began}, row) for state, row in zip(progress, table)]

    with ThreadPoolExecutor(1) as beside:
        clock = time.perf_counter()
        bar = tqdm(minibatches(start, at, (replay, args.batch_size)), initial=start, total=args.steps, desc=f"{label} {name_seeds(seeds)}", mininterval=1)
        for step, batch in bar:
            loss = update(batch)
            if step in at:
                table = [{"stage": "policy", "step": step, "policy_loss": value} for value in loss.reshape(-1).tolist()]
                seconds += time.perf_counter() - clock
                if played is not None:
                    yield finish(*played)
                progress = [state | {"step": step, "seconds": seconds} for state in seed_states(parts, generators)]
                players = [make_policy(*sizes) for _ in seeds]
                for player, state in zip(players, progress):
                    player.load_state_dict(state["policy"])
                played = progress, table, beside.submit(lambda players: [evaluation(p, env, args, s) for p, s in zip(players, seeds)], players)
                clock = time.perf_counter()
        if played is not None:
            yield finish(*played)


def main(args: Args):
    check_args(args)
    device = pick_device(args.device, args.tf32)
    rows, card = load_dataset(args, device)
    w, algo = None, "bc"
    if args.checkpoint is not None:
        source = load_checkpoint(args.checkpoint)
        check_checkpoint(source, card, args.checkpoint)
        w, algo = source.get("w"), "weighted-bc"
        if w is None:
            raise BadInput(f"{args.checkpoint} holds no ratio: it is a run of plain BC, or was stopped before its ratio was computed")
        w = w.to(rows["state"].device)
    env = try_eval_env(card, args.eval_episodes, args.workers)
    curves = {algo: train_seeds(args, algo, rows, card, w, env)}
    report(curves, card, args, f"learning_curve_{algo}.png")


def train_seeds(args: Args, algo: str, rows: TensorDict, card: dict, w: torch.Tensor | None, env: EnvBase | None) -> list[list[dict]]:
    """Plain or weighted BC for args.seeds, together as far as they are equally far, each in its own run directory.

    Returns the rows of each seed's metrics.csv.
    """
    runs = start_runs(args, algo, card, rows, {"w": w})
    for seeds in equally_far(runs):
        for progress in train_policies(rows, card, args, seeds, [runs[seed].state | {"w": w} for seed in seeds], env, algo):
            save_checkpoints(runs, seeds, progress)
        for seed in seeds:
            finish_run(runs[seed], args, card, len(seeds), args.steps, runs[seed].state["seconds"], runs[seed].state["wall"])
    return [run.metrics for run in runs.values()]


if __name__ == "__main__":
    run_script(main, tyro.cli(Args))
