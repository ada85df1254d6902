"""SMAX as a TorchRL environment: battles like StarCraft's, from JaxMARL (github.com/FLAIROX/JaxMARL), without the game.

    env = SMAXEnv("zerg_10_vs_11", num_envs=32)     # 32 battles, stepped by one compiled call
    env.set_seed(0)
    td = env.reset()

SMAX is not StarCraft II. It has six unit types with other stats, and none heals, splashes or explodes. Units move in
four directions on an empty 32 x 32 map, and die at its edge. The enemy is scripted: it shoots the closest unit, or
walks to one that it sees. Battles end after 101 steps (JaxMARL's limit of 100 counts from 0). A task has the name of
the SMAC task that it imitates. Results say that they are SMAX's: they name the engine().

TensorDict keys of B battles with n agents against m enemies:

    ("agents", "observation")  [B, n, O]  float32; all zero for a dead agent
    ("agents", "action_mask")  [B, n, A]  bool, the available actions; a dead agent can only stop (action 4)
    ("agents", "action")       [B, n]     int64: 0-3 move up, right, down and left, 4 stops, 5 + j attacks enemy j
    "state"                    [B, S]     float32, JaxMARL's world state, with positions over the map's size and
                                          cooldowns from 0 on
    "battle_won"               [B, 1]     bool, the allies have won this battle; it stays true until the next reset
    "reward"                   [B, 1]     float32: the share of its health that an enemy lost, averaged over enemies,
                                          and 1 for the victory
    "done", "terminated", "truncated"  [B, 1]  bool; truncated: the time limit; terminated: the battle is decided

No action is checked against its mask. SMAX treats an attack on a dead or distant enemy as a stop, and ignores the
actions of dead agents.

JAX computes on its own default device. On a GPU it reserves most of the memory at its first use. If PyTorch needs the
same GPU, set the environment variable XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import functools
import importlib.metadata
import inspect
import io
import sys

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from environments.checks import NoSimulator

# A task of SMACv2 is a race and a size. These are the units of each race that SMAX has.
RACES = {"protoss": ("stalker", "zealot"), "terran": ("marine", "marauder"), "zerg": ("zergling", "hydralisk")}
SIZES = {"5_vs_5": (5, 5), "10_vs_10": (10, 10), "10_vs_11": (10, 11), "20_vs_20": (20, 20), "20_vs_23": (20, 23)}
# SMACv1's maps whose units all exist in SMAX: allies, enemies.
SMACV1_TASKS = {
    "3m": ({"marine": 3}, {"marine": 3}),
    "8m": ({"marine": 8}, {"marine": 8}),
    "25m": ({"marine": 25}, {"marine": 25}),
    "5m_vs_6m": ({"marine": 5}, {"marine": 6}),
    "10m_vs_11m": ({"marine": 10}, {"marine": 11}),
    "27m_vs_30m": ({"marine": 27}, {"marine": 30}),
    "2s3z": ({"stalker": 2, "zealot": 3}, {"stalker": 2, "zealot": 3}),
    "3s5z": ({"stalker": 3, "zealot": 5}, {"stalker": 3, "zealot": 5}),
    "3s5z_vs_3s6z": ({"stalker": 3, "zealot": 5}, {"stalker": 3, "zealot": 6}),
    "3s_vs_5z": ({"stalker": 3}, {"zealot": 5}),
    "6h_vs_8z": ({"hydralisk": 6}, {"zealot": 8}),
    "corridor": ({"zealot": 6}, {"zergling": 24}),
}
UNITS = ("marine", "marauder", "stalker", "zealot", "zergling", "hydralisk")  # JaxMARL's order
TASKS = [f"{race}_{size}" for race in RACES for size in SIZES] + list(SMACV1_TASKS)


def import_jaxmarl():
    """Imports JaxMARL's SMAX, without the lines that it prints. The import replaces sys.stdout and sys.stderr, so they
    are put back."""
    streams = sys.stdout, sys.stderr, sys.__stdout__
    sys.stdout = sys.__stdout__ = io.StringIO()
    try:
        import jaxmarl.environments.smax  # noqa: F401
    finally:
        sys.stdout, sys.stderr, sys.__stdout__ = streams


def check_task_name(task: str):
    """Raises NoSimulator for a task that SMAX does not have."""
    if task == "2c_vs_64zg":
        raise NoSimulator("smax can't play 2c_vs_64zg: it has no colossus")
    if task not in TASKS:
        raise NoSimulator(
            f"unknown smax task '{task}': use RACE_SIZE with {', '.join(RACES)} and {', '.join(SIZES)}, or one of "
            f"{', '.join(SMACV1_TASKS)}"
        )


def check_task(task: str):
    """Raises NoSimulator for a task that SMAX does not have, or if jaxmarl is not installed."""
    check_task_name(task)
    try:
        import_jaxmarl()
    except ImportError as error:
        remedy = (
            "pip install -r requirements-smax.txt, in an environment of its own "
            "(it needs another version of protobuf than smacv2)"
        )
        raise NoSimulator(f"smax needs jaxmarl ({error}): {remedy}") from None


def team_units(task: str) -> tuple[int, int, tuple[str, ...]]:
    """(allies, enemies, the unit types in the order of their bits in the state) of a task."""
    if task in SMACV1_TASKS:
        n, m = (sum(team.values()) for team in SMACV1_TASKS[task])
        return n, m, UNITS
    race, size = task.split("_", 1)
    return *SIZES[size], RACES[race]


def engine() -> str:
    """Name and versions of the simulator, for dataset cards."""
    return "SMAX (" + ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jaxmarl", "jax")) + ")"


def make_simulator(task: str):
    """JaxMARL's environment of one battle against its built-in enemy."""
    import jax
    import jax.numpy as jnp
    from jaxmarl.environments.smax import SMAX, HeuristicEnemySMAX, Scenario

    defaults = {name: p.default for name, p in inspect.signature(SMAX.__init__).parameters.items()}
    names = defaults["unit_type_names"]
    if task in SMACV1_TASKS:
        teams = SMACV1_TASKS[task]
        types = [names.index(unit) for team in teams for unit, count in team.items() for _ in range(count)]
        n, m = (sum(team.values()) for team in teams)
        return HeuristicEnemySMAX(scenario=Scenario(jnp.array(types, jnp.uint8), n, m, False, False))

    # Every unit type is equally likely, as in SMACv2 without its third type. The tables keep only the race's rows.
    race, size = task.split("_", 1)
    n, m = SIZES[size]
    rows = [names.index(unit) for unit in RACES[race]]
    tables = {name: defaults[name] for name in defaults if name.startswith("unit_type_")}
    tables = {
        name: [table[i] for i in rows] if isinstance(table, list) else table[jnp.array(rows)]
        for name, table in tables.items()
    }
    simulator = HeuristicEnemySMAX(scenario=Scenario(jnp.zeros(n + m, jnp.uint8), n, m, True, True), **tables)

    # The first n enemies have the allies' types, as in SMACv2. JaxMARL leaves the other enemies at type 0, since it
    # drops what it draws for them. So they are drawn here.
    generator = simulator.unit_type_generator
    mirrored = generator.generate

    def generate(key):
        enemy_key, _ = jax.random.split(key)
        return mirrored(key).at[2 * n :].set(jax.random.randint(enemy_key, (m - n,), 0, len(rows), jnp.uint8))

    generator.generate = generate
    return simulator


