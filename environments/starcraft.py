"""StarCraft II battles as a TorchRL environment: SMACv2's and SMACv1's tasks, on TorchRL's SMACv2Env and the smacv2
package.

requirements.txt does not install smacv2 (github.com/oxwhirl/smacv2), the game and the SMAC maps. The README says how to
install them.

TensorDict keys of one game (n agents, A actions); several games run side by side in TorchRL's ParallelEnv:

    ("agents", "observation")  [n, O]  float32
    ("agents", "action_mask")  [n, A]  bool, the available actions; a dead agent has only the no-op (action 0)
    ("agents", "action")       [n]     int64
    "state"                    [S]     float32
    "reward"                   [1]     float32
    "done", "terminated", "truncated"  [1]  bool; truncated: the time limit; terminated: the battle is decided
    "battle_won"               [1]     bool, on the step that won the battle
    "game_died"                [1]     bool: the game crashed. What it played since the reset does not count and
                                       must be played again

This file corrects what TorchRL's wrapper and smacv2 lack or get wrong: seeds (set_seed), a time limit that looks like a
termination, a crashed game that looks like a lost battle, a reset that fails or starts a second game, and the reward's
scale.
"""

import importlib.metadata
import random
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Composite, Unbounded
from torchrl.envs.libs.smacv2 import SMACv2Env

from environments.checks import BadInput, NoSimulator

# SMACv2's unit types, their weights, and the type that a team can't consist of alone (Ellis et al. 2023; the package's
# examples).
RACES = {
    "protoss": (["stalker", "zealot", "colossus"], [0.45, 0.45, 0.1], ["colossus"]),
    "terran": (["marine", "marauder", "medivac"], [0.45, 0.45, 0.1], ["medivac"]),
    "zerg": (["zergling", "baneling", "hydralisk"], [0.45, 0.1, 0.45], ["baneling"]),
}
SIZES = ["5_vs_5", "10_vs_10", "10_vs_11", "20_vs_20", "20_vs_23"]
SMACV2_TASKS = [f"{race}_{size}" for race in RACES for size in SIZES]
SMACV1_TASKS = ["2c_vs_64zg", "5m_vs_6m", "6h_vs_8z", "corridor"]  # the paper's; every other SMAC map works too
RESTARTS = 3  # a reset gives up after this many failed launches

HOW_TO_INSTALL = (
    "install smacv2, the game and the SMAC maps as the README says, or play without the game with --env smax"
)


def check_task(env: str, task: str):
    """Raises NoSimulator for a task that does not exist. Other SMAC maps than the paper's can be checked only if
    smacv2 is installed."""
    if env == "smacv2" and task not in SMACV2_TASKS:
        raise NoSimulator(f"unknown smacv2 task '{task}': use RACE_SIZE with {', '.join(RACES)} and {', '.join(SIZES)}")
    if env == "smacv1" and task not in SMACV1_TASKS:
        try:
            from smacv2.env.starcraft2.maps.smac_maps import get_smac_map_registry
        except ImportError:
            raise NoSimulator(
                f"unknown smacv1 task '{task}': use {', '.join(SMACV1_TASKS)}, or {HOW_TO_INSTALL} for other SMAC maps"
            ) from None
        maps = [name for name in get_smac_map_registry() if "gen_" not in name]
        if task not in maps:
            raise NoSimulator(f"unknown smacv1 task '{task}': use one of {', '.join(maps)}")


def game_config(env: str, task: str) -> dict:
    """smacv2's arguments for a task: the benchmark's configuration for SMACv2, SMAC's defaults for SMACv1."""
    common = {"difficulty": "7", "step_mul": 8, "move_amount": 2}
    common |= {"reward_win": 200, "reward_death_value": 10, "reward_scale_rate": 20}
    common |= {"obs_all_health": True, "obs_own_health": True, "obs_last_action": False, "state_last_action": True}
    common["continuing_episode"] = True  # so that info says when the time limit ended a battle; it has no other effect
    if env == "smacv1":
        return common | {"map_name": task}
    race, size = task.split("_", 1)
    n_units, n_enemies = (int(number) for number in size.split("_vs_"))
    units, weights, exceptions = RACES[race]
    team = {"dist_type": "weighted_teams", "unit_types": units, "weights": weights, "observe": True}
    team["exception_unit_types"] = exceptions
    start = {"dist_type": "surrounded_and_reflect", "p": 0.5, "map_x": 32, "map_y": 32}
    return common | {
        "map_name": f"10gen_{race}",
        "obs_own_pos": True,
        "use_unit_ranges": True,
        "min_attack_range": 2,
        "conic_fov": False,
        "num_fov_actions": 12,
        "capability_config": {"n_units": n_units, "n_enemies": n_enemies, "team_gen": team, "start_positions": start},
    }


