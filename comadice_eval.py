"""Plays saved policies in the real simulator, or makes tables and figures of finished runs.

    python comadice_eval.py --run runs/mamujoco/hopper/medium-replay/comadice/seed0 --episodes 100
    python comadice_eval.py --run RUN_A RUN_B data/mamujoco/hopper/few-good --video hopper.gif   # see support/video.py
    python comadice_eval.py report runs/                                                  # see support/report.py
    python comadice_eval.py ratio runs/mamujoco/hopper/medium-replay/comadice/seed0       # see support/ratio_picture.py

The first command plays the run's --action-scale times the mean action, clipped to the simulator's box (continuous), or
the most likely available one (discrete). BCQ, and CQL in battles, play the action that their q prefers. It prints the
mean and standard deviation of the return over episodes, and the share of battles won. For several runs of one setting
it also prints mean and standard deviation over the runs.
"""

import sys
from dataclasses import dataclass, field

import tyro

from environments import stops


@dataclass
class Args:
    """Play saved policies in the simulator. Two more commands, each with its own --help: report RUNS, and ratio RUN."""

    run: list[str] = field(default_factory=list)
    """run directories, one or several; with --video also dataset directories"""
    episodes: int = 32
    """episodes for each run"""
    seed: int = 0
    """seeds the simulator's initial states"""
    action_scale: float | None = None
    """Gaussian policies play this multiple of their mean action (default: the run's own; 1 for CQL and OMAR)"""
    workers: int = 1
    """number of processes that simulate; the start states depend on it"""
    device: str = "auto"
    """auto, cpu, cuda, ...: where the policy runs"""
    out: str | None = None
    """also write the results to this JSON file"""
    video: str | None = None
    """instead, film each run's episode of median return into this file, side by side: a .gif (first seconds) or an .mp4
    (whole episode). For a dataset directory among the runs, it shows a recorded episode"""


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    stops.catch(begun=False)
    COMMAND = sys.argv[1] if len(sys.argv) > 1 else None
    if COMMAND == "report":
        from support.report_args import Args as ReportArgs

        ARGS = tyro.cli(ReportArgs, args=sys.argv[2:], prog="comadice_eval.py report")
    elif COMMAND == "ratio":
        from support.ratio_args import Args as RatioArgs

        ARGS = tyro.cli(RatioArgs, args=sys.argv[2:], prog="comadice_eval.py ratio")
    else:
        ARGS = tyro.cli(Args)

# isort: split
import json
import math
from pathlib import Path

import numpy as np
import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp
from tqdm import tqdm

from comadice_mixer import GaussianPolicy, make_policy
from environments.checks import BadInput, NoSimulator, check_positive, pick_device, run_script
from environments.simulators import check_playable, check_sizes, make_env
from offline_data.dataset import open_dataset
from offline_data.durable import check_new, write_text
from support import video
from support.runs import FREE, load_checkpoint

MAX_WIDTH = 50  # environments that one process steps together


def eval_env(card: dict, episodes: int, workers: int = 1) -> EnvBase:
    """The simulator that a dataset's card names, with as many environments as `episodes` can use.

    Raises NoSimulator if the card's simulator is missing, BadInput if its sizes differ from the card's.
    """
    workers = min(workers, episodes)
    width = min(math.ceil(episodes / workers), MAX_WIDTH)
    env = make_env(card["env"], card["task"], width, workers, card["interface"])
    check_sizes(env, card)
    return env


def try_eval_env(card: dict, episodes: int, workers: int = 1) -> EnvBase | None:
    """eval_env, or None and one printed line if the simulator is not installed. Training needs only the dataset."""
    try:
        return eval_env(card, episodes, workers)
    except NoSimulator as error:
        print(f"rollouts are off: {error}")
        return None


