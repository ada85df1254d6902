"""Rolls out saved policies in the real simulator, or collects finished runs into tables and figures.

    python comadice_eval.py --run runs/mamujoco/hopper/medium-replay/comadice/seed0 --episodes 100
    python comadice_eval.py report runs/                                                              # see comadice_report.py

The first plays the mean action (continuous) or the most likely available one (discrete) and prints return mean and standard
deviation over episodes, the share of battles won, and mean and standard deviation over seeds where several runs are given.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import comadice_report
from baselines import bcq
from comadice_data import BadInput, run_script
from comadice_mixer import make_policy
from comadice_rollout import eval_env, evaluate
from comadice_runs import FREE, load_checkpoint, pick_device


@dataclass
class Args:
    run: list[str] = field(default_factory=list)
    """run directories, one or several"""
    episodes: int = 32
    """episodes for each run"""
    seed: int = 0
    """seeds the simulator's initial states"""
    workers: int = 1
    """processes that simulate"""
    device: str = "auto"
    """auto, cpu, cuda, ...: where the policy runs"""
    out: str | None = None
    """also write the results to this JSON file"""


def load_policy(run: str | Path, device="cpu") -> tuple[torch.nn.Module, dict]:
    """A run's policy and its checkpoint."""
    state = load_checkpoint(run)
    card, config = state["card"], state["config"]
    if not state["policy"]:
        raise BadInput(f"{run} has no policy yet: it was stopped in its first stage, go on with --resume")
    try:
        if state["algo"] == "bcq":  # its policy is implicit in a generative model and q
            policy = bcq.make_networks(card, bcq.Args(**config))
        else:
            policy = make_policy(card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], config["hidden"])
        policy.load_state_dict(state["policy"])
    except (RuntimeError, TypeError):
        raise BadInput(f"{run}/checkpoint.pt: the policy's parameters are not those of this task's network") from None
    return policy.to(device), state


def main(args: Args):
    if args.episodes < 1 or args.workers < 1:
        raise BadInput("--episodes and --workers must be positive")
    if not args.run:
        raise BadInput("give the run directories with --run")
    if args.seed < 0:
        raise BadInput(f"--seed is {args.seed}: give a number from 0 on")
    if args.out and (Path(args.out).is_dir() or not Path(args.out).absolute().parent.is_dir()):
        raise BadInput(f"can't write --out {args.out}: give a file in a folder that exists")
    device = pick_device(args.device)
    loaded = [load_policy(run, device) for run in args.run]  # before the first rollout, so that a bad one costs nothing
    rows, env, last = [], None, None
    for run, (policy, state) in zip(args.run, tqdm(loaded, desc="evaluate", unit="run")):
        if state["card"] != last:
            env, last = eval_env(state["card"], args.episodes, args.workers), state["card"]
        result = evaluate(policy, env, args.episodes, args.seed)
        rows.append({"run": str(run), "episodes": args.episodes, **{k: v for k, v in result.items() if k != "returns"}})
    print(f"\n{'run':<70}{'return':>20}{'length':>9}{'winrate':>9}")
    for row in rows:
        winrate = "" if row["winrate"] is None else f"{100 * row['winrate']:>8.1f}%"
        replayed = f"   {row['replayed']} battles played again: the game died" if row["replayed"] else ""
        print(f"{row['run']:<70}{row['return_mean']:>10.2f} ± {row['return_std']:<7.2f}{row['length']:>9.1f}{winrate}{replayed}")
    cells = [(state["algo"], state["card"], {k: v for k, v in state["config"].items() if k not in (*FREE, "checkpoint")}) for _, state in loaded]
    if len({Path(run).resolve() for run in args.run}) == len(rows) > 1 and all(cell == cells[0] for cell in cells):  # seeds of one cell
        means = torch.tensor([row["return_mean"] for row in rows])
        print(f"{'mean ± std over runs':<70}{means.mean():>10.2f} ± {means.std(correction=0):<7.2f}")
        if all(row["winrate"] is not None for row in rows):
            wins = 100 * torch.tensor([row["winrate"] for row in rows])
            print(f"{'winrate, mean ± std over runs':<70}{wins.mean():>9.1f}% ± {wins.std(correction=0):.1f}")
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["report"]:
        run_script(comadice_report.main, tyro.cli(comadice_report.Args, args=sys.argv[2:], prog="comadice_eval.py report"))
    else:
        run_script(main, tyro.cli(Args))
