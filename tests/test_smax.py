"""SMAX: the environment against JaxMARL called directly, one battle at a time."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torchrl.envs.utils import check_env_specs, step_mdp

import environments.smax
from environments.checks import BadInput, NoSimulator
from environments.smax import RACES, SIZES, SMACV1_TASKS, TASKS, SMAXEnv, check_task, engine, make_simulator

needs_jaxmarl = pytest.mark.skipif(
    importlib.util.find_spec("jaxmarl") is None, reason="no jaxmarl: pip install -r requirements-smax.txt"
)
B = 8  # one width for (nearly) all tests, since another one would compile again
KEYS = ["state", "battle_won", ("agents", "observation"), ("agents", "action_mask")]
STOP = 4


@pytest.fixture
def env():
    return SMAXEnv("zerg_5_vs_5", B)


@pytest.fixture
def twin():
    return SMAXEnv("zerg_5_vs_5", B)


def random_actions(td, generator) -> torch.Tensor:
    """[B, n]: one of the available actions of each agent."""
    mask = td["agents", "action_mask"]
    return torch.multinomial(mask.flatten(0, 1).float(), 1, generator=generator).view(mask.shape[:2])


def attack(td, n=5, m=5, unit=9) -> torch.Tensor:
    """Actions [B, n]: shoot the first enemy in range, else walk to the first in sight, else to the map's middle."""
    obs, mask = td["agents", "observation"], td["agents", "action_mask"]
    enemies, own = (
        obs[..., (n - 1) * unit : (n - 1 + m) * unit].unflatten(-1, (m, unit)),
        obs[..., (n - 1 + m) * unit :],
    )
    seen, first = (enemies[..., 0] > 0).any(-1, keepdim=True), (enemies[..., 0] > 0).float().argmax(-1)
    to_enemy = enemies[..., 1:3].gather(2, first[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    toward = torch.where(seen, to_enemy, 0.5 - own[..., 1:3])
    walk = (toward @ torch.tensor([[0.0, 1, 0, -1], [1, 0, -1, 0]])).argmax(-1)
    shoot = mask[..., 5:].float().argmax(-1) + 5
    return torch.where(mask[..., 5:].any(-1), shoot, torch.where(mask[..., 0], walk, STOP))


def stop(td) -> torch.Tensor:
    return torch.full(td["agents", "action_mask"].shape[:2], STOP)


def play(env, act, seed: int = 0) -> tuple[torch.Tensor, list]:
    """Plays one battle to its end in each environment: [B] wins, and every step."""
    env.set_seed(seed)
    td, steps = env.reset(), []
    alive = torch.ones(env.batch_size, dtype=torch.bool)
    while alive.any():
        td["agents", "action"] = act(td)
        td = env.step(td.set("_step", alive))
        steps.append(td)
        alive = alive & ~td["next", "done"][:, 0]
        td = step_mdp(td)
    return td["battle_won"][:, 0], steps


def units(env) -> dict[str, np.ndarray]:
    """JaxMARL's own record of the battles, copied."""
    world = env.battles["world"].state
    return {name: np.array(getattr(world, name)) for name in ("unit_alive", "unit_health", "unit_types", "step")}


def same(a, b, which=slice(None)) -> bool:
    return all(torch.equal(a[key][which], b[key][which]) for key in KEYS)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("task", ["nonsense", "human_5_vs_5", "zerg_6_vs_6", "zerg", "2c_vs_64zg", "MMM2", ""])
def test_unknown_tasks_are_refused_in_one_line(task, monkeypatch):
    monkeypatch.setattr(environments.smax, "import_jaxmarl", lambda: pytest.fail("a name must not need jaxmarl"))
    with pytest.raises(NoSimulator) as refused:
        check_task(task)
    message = str(refused.value)
    assert isinstance(refused.value, BadInput) and "\n" not in message
    if task == "2c_vs_64zg":
        assert "no colossus" in message
    else:
        assert all(word in message for word in (*RACES, *SIZES, *SMACV1_TASKS))


def test_missing_jaxmarl_names_the_remedy(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "jaxmarl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jaxmarl", None)
    streams = sys.stdout, sys.stderr, sys.__stdout__
    with pytest.raises(NoSimulator, match=r"smax needs jaxmarl \(.*\): pip install -r requirements-smax.txt"):
        check_task("zerg_5_vs_5")
    assert (sys.stdout, sys.stderr, sys.__stdout__) == streams


def test_importing_the_file_leaves_jax_alone():
    code = "import sys, environments.smax; sys.exit('jax' in sys.modules or 'jaxmarl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@needs_jaxmarl
def test_jaxmarl_is_imported_without_a_word():
    result = subprocess.run(
        [sys.executable, "-c", "import environments.smax; environments.smax.check_task('3m'); print('done')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.stdout == "done\n"


@needs_jaxmarl
def test_engine():
    assert (
        engine() == f"SMAX (jaxmarl {importlib.metadata.version('jaxmarl')}, jax {importlib.metadata.version('jax')})"
    )


# ---------------------------------------------------------------- tasks


@needs_jaxmarl
@pytest.mark.parametrize("task", TASKS)
def test_sizes(task):
    """An agent sees 7 entries and the type of each other unit, and 4 entries and the type of itself.

    The state has 6 entries and the type of every unit.
    """
    check_task(task)
    simulator = make_simulator(task)
    n, m = (sum(team.values()) for team in SMACV1_TASKS[task]) if task in SMACV1_TASKS else SIZES[task.split("_", 1)[1]]
    types = 6 if task in SMACV1_TASKS else 2
    assert (simulator.num_allies, simulator.num_enemies, simulator.max_steps) == (n, m, 100)
    assert (simulator.obs_size, simulator.state_size, simulator.num_ally_actions) == (
        (n + m - 1) * (7 + types) + 4 + types,
        (n + m) * (6 + types),
        5 + m,
    )


@needs_jaxmarl
@pytest.mark.parametrize("task", [task for task in SMACV1_TASKS if task != "corridor"])
def test_maps_of_smacv1_are_jaxmarls(task):
    check_task(task)
    from jaxmarl.environments.smax import map_name_to_scenario

    ours, theirs = make_simulator(task), map_name_to_scenario(task)
    np.testing.assert_array_equal(ours.scenario, theirs.unit_types)
    assert not ours.smacv2_position_generation and not ours.smacv2_unit_type_generation


@needs_jaxmarl
def test_corridor():
    check_task("corridor")
    simulator = make_simulator("corridor")
    assert [simulator.unit_type_names[i] for i in simulator.scenario] == ["zealot"] * 6 + ["zergling"] * 24


@needs_jaxmarl
@pytest.mark.parametrize("race", RACES)
def test_a_race_has_its_own_units_alone(race):
    check_task(f"{race}_5_vs_5")
    from jaxmarl.environments.smax import SMAX

    ours, all_units = make_simulator(f"{race}_5_vs_5"), SMAX()
    assert ours.unit_type_names == list(RACES[race]) and ours.smacv2_position_generation
    assert ours.smacv2_unit_type_generation
    rows = [all_units.unit_type_names.index(name) for name in RACES[race]]
    for table in ("velocities", "attacks", "attack_ranges", "sight_ranges", "radiuses", "health", "weapon_cooldowns"):
        np.testing.assert_array_equal(
            getattr(ours, f"unit_type_{table}"), np.array(getattr(all_units, f"unit_type_{table}"))[rows]
        )
    assert ours.unit_type_shorthands == [all_units.unit_type_shorthands[i] for i in rows]


@needs_jaxmarl
@pytest.mark.parametrize("task", ["protoss_5_vs_5", "terran_10_vs_11", "zerg_20_vs_23"])
def test_teams_are_mirrored_and_further_enemies_drawn(task):
    check_task(task)
    import jax

    simulator = make_simulator(task)
    n = simulator.num_allies
    types = np.array(jax.vmap(simulator.unit_type_generator.generate)(jax.random.split(jax.random.PRNGKey(0), 4000)))
    allies, mirror, further = types[:, :n], types[:, n : 2 * n], types[:, 2 * n :]
    assert types.dtype == np.uint8 and set(types.flatten()) == {0, 1}
    np.testing.assert_array_equal(allies, mirror)
    # 0.04 is five standard deviations
    assert (abs(allies.mean(0) - 0.5) < 0.04).all() and (abs(further.mean(0) - 0.5) < 0.04).all()
    drawn = np.hstack([allies, further])
    correlation = np.corrcoef(drawn.T) - np.eye(drawn.shape[1])
    assert (abs(correlation) < 0.09).all()


# ---------------------------------------------------------------- battles


@needs_jaxmarl
def test_torchrl_specs(env):
    check_env_specs(env)
    td = env.rollout(3)
    assert td["agents", "action"].dtype == torch.int64 and td["agents", "action_mask"].dtype == torch.bool
    assert td["state"].dtype == td["agents", "observation"].dtype == td["next", "reward"].dtype == torch.float32


def raw_environment(task: str):
    """JaxMARL's environment, with the numbers of SMAX's zergling and hydralisk written out."""
    from jax import numpy as jnp
    from jaxmarl.environments.smax import HeuristicEnemySMAX, Scenario, map_name_to_scenario

    if task == "3s_vs_5z":
        return HeuristicEnemySMAX(scenario=map_name_to_scenario(task))
    table = lambda zergling, hydralisk: jnp.array([zergling, hydralisk])
    return HeuristicEnemySMAX(
        scenario=Scenario(jnp.zeros((10,), dtype=jnp.uint8), 5, 5, True, True),
        unit_type_names=["zergling", "hydralisk"],
        unit_type_shorthands=["z", "h"],
        unit_type_velocities=table(4.13, 3.15),
        unit_type_attacks=table(5.0, 12.0),
        unit_type_attack_ranges=table(2.0, 5.0),
        unit_type_sight_ranges=table(8.0, 9.0),
        unit_type_radiuses=table(0.375, 0.625),
        unit_type_health=table(35.0, 80.0),
        unit_type_weapon_cooldowns=table(0.5, 0.59),
    )


@needs_jaxmarl
@pytest.mark.parametrize("task, width", [("zerg_5_vs_5", B), ("3s_vs_5z", 2)])
def test_agrees_with_jaxmarl_step_by_step(task, width):
    """Two battles of random play to their ends. JaxMARL plays them one at a time, with the keys as documented."""
    env = SMAXEnv(task, width)
    import jax

    raw = raw_environment(task)
    env.set_seed(11)
    td, generator = env.reset(), torch.Generator().manual_seed(0)
    split = lambda key: jax.random.split(key)
    battles = {}
    for i, stream in enumerate(np.random.SeedSequence(11).spawn(width)[:2]):
        key, now = split(jax.numpy.array(stream.generate_state(2)))
        battles[i] = key, *raw.reset(now)

    def compare(i, observation, world):
        close = lambda got, wanted: np.testing.assert_allclose(got[i].numpy(), wanted, rtol=1e-5, atol=1e-5)
        masks = raw.get_avail_actions(world)
        state, F = np.array(observation["world_state"]), len(raw.own_features)
        for unit in range(raw.num_agents):  # health, x, y, cooldown and type
            state[F * unit + 1 : F * unit + 3] /= 32
            state[F * unit + 3] = max(state[F * unit + 3], 0)
        close(td["state"], state)
        for a, name in enumerate(raw.agents):
            close(td["agents", "observation"][:, a], observation[name])
            np.testing.assert_array_equal(td["agents", "action_mask"][i, a].numpy(), masks[name])

    for i, (_, observation, world) in battles.items():
        compare(i, observation, world)
    steps = 0
    while battles:
        actions = random_actions(td, generator)
        td["agents", "action"] = actions
        after = env.step(td)["next"]
        td = step_mdp(td)
        steps += 1
        for i, (key, _, world) in list(battles.items()):
            key, now = split(key)
            observation, world, reward, done, _ = raw.step_env(
                now, world, {name: int(a) for name, a in zip(raw.agents, actions[i])}
            )
            compare(i, observation, world)
            assert after["reward"][i].item() == pytest.approx(float(reward["ally_0"]), abs=1e-6)
            assert after["done"][i].item() == bool(done["__all__"])
            battles[i] = key, observation, world
            if done["__all__"]:
                del battles[i]
    assert steps > 10


@needs_jaxmarl
def test_time_limit_and_decided_battles_and_who_won(env):
    """Standing still runs some battles into the time limit. Attacking wins some and loses some.

    Which battle ended how is read off the units' health.
    """
    seen = set()
    for act in (stop, attack):
        wins, steps = play(env, act, seed=2)
        health, limit = units(env)["unit_health"], units(env)["step"] > 100
        allies, enemies = (health[:, :5] > 0).any(1), (health[:, 5:] > 0).any(1)
        np.testing.assert_array_equal(wins.numpy(), allies & ~enemies)
        ended = {"terminated": torch.zeros(B, dtype=torch.bool), "truncated": torch.zeros(B, dtype=torch.bool)}
        won_before = torch.zeros(B, dtype=torch.bool)
        for step in steps:
            after = step["next"][step["_step"]]
            assert torch.equal(after["done"], after["terminated"] | after["truncated"])
            assert not (after["terminated"] & after["truncated"]).any()
            for name in ended:
                ended[name][step["_step"]] |= after[name][:, 0]
            won = step["next", "battle_won"][:, 0]
            assert (won | ~won_before).all(), "a victory must stay"
            assert (won & ~won_before <= step["next", "terminated"][:, 0]).all()
            won_before = won
        np.testing.assert_array_equal(ended["truncated"].numpy(), allies & enemies)
        np.testing.assert_array_equal(ended["terminated"].numpy(), ~(allies & enemies))
        assert limit[ended["truncated"]].all()
        returns = sum(step["next", "reward"][:, 0] for step in steps)
        lost = 1 - (health[:, 5:] / np.where(units(env)["unit_types"][:, 5:] == 0, 35, 80)).mean(1)
        np.testing.assert_allclose(returns.numpy(), lost + wins.numpy(), atol=1e-4)
        seen |= {("truncated", bool(x)) for x in ended["truncated"]} | {
            ("won", bool(x)) for x in wins[ended["terminated"]]
        }
        env.reset()
    assert seen == {("truncated", True), ("truncated", False), ("won", True), ("won", False)}


@needs_jaxmarl
def test_a_draw_is_no_victory(env):
    """All units of battle 0 and the enemies of battle 1 are dead; the others fight on."""
    env.set_seed(0)
    td, world = env.reset(), env.battles["world"]
    health = world.state.unit_health.at[0].set(0).at[1, 5:].set(0)
    env.battles["world"] = world.replace(state=world.state.replace(unit_health=health))
    td["agents", "action"] = stop(td)
    after = env.step(td)["next"]
    assert after["battle_won"][:, 0].tolist() == [False, True] + [False] * (B - 2)
    assert after["terminated"][:, 0].tolist() == [True, True] + [False] * (B - 2) and not after["truncated"].any()
    assert after["reward"][0] == 0 and after["reward"][1] == 1


@needs_jaxmarl
def test_dead_agents(env):
    """A dead agent sees nothing and has its stop alone; a living one may always stop and move."""
    _, steps = play(env, attack)
    deaths = 0
    for step in steps:
        mask, observation = step["agents", "action_mask"], step["agents", "observation"]
        dead = observation[..., 9 * 9] == 0  # own health, behind the nine others' entries
        assert (observation[dead] == 0).all()
        assert (mask[dead] == torch.eye(10, dtype=torch.bool)[STOP]).all()
        assert mask[~dead][:, :5].all()
        deaths += dead.sum().item()
    assert deaths > 0


@needs_jaxmarl
def test_forbidden_actions_pass_as_a_stop(env, twin):
    """Attacks on enemies out of reach move nobody and hurt nobody. (Others see what an agent aimed at.)"""
    for e in (env, twin):
        e.set_seed(0)
    td, other = env.reset(), twin.reset()
    chosen = torch.where(td["agents", "action_mask"][..., -1], STOP, 9)
    assert (chosen == 9).any()
    td["agents", "action"], other["agents", "action"] = chosen, stop(other)
    assert torch.equal(env.step(td)["next", "state"], twin.step(other)["next", "state"])


# ---------------------------------------------------------------- seeds


@needs_jaxmarl
def test_seeds(env, twin):
    wins, steps = play(env, attack, seed=3)
    again, repeated = play(twin, attack, seed=3)
    assert torch.equal(wins, again) and len(steps) == len(repeated)
    assert all(same(a["next"], b["next"]) for a, b in zip(steps, repeated))
    assert torch.equal(play(env, attack, seed=3)[0], wins)
    start, other = steps[0], play(env, attack, seed=4)[1][0]
    assert not torch.equal(start["state"], other["state"])
    assert len(torch.unique(start["state"], dim=0)) == B, "battles of one environment must not start alike"


@needs_jaxmarl
def test_later_resets_differ_and_repeat_for_a_seed(env):
    env.set_seed(0)
    starts = [env.reset() for _ in range(3)]
    assert not same(starts[0], starts[1]) and not same(starts[1], starts[2])
    env.set_seed(0)
    assert all(same(start, env.reset()) for start in starts)


@needs_jaxmarl
def test_unseeded_environments_differ(env, twin):
    assert not same(env.reset(), twin.reset())


# ---------------------------------------------------------------- partial steps and resets


@needs_jaxmarl
def test_partial_step_leaves_the_other_battles_where_they_are(env, twin):
    for e in (env, twin):
        e.set_seed(0)
    td, free = env.reset(), twin.reset()
    start = td.clone()
    moving = torch.arange(B) % 2 == 0
    for t in range(6):
        td["agents", "action"], free["agents", "action"] = attack(td), attack(free)
        held, free = env.step(td.set("_step", moving if t % 2 else moving[:, None]))["next"], step_mdp(twin.step(free))
        assert same(held, free, moving) and same(held, start, ~moving)
        assert (held["reward"][~moving] == 0).all() and held["terminated"][~moving].all()
        assert not held["truncated"].any()
        td = held.select(*KEYS)
    # The battles that stood still now go through their first steps, as the twin's did.
    twin.set_seed(0)
    free = twin.reset()
    for _ in range(6):
        td["agents", "action"], free["agents", "action"] = attack(td), attack(free)
        td, free = step_mdp(env.step(td)), step_mdp(twin.step(free))
        assert same(td, free, ~moving)


@needs_jaxmarl
def test_partial_reset_leaves_the_other_battles_where_they_are(env, twin):
    for e in (env, twin):
        e.set_seed(0)
    td, free = env.reset(), twin.reset()
    start = td.clone()
    for _ in range(4):
        td["agents", "action"], free["agents", "action"] = attack(td), attack(free)
        td, free = step_mdp(env.step(td)), step_mdp(twin.step(free))
    fresh = torch.zeros(B, 1, dtype=torch.bool)
    fresh[2] = True
    others = ~fresh[:, 0]
    reset = env.reset(td.clone().set("_reset", fresh))
    assert same(reset, td, others)
    assert not torch.equal(reset["state"][2], td["state"][2]) and not torch.equal(reset["state"][2], start["state"][2])
    assert not reset["done"][2] and units(env)["step"][2] == 0 and (units(env)["step"][others] == 4).all()
    td = reset.select(*KEYS)
    for _ in range(4):
        td["agents", "action"], free["agents", "action"] = attack(td), attack(free)
        td, free = step_mdp(env.step(td)), step_mdp(twin.step(free))
        assert same(td, free, others)


@needs_jaxmarl
def test_battles_that_are_over_stand_still_until_their_reset(env):
    _, steps = play(env, stop, seed=2)
    before = units(env)
    last = {name: steps[-1]["next", name].clone() for name in KEYS}
    ends = torch.stack([step["next", "truncated"] for step in steps]).any(0)
    td = step_mdp(steps[-1])
    td["agents", "action"] = torch.zeros(B, 5, dtype=torch.int64)
    after = env.step(td)["next"]
    assert all(torch.equal(after[name], last[name]) for name in KEYS)
    assert (after["reward"] == 0).all() and after["done"].all()
    assert torch.equal(after["truncated"], ends) and torch.equal(after["terminated"], ~ends)
    assert all((units(env)[name] == before[name]).all() for name in before)


@needs_jaxmarl
def test_rollout_resets_battles_that_are_over(env):
    """TorchRL's own collection over several battles: the row after an end is the start of another battle."""
    env.set_seed(0)
    td = env.rollout(60, break_when_any_done=False)
    over = td["next", "done"][:, :-1, 0]
    assert over.sum() >= B
    before, after = td["next"][:, :-1], td[:, 1:]
    health = lambda x: x["state"][..., : 10 * 6].unflatten(-1, (10, 6))[..., 0]
    assert ((health(before)[over][:, :5] == 0).all(1) | (health(before)[over][:, 5:] == 0).all(1)).all()
    assert (health(after)[over] == 1).all() and not after["battle_won"][over].any()
    assert torch.equal(before["state"][~over], after["state"][~over])


# ---------------------------------------------------------------- between JAX and PyTorch


@needs_jaxmarl
def test_earlier_tensors_keep_their_values(env):
    """Tensors are JAX's memory, and a step gives its battles' memory back: nothing that was handed out may change."""
    env.set_seed(0)
    td, shown, copied = env.reset(), [], []
    for _ in range(10):
        shown.append(td.select(*KEYS))
        copied.append(td.select(*KEYS).clone())
        td["agents", "action"] = attack(td)
        td = step_mdp(env.step(td))
    assert all(same(a, b) for a, b in zip(shown, copied))
    env.set_seed(0)
    td = env.reset()
    for before in copied:  # nor may what a user does to them reach the battles
        assert same(td, before)
        action = attack(td)
        for key in KEYS:
            td[key].zero_()
        td["agents", "action"] = action
        td = step_mdp(env.step(td))


@needs_jaxmarl
def test_actions_and_flags_of_any_memory_layout_and_one_compilation(env, twin):
    """Slices, strides and int64 give what plain tensors give, and nothing makes JAX compile reset or step again."""
    for e in (env, twin):
        e.set_seed(5)
    td, free = env.reset(), twin.reset()
    compilations = lambda: (env.compiled_reset._cache_size(), env.compiled_step._cache_size())
    twin.step(free.clone().set(("agents", "action"), attack(free)))
    before = compilations()  # more than one of each, if another test of this process had another number of battles
    twin.set_seed(5)
    free = twin.reset()
    for t in range(5):
        plain = attack(td)
        odd = torch.cat([torch.zeros(1, dtype=torch.int64), plain.T.flatten()])[1:].view(5, B).T
        assert torch.equal(odd, plain) and not odd.is_contiguous()
        td["agents", "action"], free["agents", "action"] = odd, plain
        td["_step"] = torch.ones(B + t + 1, dtype=torch.bool)[t + 1 :]
        td, free = step_mdp(env.step(td)), step_mdp(twin.step(free))
        assert same(td, free)
    for flag in (torch.ones(B + 3, 1, dtype=torch.bool)[3:], torch.zeros(B, 1, dtype=torch.bool)):
        td = env.reset(td.set("_reset", flag))
        td["agents", "action"] = stop(td)
        td = step_mdp(env.step(td))
    env.set_seed(1)
    env.reset()
    assert compilations() == before and min(before) >= 1