@functools.cache
def compiled(task: str):
    """(simulator, reset, step): JaxMARL's environment of one battle, and functions that play B battles at once.

    A battle is {"key": its random key, "world": JaxMARL's state}. Don't use battles after they were given to reset or
    step: JAX reuses their memory.

    reset(battles, which [B] bool)                        -> battles, view
    step(battles, action [B, n] int, which [B] bool)      -> battles, view with reward, terminated, truncated and done

    The result is cached, so a process compiles each task once.
    """
    import jax
    import jax.numpy as jnp

    simulator = make_simulator(task)
    n = simulator.num_allies
    teams = lambda alive: (alive[:n].any(), alive[n:].any())
    # Battles from JaxMARL's reset and from its step differ in JAX's weak types, so step would compile twice. jnp.where
    # with an old battle gives both the same types.
    choose = lambda which, new, old: jax.tree.map(lambda x, y: jnp.where(which, x, y), new, old)

    def scaled_state(world):
        """The state with positions in [0, 1] and no negative cooldowns. In JaxMARL positions go up to 32, and the
        cooldown of a weapon that is not used falls without bound. That is bad input for a mixer."""
        state, F = simulator.get_world_state(world), len(simulator.own_features)
        units, rest = jnp.split(state, [F * simulator.num_agents])
        units = (
            units.reshape(-1, F)
            .at[:, 1:3]
            .divide(jnp.array([simulator.map_width, simulator.map_height]))
            .at[:, 3]
            .max(0)
        )
        return jnp.concatenate([units.reshape(-1), rest])

    def view(world):
        observation, mask = simulator.get_obs(world), simulator.get_avail_actions(world)
        allies, enemies = teams(world.state.unit_alive)
        return {
            "observation": jnp.stack([observation[agent] for agent in simulator.agents]),
            "action_mask": jnp.stack([mask[agent] for agent in simulator.agents]).astype(bool),
            "state": scaled_state(world),
            "battle_won": (allies & ~enemies)[None],
        }

    def reset(battle, which):
        key, now = jax.random.split(battle["key"])
        _, world = simulator.reset(now)
        battle = choose(which, {"key": key, "world": world}, battle)
        return battle, view(battle["world"])

    def step(battle, action, which):
        key, now = jax.random.split(battle["key"])
        _, world, reward, _, _ = simulator.step_env(now, battle["world"], dict(zip(simulator.agents, action)))
        playing = which & ~battle["world"].state.done
        battle = choose(playing, {"key": key, "world": world}, battle)
        allies, enemies = teams(battle["world"].state.unit_alive)
        terminated, over = ~which | ~(allies & enemies), battle["world"].state.done
        out = {
            "reward": jnp.where(playing, reward["ally_0"], 0.0),
            "terminated": terminated,
            "truncated": over & ~terminated,
            "done": over | terminated,
        }
        return battle, view(battle["world"]) | {name: x[None] for name, x in out.items()}

    batched = lambda function: jax.jit(jax.vmap(function), donate_argnums=0)
    return simulator, batched(reset), batched(step)


