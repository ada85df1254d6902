"""Rollouts: plays whole episodes with a policy in the simulator that a dataset's card names."""

import math

import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp

from comadice_data import BadInput, NoSimulator
from comadice_envs import make_env

MAX_WIDTH = 50  # environments that one process steps together


def eval_env(card: dict, episodes: int, workers: int = 1) -> EnvBase:
    """The simulator that a dataset's card names, as wide as `episodes` can use.

    Raises NoSimulator where there is none for the card, BadInput where its sizes differ from the card's.
    """
    width = min(math.ceil(episodes / workers), MAX_WIDTH)
    env = make_env(card["env"], card["task"], width, workers, card["interface"])
    n, O = env.observation_spec["agents", "observation"].shape[-2:]
    actions = env.observation_spec["agents", "action_mask"] if card["discrete"] else env.full_action_spec["agents", "action"]
    sizes = {"n_agents": n, "obs_dim": O, "state_dim": env.observation_spec["state"].shape[-1], "action_dim": actions.shape[-1]}
    for key, value in sizes.items():
        if card[key] != value:
            name = f"{card['env']} {card['task']}"
            raise BadInput(f"the dataset's {key} is {card[key]}, the simulator of {name} has {value}: it was made with another interface or version")
    return env


def try_eval_env(card: dict, episodes: int, workers: int = 1) -> EnvBase | None:
    """eval_env, or None, said in one line, where no simulator is at hand: training needs the dataset alone."""
    try:
        return eval_env(card, episodes, workers)
    except NoSimulator as error:
        print(f"rollouts are off: {error}")
        return None


@torch.no_grad()
def evaluate(policy: torch.nn.Module, env: EnvBase, episodes: int, seed: int) -> dict:
    """Plays `episodes` whole episodes: their returns, the mean and standard deviation over episodes, and the winrate in battles.

    A battle whose game died is played again, and counted ("replayed"). The result depends on the policy, the episodes, the
    env's width and the seed alone; no global random state is used. Raises BadInput where games keep dying.
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
            mask = td.get(("agents", "action_mask"), None)
            action = policy.act(td["agents", "observation"].to(device), None if mask is None else mask.to(device))
            td["agents", "action"] = action.to(env.device)
            # Environments whose episode is over stand still; TorchRL's ParallelEnv can hold whole workers only.
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
            raise BadInput(f"the game died in {replayed} battles while {len(returns)} were played: look at the game's own log")
    returns, lengths, wins = (torch.tensor(x[:episodes], dtype=torch.float32) for x in (returns, lengths, wins))
    return {
        "return_mean": returns.mean().item(), "return_std": returns.std(correction=0).item(),
        "winrate": wins.mean().item() if battles else None, "length": lengths.mean().item(), "replayed": replayed, "returns": returns.tolist(),
    }