@torch.no_grad()
def evaluate(policy: torch.nn.Module, env: EnvBase, episodes: int, seed: int) -> dict:
    """Plays `episodes` whole episodes. The result has their returns and mean length in steps, mean and sample standard
    deviation of the returns, and the winrate (0 to 1; None without battles).

    A battle whose game died is played again, and counted ("replayed"). The result depends only on the policy, the
    number of episodes, the env's width and processes, and the seed. It depends on no global random state. Raises
    BadInput if games keep dying.
    """
    device = next(policy.parameters()).device
    battles = "battle_won" in env.observation_spec.keys()
    env.set_seed(seed)
    returns, lengths, wins, replayed = [], [], [], 0
    while len(returns) < episodes:
        td = env.reset()
        alive = torch.ones_like(td["done"])
        total, length = torch.zeros(alive.shape), torch.zeros(alive.shape)
        won, died = torch.zeros_like(alive), torch.zeros_like(alive)
        while alive.any():
            stops.leave()
            mask = td.get(("agents", "action_mask"), None)
            action = policy.act(td["agents", "observation"].to(device), None if mask is None else mask.to(device))
            action = action.to(env.device)
            if action.is_floating_point():
                # The simulator clips the controls, but some robots' rewards penalise the unclipped action. On states
                # unlike the data a policy's mean can be far outside of the box: one episode had a return of -5,000.
                action = env.full_action_spec["agents", "action"].project(action)
            td["agents", "action"] = action
            # Environments whose episode is over are not stepped. TorchRL's ParallelEnv can leave out only whole
            # worker processes.
            stepping = alive.squeeze(-1)
            if stepping.ndim == 2:
                stepping = stepping.any(-1, keepdim=True).expand_as(stepping)
            td = env.step(td.set("_step", stepping))
            total += td["next", "reward"].where(alive, 0)
            length += alive
            if battles:
                won |= td["next", "battle_won"] & alive
                died |= td["next"].get("game_died", torch.zeros_like(alive)) & alive
            alive = alive & ~td["next", "done"]
            td = step_mdp(td)
        returns += total[~died].tolist()
        lengths += length[~died].tolist()
        wins += won[~died].tolist()
        replayed += int(died.sum())
        if replayed > episodes:
            raise BadInput(
                f"the game died in {replayed} battles while {len(returns)} were played: see the game's own log"
            )
    returns, lengths, wins = (torch.tensor(x[:episodes], dtype=torch.float32) for x in (returns, lengths, wins))
    return {
        "return_mean": returns.mean().item(),
        "return_std": returns.std(correction=min(1, episodes - 1)).item(),
        "winrate": wins.mean().item() if battles else None,
        "length": lengths.mean().item(),
        "replayed": replayed,
        "returns": returns.tolist(),
    }


def evaluation(policy: torch.nn.Module, env: EnvBase | None, episodes: int, seed: int, step: int) -> dict:
    """The values that an evaluation after `step` adds to a row of metrics.csv. Without a simulator there are none.

    Their random seed is made from (seed, step), so each evaluation of a run has different start states.
    """
    if env is None:
        return {}
    result = evaluate(policy, env, episodes, int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
    names = {"return": "return_mean", "return_std": "return_std", "winrate": "winrate", "replayed": "replayed"}
    return {name: result[key] for name, key in names.items()}


def load_policy(run: str | Path, device="cpu", action_scale: float | None = None) -> tuple[torch.nn.Module, dict]:
    """A run's policy and its checkpoint. `action_scale` replaces the run's own.

    Raises BadInput if the run has no policy yet, one that does not fit, or one that has no scale.
    """
    state = load_checkpoint(run)
    card, config = state["card"], state["config"]
    if not state["policy"]:
        raise BadInput(f"{run} has no policy yet: it was stopped in its first stage, continue it with --resume")
    try:
        if state["algo"] in ("bcq", "cql"):  # their policies are implicit in q
            from baselines import bcq, cql

            policy = (bcq if state["algo"] == "bcq" else cql).policy_of_run(card, config)
        else:
            sizes = (card[key] for key in ("n_agents", "obs_dim", "action_dim", "discrete"))
            # OMAR has no --action-scale. Nor had older runs of other methods. They play their mean action.
            policy = make_policy(*sizes, config["hidden"], float(config.get("action_scale", 1.0)))
        policy.load_state_dict(state["policy"])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):
        raise BadInput(f"{run}/checkpoint.pt: the policy's parameters are not those of this task's network") from None
    if action_scale is not None:
        if not isinstance(policy, GaussianPolicy):
            raise BadInput(f"{run}: leave out --action-scale, this policy has no mean action (only Gaussian ones do)")
        policy.action_scale = action_scale
    return policy.to(device), state


# ---------------------------------------------------------------- the script