class SMAXEnv(EnvBase):
    """`num_envs` battles of one task, stepped together by one compiled call. JaxMARL's automatic resets are not used.

    Battles that "_step" does not select stand still, as in every environment here. So do battles that are over, until
    they are reset.
    """

    batch_locked = True

    def __init__(self, task: str, num_envs: int, device="cpu"):
        super().__init__(device=device, batch_size=torch.Size([num_envs]))
        check_task(task)
        import jax
        import jax.numpy as jnp

        self.simulator, self.compiled_reset, self.compiled_step = compiled(task)
        self.n = self.simulator.num_allies
        # Empty battles, which the first reset replaces. They are put on a device, as the results of compiled calls are.
        # Otherwise step would compile twice.
        _, world = jax.eval_shape(self.simulator.reset, jax.random.PRNGKey(0))
        self.jax_device = jax.devices()[0]
        self.battles = {
            "world": jax.device_put(
                jax.tree.map(lambda x: jnp.zeros((num_envs, *x.shape), x.dtype), world), self.jax_device
            )
        }
        self._set_seed(None)
        # JAX takes actions and flags without a copy if they are already on this device.
        self.torch_device = torch.from_dlpack(self.battles["key"]).device

        B, n = num_envs, self.n
        O, S, A = self.simulator.obs_size, self.simulator.state_size, self.simulator.num_ally_actions
        flag = Binary(n=1, shape=(B, 1), dtype=torch.bool, device=device)
        mask = Binary(n=A, shape=(B, n, A), dtype=torch.bool, device=device)
        self.observation_spec = Composite(
            agents=Composite(
                observation=Unbounded((B, n, O), device=device), action_mask=mask, shape=(B, n), device=device
            ),
            state=Unbounded((B, S), device=device),
            battle_won=flag,
            shape=(B,),
            device=device,
        )
        self.action_spec = Composite(
            agents=Composite(
                action=Categorical(A, shape=(B, n), dtype=torch.int64, device=device), shape=(B, n), device=device
            ),
            shape=(B,),
            device=device,
        )
        self.reward_spec = Unbounded((B, 1), device=device)
        self.done_spec = Composite(
            done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=(B,), device=device
        )

    def _set_seed(self, seed: int | None):
        """Gives every battle its own random stream. All its later steps and resets draw from it."""
        import jax

        streams = np.random.SeedSequence(seed).spawn(self.batch_size[0])
        self.battles["key"] = jax.device_put(
            np.stack([stream.generate_state(2) for stream in streams]), self.jax_device
        )

    def _to_jax(self, x: torch.Tensor):
        import jax

        return jax.dlpack.from_dlpack(x.detach().to(self.torch_device).contiguous())

    def _to_torch(self, view: dict) -> TensorDict:
        view = {name: torch.from_dlpack(x).to(self.device) for name, x in view.items()}
        agents = {name: view.pop(name) for name in ("observation", "action_mask")}
        agents = TensorDict(agents, [*self.batch_size, self.n], device=self.device)
        return TensorDict(view | {"agents": agents}, self.batch_size, device=self.device)

    def _selected(self, tensordict: TensorDictBase | None, name: str):
        """[B] bool for JAX: the battles that a flag of TorchRL selects. Without the flag these are all."""
        flag = None if tensordict is None else tensordict.get(name, None)
        return self._to_jax(torch.ones(self.batch_size, dtype=torch.bool) if flag is None else flag.reshape(-1))

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDict:
        self.battles, view = self.compiled_reset(self.battles, self._selected(tensordict, "_reset"))
        return self._to_torch(view).update(self.full_done_spec.zero())

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        """Steps the battles that "_step" selects, or all. The others' entries repeat, with reward 0."""
        action = self._to_jax(tensordict["agents", "action"])
        self.battles, view = self.compiled_step(self.battles, action, self._selected(tensordict, "_step"))
        return self._to_torch(view)