def check_installed(map_name: str):
    """Raises NoSimulator if smacv2, the game or the map is missing."""
    try:
        import smacv2.env  # noqa: F401
        from pysc2 import maps, run_configs
        from pysc2.lib.sc_process import SC2LaunchError
    except ImportError as error:
        raise NoSimulator(f"smacv2 is not installed ({error}): {HOW_TO_INSTALL}") from None
    try:
        run = run_configs.get()
    except (SC2LaunchError, OSError) as error:
        raise NoSimulator(f"StarCraft II is not installed ({str(error).splitlines()[0]}): {HOW_TO_INSTALL}") from None
    try:
        run.map_data(maps.get(map_name).path)
    except ValueError as error:
        raise NoSimulator(f"the map {map_name} is missing ({str(error).splitlines()[0]}): {HOW_TO_INSTALL}") from None


def engine() -> str:
    """Name and versions of the simulator, for dataset cards."""
    from pysc2 import run_configs

    packages = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("smacv2", "pysc2"))
    return f"StarCraft II {run_configs.get().version.game_version} ({packages})"


# ---------------------------------------------------------------- SMACv1's benchmark observation


def unit_features(game, units: dict, allies: bool) -> dict[str, np.ndarray]:
    """The observed features of each unit, [units, ...]: alive, x, y, health; and cooldown, shield and type where they
    exist."""
    units = list(units.values())
    shields = game.shield_bits_ally if allies else game.shield_bits_enemy
    features = {
        "alive": np.array([u.health > 0 for u in units]),
        "xy": np.array([(u.pos.x, u.pos.y) for u in units]),
        "health": np.array(
            [[u.health / u.health_max] + ([u.shield / game.unit_max_shield(u)] if shields else []) for u in units]
        ),
    }
    types = np.zeros((len(units), game.unit_type_bits))
    if game.unit_type_bits:
        types[np.arange(len(units)), [game.get_unit_type_id(u, allies) for u in units]] = 1
    healer = [allies and game.map_type == "MMM" and u.unit_type == game.medivac_id for u in units]
    cooldown = [
        (u.energy if heals else u.weapon_cooldown) / game.unit_max_cooldown(u) for u, heals in zip(units, healer)
    ]
    return features | {"type": types, "cooldown": np.array(cooldown)[:, None] if allies else None}


def benchmark_sizes(game) -> tuple[int, int]:
    """(O, S) of benchmark_view."""
    n, e, A, bits = game.n_agents, game.n_enemies, game.n_actions, game.unit_type_bits
    ally, enemy = 1 + game.shield_bits_ally + bits, 1 + game.shield_bits_enemy + bits
    observation = (n - 1) * (4 + ally + A) + e * (4 + enemy) + 4 + (4 + ally + A) + n
    state = (n - 1) * (7 + ally + A) + e * (7 + enemy) + 4 + (6 + ally + A) + n
    return observation, state


