"""Second stage of ComaDICE: weighted behavioural cloning (Algorithm 1, lines 9-12; Eq. 11). Without a ratio it is plain BC.

    python comadice_bc.py --env mamujoco --task hopper --quality medium-replay                                # BC
    python comadice_bc.py --env mamujoco --task hopper --quality medium-replay \\
        --checkpoint runs/mamujoco/hopper/medium-replay/comadice/seed0                                        # w* of that run
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs import EnvBase
from tqdm import tqdm

from comadice_data import BadInput, last_rows, make_replay, minibatches, run_script
from comadice_losses import effective_sample_size, policy_loss
from comadice_mixer import make_policy
from comadice_rollout import evaluate, try_eval_env
from comadice_runs import (
    RunArgs,
    check_args,
    check_checkpoint,
    eval_steps,
    finish_run,
    load_checkpoint,
    load_dataset,
    pick_device,
    random_state,
    save_checkpoint,
    set_random_state,
    start_run,
)

# What Eq. 11 needs of a transition.
POLICY_KEYS = [("agents", "observation"), ("agents", "action"), ("agents", "action_mask"), "w"]


@dataclass
class Args(RunArgs):
    checkpoint: str | None = None
    """a ComaDICE run whose saved ratio w* weights the data; plain BC without it"""


def with_ratio(rows: TensorDict, w: torch.Tensor | None) -> TensorDict:
    """The dataset with a row key "w" [N]: each transition's ratio over the mean ratio (1 where w is None), 0 on last rows.

    Eq. 11's optimum does not depend on the ratio's scale; with mean 1 the size of a gradient step does not either.
    Raises BadInput for a ratio that is zero everywhere or not finite.
    """
    rows = rows.clone(recurse=False).unlock_()
    ratio = (~last_rows(rows)).float()
    if w is not None:
        if not (torch.isfinite(w).all() and w.mean() > 0):
            raise BadInput(f"the ratio w* is of no use (its mean is {w.mean():.3g}), the critics diverged: use a larger --alpha or another --objective")
        ratio[ratio > 0] = w / w.mean()
    rows["w"] = ratio
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


def train_policy(rows: TensorDict, card: dict, w: torch.Tensor | None, args, seed: int, env: EnvBase | None, label: str, state: dict | None = None):
    """Lines 9-12 of Algorithm 1: args.steps gradient steps on Eq. 11, evaluated args.evals times on the way.

    w [T] are the transitions' ratios, None for plain BC; `state` is the checkpoint of a stopped run. A generator: at every
    evaluation it yields (what a checkpoint needs to go on from here, row of metrics.csv).
    """
    device = rows["state"].device
    policy = make_policy(card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], args.hidden).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), args.lr)
    start, seconds = 0, 0.0
    if state is not None:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["policy_optimizer"])
        set_random_state(state["random"])  # after the initialisations above have drawn from it
        start, seconds = state["step"], state["seconds"]
    replay = make_replay(with_ratio(rows, w), POLICY_KEYS, pairs=False)
    at = eval_steps(args)
    clock = time.perf_counter()
    for step, batch in tqdm(minibatches(start, at, (replay, args.batch_size)), initial=start, total=args.steps, desc=label, mininterval=1):
        loss = policy_update(policy, optimizer, batch)
        if step in at:
            row = {"stage": "policy", "step": step, "policy_loss": loss.item()}
            seconds += time.perf_counter() - clock
            row |= evaluation(policy, env, args, seed)
            yield {"policy": policy.state_dict(), "policy_optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}, row
            clock = time.perf_counter()


def policy_update(policy, optimizer, batch: TensorDict) -> torch.Tensor:
    """One step on Eq. 11."""
    agents = batch["agents"]
    loss = policy_loss(batch["w"], policy.log_prob(agents["observation"], agents["action"], agents.get("action_mask", None)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # line 11
    return loss.detach()


def training(algo: str, parts: dict, replay: TensorDictReplayBuffer, args: RunArgs, seed: int, card: dict, env: EnvBase | None, metrics: list[dict]):
    """The run of a method that learns all it has in one stage (baselines/). A generator of (batch, losses), one a step.

    The caller makes its update on the batch and puts what metrics.csv shall show into `losses` (name -> scalar tensor). `parts`
    are the modules and optimisers that a checkpoint holds, "policy" among them is the one that is evaluated. A stopped run
    goes on where it was; a finished one yields nothing. The rows of metrics.csv go to `metrics`.
    """
    run, state = start_run(args, algo, seed, card)
    start, seconds = 0, 0.0
    if state is not None:
        metrics += state["metrics"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        set_random_state(state["random"])  # after the initialisations of the parts have drawn from it
        start, seconds = state["step"], state["seconds"]
    if (run / "summary.json").exists():
        return
    at = eval_steps(args)
    clock = time.perf_counter()
    for step, batch in tqdm(minibatches(start, at, (replay, args.batch_size)), initial=start, total=args.steps, desc=f"{algo} seed {seed}", mininterval=1):
        losses = {}
        yield batch, losses
        if step in at:
            row = {"stage": "policy", "step": step} | {k: v.item() for k, v in losses.items()}
            seconds += time.perf_counter() - clock
            metrics.append(row | evaluation(parts["policy"], env, args, seed))
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"algo": algo, "card": card, "config": asdict(args), "step": step, "seconds": seconds, "random": random_state()}
            save_checkpoint(run, state, metrics)
            clock = time.perf_counter()
    finish_run(run, args, algo, seed, card, metrics, args.steps / seconds, next(parts["policy"].parameters()).device)


def plot_curves(curves: dict[str, list[list[dict]]], dataset_return: float, title: str, path: Path):
    """Learning curves: per algorithm the mean and the range over seeds of the evaluated return."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4))
    for name, seeds in curves.items():
        seeds = [[row for row in metrics if row.get("return") is not None] for metrics in seeds]
        steps = [row["step"] for row in seeds[0]]
        returns = torch.tensor([[row["return"] for row in metrics] for metrics in seeds])
        axis.plot(steps, returns.mean(0), label=name)
        axis.fill_between(steps, returns.min(0).values, returns.max(0).values, alpha=0.2)
    axis.axhline(dataset_return, color="grey", linestyle="--", label="behaviour data")
    axis.set(xlabel="gradient steps of the policy", ylabel="return", title=title)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(curves: dict[str, list[list[dict]]], card: dict, args: RunArgs, picture: str):
    """Prints the last evaluations' returns beside the data's, and draws the learning curves into the folder of the runs."""
    rolled_out = all("return" in row for seeds in curves.values() for metrics in seeds for row in metrics if row["stage"] == "policy")
    print(f"\n{args.env} {args.task} {args.quality}, {args.steps:,} steps, seeds {args.seeds}, {card.get('engine')}")
    print(f"{'':<24}{'return':>12}")
    print(f"{'behaviour data':<24}{card['return_mean']:>12.2f} ± {card['return_std']:.2f} (over episodes)")
    if not rolled_out:
        print("trained policies were not rolled out")
        return
    for name, seeds in curves.items():
        returns = torch.tensor([metrics[-1]["return"] for metrics in seeds])
        spread = f"{returns.std(correction=0):.2f} (over seeds)" if len(seeds) > 1 else f"{seeds[0][-1]['return_std']:.2f} (over episodes)"
        wins = [metrics[-1]["winrate"] for metrics in seeds]
        winrate = "" if None in wins else f", {100 * sum(wins) / len(wins):.1f}% of battles won"
        print(f"{name:<24}{returns.mean():>12.2f} ± {spread}{winrate}")
    path = Path(args.out, args.env, args.task, args.quality, picture)
    plot_curves(curves, card["return_mean"], f"{args.task} {args.quality}", path)
    print(f"learning curve: {path}")