def check(args: Args):
    """Raises BadInput for a flag out of its range."""
    if args.episodes < 1 or args.workers < 1:
        raise BadInput("--episodes and --workers must be positive")
    if not args.run:
        raise BadInput("give the run directories with --run")
    if args.seed < 0:
        raise BadInput(f"--seed is {args.seed}: give 0 or a positive number")
    if args.action_scale is not None:
        check_positive(args, "action_scale")
    if args.out:
        check_new("--out", args.out)
    if args.video:
        video.check_file(args.video)
        if args.out or args.workers > 1:
            raise BadInput("--video films in one process and writes no results: leave out --out and --workers")
        if args.episodes > MAX_WIDTH:
            raise BadInput(f"--video plays at most {MAX_WIDTH} episodes of a run: give fewer --episodes")


def film(args: Args):
    """Films each run's episode of median return into the file --video."""
    device, shown = pick_device(args.device), []
    for run in args.run:
        if Path(run, "card.json").is_file():
            rows, card = open_dataset(run)
            shown.append((f"data {card['quality']}", card, rows))
        else:
            policy, state = load_policy(run, device, args.action_scale)
            shown.append((f"{state['algo']} {Path(run).resolve().name}", state["card"], policy))
    play = lambda policy, env: evaluate(policy, env, env.batch_size[0], args.seed)["returns"]
    video.film(args.video, shown, lambda card: eval_env(card, args.episodes), play)


def print_results(rows: list[dict], one_cell: bool):
    """Prints a line per run. With `one_cell`, when all runs are seeds of one setting, also their mean."""
    print(f"\n{'run (± standard deviation over episodes)':<70}{'return':>20}{'length':>9}{'winrate':>9}")
    for row in rows:
        spread = f"{row['return_mean']:>10.2f} ± {row['return_std']:<7.2f}"
        winrate = "" if row["winrate"] is None else f"{100 * row['winrate']:>8.1f}%"
        replayed = f"   {row['replayed']} battles played again: the game died" if row["replayed"] else ""
        print(f"{row['run']:<70}{spread}{row['length']:>9.1f}{winrate}{replayed}")
    if not one_cell:
        return
    means = torch.tensor([row["return_mean"] for row in rows])
    print(f"{'mean ± standard deviation over runs':<70}{means.mean():>10.2f} ± {means.std():<7.2f}")
    if all(row["winrate"] is not None for row in rows):
        wins = 100 * torch.tensor([row["winrate"] for row in rows])
        print(f"{'winrate, mean ± standard deviation over runs':<70}{wins.mean():>9.1f}% ± {wins.std():.1f}")


def main(args: Args):
    check(args)
    if args.video:
        film(args)
        return
    device = pick_device(args.device)
    # All are loaded first, so that a bad run is reported at once.
    loaded = [load_policy(run, device, args.action_scale) for run in args.run]
    for _, state in loaded:
        check_playable(state["card"]["env"], state["card"]["task"])
    rows, env, last = [], None, None
    for run, (policy, state) in tqdm(list(zip(args.run, loaded)), desc="evaluate", unit="run", disable=None):
        if state["card"] != last:
            env, last = eval_env(state["card"], args.episodes, args.workers), state["card"]
        result = evaluate(policy, env, args.episodes, args.seed)
        del result["returns"]
        scale = getattr(policy, "action_scale", None)
        how = {"episodes": args.episodes, "seed": args.seed, "workers": args.workers, "action_scale": scale}
        rows.append({"run": str(run)} | how | result)
    left_out = (*FREE, "checkpoint")
    settings = [{k: v for k, v in state["config"].items() if k not in left_out} for _, state in loaded]
    for setting, row in zip(settings, rows):
        setting["action_scale"] = row["action_scale"]  # as it was played
    cells = [(state["algo"], state["card"], setting) for (_, state), setting in zip(loaded, settings)]
    different_runs = len({Path(run).resolve() for run in args.run}) == len(rows) > 1
    print_results(rows, different_runs and all(cell == cells[0] for cell in cells))
    if args.out:
        write_text(args.out, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    if COMMAND == "report":
        from support import report

        run_script(report.main, ARGS)
    elif COMMAND == "ratio":
        from support import ratio_picture

        run_script(ratio_picture.main, ARGS)
    else:
        run_script(main, ARGS)