def benchmark_view(game) -> tuple[np.ndarray, np.ndarray]:
    """Observations [n, O] and agents' states [n, S] of the public SMACv1 datasets, from smacv2's game object.

    They are those of the MAPPO code's variant of SMAC (github.com/marlbenchmark/on-policy), with agent ids and last
    actions. Each vector has blocks for allies, enemies, available moves, the agent itself and its id. The state of
    agent i also holds the units that it does not see, and every unit's place on the map. Once the agent is dead, both
    are zero except for the id.
    """
    n, sight = game.n_agents, 9.0
    ally, enemy = unit_features(game, game.agents, True), unit_features(game, game.enemies, False)
    center, extent = np.array([game.map_x, game.map_y]) / 2, np.array([game.max_distance_x, game.max_distance_y])
    last, (O, S) = game.last_action, benchmark_sizes(game)
    observations, states = [], []
    for i in range(n):
        if not ally["alive"][i]:
            observations.append(np.zeros(O))
            states.append(np.zeros(S))
        else:
            available = np.array(game.get_avail_agent_actions(i))
            attackable = available[game.n_actions_no_attack :][: game.n_enemies, None]
            others = np.arange(n) != i
            a, e = {k: v[others] for k, v in ally.items()}, enemy
            a_delta, e_delta = (a["xy"] - ally["xy"][i]) / sight, (e["xy"] - ally["xy"][i]) / sight
            a_distance, e_distance = (
                np.linalg.norm(a_delta, axis=1, keepdims=True),
                np.linalg.norm(e_delta, axis=1, keepdims=True),
            )
            a_seen, e_seen = a_distance < 1, e_distance < 1
            a_center, e_center = (a["xy"] - center) / extent, (e["xy"] - center) / extent

            of_ally = np.hstack([np.ones_like(a_distance), a_distance, a_delta, a["health"], a["type"], last[others]])
            of_enemy = np.hstack([attackable, e_distance, e_delta, e["health"], e["type"]])
            own = np.concatenate([[1, 0, 0, 0], ally["health"][i], ally["type"][i], last[i]])
            of_ally, of_enemy = of_ally * (a_seen & a["alive"][:, None]), of_enemy * (e_seen & e["alive"][:, None])
            observations.append(np.concatenate([of_ally.ravel(), of_enemy.ravel(), available[2:6], own, np.zeros(n)]))

            of_ally = np.hstack(
                [a_seen, a_distance, a_delta, a["cooldown"], a["health"], a_center, a["type"], last[others]]
            )
            of_enemy = np.hstack([attackable, e_distance, e_delta, e_seen, e["health"], e["type"], e_center])
            own = np.concatenate(
                [[1, 0, 0, 0], ally["health"][i], (ally["xy"][i] - center) / extent, ally["type"][i], last[i]]
            )
            of_ally, of_enemy = of_ally * a["alive"][:, None], of_enemy * e["alive"][:, None]
            states.append(np.concatenate([of_ally.ravel(), of_enemy.ravel(), available[2:6], own, np.zeros(n)]))
        observations[i][-n + i] = states[i][-n + i] = 1
    return np.stack(observations), np.stack(states)


def unit_type_id(game, unit, ally: bool) -> int:
    """A unit's type on a SMAC map, numbered as in SMAC. (smacv2 gives allies the numbers of enemies.)"""
    return unit.unit_type - game._min_unit_type if ally else type(game).get_unit_type_id(game, unit, ally)


def empty_map(game):
    """Kills all units of a SMAC map. A trigger of the map then creates new ones at once.

    (smacv2's own function waits until it sees no unit, see its issue 55.)
    """
    game._obs = game._controller.observe()  # smacv2's last observation may be from a game that has died
    game._kill_units([unit.tag for unit in game._obs.observation.raw_data.units])
    game._controller.step(2)


# ---------------------------------------------------------------- the environment