def main(args: Args):
    check_args(args)
    device = pick_device(args.device)
    rows, card = load_dataset(args, device)
    w, algo = None, "bc"
    if args.checkpoint is not None:
        source = load_checkpoint(args.checkpoint)
        check_checkpoint(source, card, args.checkpoint)
        w, algo = source.get("w"), "weighted-bc"
        if w is None:
            raise BadInput(f"{args.checkpoint} holds no ratio: it is a run of plain BC, or was stopped before its ratio was computed")
        w = w.to(device)
    env = try_eval_env(card, args.eval_episodes, args.workers)
    curves = {algo: [train_seed(args, seed, algo, rows, card, w, env) for seed in args.seeds]}
    report(curves, card, args, f"learning_curve_{algo}.png")


def train_seed(args: Args, seed: int, algo: str, rows: TensorDict, card: dict, w: torch.Tensor | None, env: EnvBase | None) -> list[dict]:
    """One run of plain or weighted BC in its own directory; returns the rows of its metrics.csv."""
    run, state = start_run(args, algo, seed, card)
    if (run / "summary.json").exists():
        return state["metrics"]
    torch.manual_seed(seed)
    metrics = []
    if state is not None:
        metrics = state["metrics"]
    stats = {} if w is None else ratio_stats(w)
    for progress, row in train_policy(rows, card, w, args, seed, env, f"{algo} seed {seed}", state):
        metrics.append(row | stats)
        state = progress | {"algo": algo, "card": card, "config": asdict(args), "w": w, "random": random_state()}
        save_checkpoint(run, state, metrics)
    finish_run(run, args, algo, seed, card, metrics, args.steps / state["seconds"], rows["state"].device)
    return metrics


if __name__ == "__main__":
    run_script(main, tyro.cli(Args))