class StarCraftEnv(SMACv2Env):
    """One game of StarCraft II. The first reset starts it.

    env "smacv2": the paper's 15 tasks RACE_SIZE. env "smacv1": SMAC's maps. Its interface "benchmark" has the public
    datasets' observations, and as state that of the first agent, as in OG-MARL's copies. "standard" has SMAC's own
    observation and state.

    A game takes its seed when it is launched. So set_seed takes effect at the next reset, which launches a new game.
    """

    def __init__(self, env: str, task: str, interface: str = "benchmark", device="cpu"):
        check_task(env, task)
        config = game_config(env, task)
        check_installed(config["map_name"])
        self.benchmark = env == "smacv1" and interface == "benchmark"
        super().__init__(**config, device=device)
        self.game = self._env.env if env == "smacv2" else self._env
        # smacv2's wrapper draws teams and positions, but repeats a failing reset forever. So _start_battle draws them.
        self.distributions = list(getattr(self._env, "env_key_to_distribution_map", {}).values())
        if env == "smacv1":
            self.game.get_unit_type_id = partial(unit_type_id, self.game)
            self.game._kill_all_units = partial(empty_map, self.game)
        self.undecided_reward = self.game.max_reward  # without the enemies' health, which is known only after a reset
        self.launch = True
        self.streams = (random.getstate(), np.random.get_state())

    def _init_env(self):
        """Does nothing. TorchRL's version resets, which would launch a game, and the first real reset a second one."""

    def _make_specs(self, env):
        super()._make_specs(env)
        n, device = self.n_agents, self.device
        O, S = benchmark_sizes(env) if self.benchmark else (env.get_obs_size(), env.get_state_size())
        flag = Binary(n=1, shape=(1,), dtype=torch.bool, device=device)
        mask = Binary(n=self.n_actions, shape=(n, self.n_actions), dtype=torch.bool, device=device)
        self.observation_spec = Composite(
            agents=Composite(observation=Unbounded((n, O), device=device), action_mask=mask, shape=(n,), device=device),
            state=Unbounded((S,), device=device), battle_won=flag, game_died=flag.clone(), device=device,
        )
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), device=device)

    @contextmanager
    def _own_random(self):
        """smacv2 draws from Python's and NumPy's global random streams. Within it, these are the environment's own."""
        outside = random.getstate(), np.random.get_state()
        random.setstate(self.streams[0])
        np.random.set_state(self.streams[1])
        try:
            yield
        finally:
            self.streams = random.getstate(), np.random.get_state()
            random.setstate(outside[0])
            np.random.set_state(outside[1])

    def _set_seed(self, seed: int | None):
        """Seeds the game, the teams and start positions, and the streams that smacv2 draws from."""
        if seed is None:
            return
        source = np.random.SeedSequence(seed)
        game, python, numpy, teams = source.spawn(4)
        self.game._seed = int(game.generate_state(1)[0] >> 1)  # the game takes a non-negative int32
        self.streams = (
            random.Random(int(python.generate_state(1)[0])).getstate(),
            np.random.RandomState(int(numpy.generate_state(1)[0])).get_state(),
        )
        pending = list(self.distributions)
        while pending:  # a distribution may hold others
            distribution = pending.pop()
            if hasattr(distribution, "rng"):
                distribution.rng = np.random.default_rng(teams.spawn(1)[0])
            pending += [
                value
                for value in vars(distribution).values()
                if hasattr(value, "generate") and value is not distribution
            ]
        self.launch = True

    def _view(self, battle_won: bool = False, game_died: bool = False) -> TensorDict:
        if self.benchmark:
            observation, states = benchmark_view(self.game)
            state = states[0]
        else:
            observation, state = np.stack(self.game.get_obs()), self.game.get_state()
        agents = {
            "observation": torch.as_tensor(observation, dtype=torch.float32),
            "action_mask": self._update_action_mask(),
        }
        flags = {"battle_won": torch.tensor([battle_won]), "game_died": torch.tensor([game_died])}
        agents = TensorDict(agents, [self.n_agents], device=self.device)
        state = torch.as_tensor(state, dtype=torch.float32)
        return TensorDict({"agents": agents, "state": state} | flags, [], device=self.device)

    def _start_battle(self):
        """Starts a new battle, and the game if it must. Raises what smacv2 raises, and ConnectionError if the game
        dies."""
        from pysc2.lib.protocol import ConnectionError as GameDied

        game, restarts = self.game, self.game.force_restarts
        if self.launch and game._sc2_proc is not None:
            game._sc2_proc.close()
        # smacv2 launches a game only while its count of episodes is 0. After that it reuses the running game.
        game._episode_count = 0 if self.launch else max(game._episode_count, 1)
        self.launch = False
        battle = {}
        for distribution in self.distributions:
            battle |= distribution.generate()
        try:
            game.reset(battle)
        except KeyError:  # smacv2 looks for units that a dead game has not created
            if game.force_restarts == restarts:
                raise
        if game.force_restarts > restarts:
            raise GameDied("the game died in a reset")
        # smacv2 takes the reward's scale from the enemies of its first battle, and adds them again each time it waits
        # for units. Here it is this battle's scale: a perfect victory is worth reward_scale_rate.
        game.max_reward = self.undecided_reward + sum(
            unit.health_max + unit.shield_max for unit in game.enemies.values()
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDict:
        from pysc2.lib import protocol
        from pysc2.lib.sc_process import SC2LaunchError
        from smacv2.env.starcraft2.starcraft2 import CannotResetException

        with self._own_random():
            for _ in range(RESTARTS):
                try:
                    self._start_battle()
                    return self._view()
                except (
                    protocol.ConnectionError,
                    protocol.ProtocolError,
                    SC2LaunchError,
                    CannotResetException,
                ) as error:
                    failure, self.launch = error, True
        raise BadInput(
            f"StarCraft II failed {RESTARTS} times in a row to start a battle ({failure}): look at the game's own log"
        )

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        restarts = self.game.force_restarts
        with self._own_random():
            reward, done, info = self._env.step(tensordict["agents", "action"].cpu().numpy())
            died = self.game.force_restarts > restarts
            out = self._view(bool(info.get("battle_won", False)), died)
        truncated = died or bool(info.get("episode_limit", False))
        flags = {"done": done, "terminated": done and not truncated, "truncated": truncated}
        out["reward"] = torch.tensor([reward], dtype=torch.float32, device=self.device)
        return out.update({key: torch.tensor([value], device=self.device) for key, value in flags.items()})
