"""StarCraft II's environment: the real smacv2 package plays on the stand-in for the game of starcraft.py."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchrl.envs import ParallelEnv
from torchrl.envs.utils import check_env_specs

pytest.importorskip("smacv2.env")

import starcraft

import environments.starcraft
from comadice_eval import evaluate
from environments.checks import BadInput, NoSimulator
from environments.starcraft import SMACV2_TASKS, StarCraftEnv
from offline_data.collect import EpisodeSplitter

# Table 3: agents, state, observation, actions.
TABLE3 = {
    "2c_vs_64zg": (2, 675, 478, 70), "5m_vs_6m": (5, 156, 124, 12), "6h_vs_8z": (6, 213, 172, 14),
    "corridor": (6, 435, 346, 30),
    "protoss_5_vs_5": (5, 130, 92, 11), "protoss_10_vs_10": (10, 310, 182, 16), "protoss_10_vs_11": (10, 327, 191, 17),
    "protoss_20_vs_20": (20, 820, 362, 26), "protoss_20_vs_23": (20, 901, 389, 29),
    "terran_5_vs_5": (5, 120, 82, 11), "terran_10_vs_10": (10, 290, 162, 16), "terran_10_vs_11": (10, 306, 170, 17),
    "terran_20_vs_20": (20, 780, 322, 26), "terran_20_vs_23": (20, 858, 346, 29),
    "zerg_5_vs_5": (5, 120, 82, 11), "zerg_10_vs_10": (10, 290, 162, 16), "zerg_10_vs_11": (10, 306, 170, 17),
    "zerg_20_vs_20": (20, 780, 322, 26), "zerg_20_vs_23": (20, 858, 346, 29),
}  # fmt: skip
STOP, EAST = 1, 4


@pytest.fixture
def game():
    with starcraft.installed() as game:
        yield game


@pytest.fixture
def make(game):
    made = []

    def build(task, *args):
        made.append(StarCraftEnv("smacv2" if task in SMACV2_TASKS else "smacv1", task, *args))
        return made[-1]

    yield build
    for env in made:
        env.close()
    assert game.running == 0


def legal(mask: torch.Tensor, *preferred: int) -> torch.Tensor:
    """[n]: the first of `preferred` that is available, else the first action that is (a dead agent's no-op)."""
    action = mask.int().argmax(-1)
    for choice in reversed(preferred):
        action = torch.where(mask[:, choice], choice, action)
    return action


def fight(env, mask):
    """Shoot at the first enemy in range, else go east, where the enemies of 5m_vs_6m are."""
    return legal(mask, *range(6, mask.shape[-1]), EAST, STOP)


def chase(env, mask):
    """Shoot, else step towards the nearest enemy alive."""
    game, action = env.game, fight(env, mask)
    for i, unit in game.agents.items():
        alive = [e for e in game.enemies.values() if e.health > 0]
        if unit.health > 0 and alive and not mask[i, 6:].any():
            near = min(alive, key=lambda e: np.hypot(e.pos.x - unit.pos.x, e.pos.y - unit.pos.y))
            dx, dy = near.pos.x - unit.pos.x, near.pos.y - unit.pos.y
            ways = [(4 if dx > 0 else 5, abs(dx)), (2 if dy > 0 else 3, abs(dy))]
            action[i] = legal(mask[i : i + 1], *(way for way, _ in sorted(ways, key=lambda w: -w[1])), STOP)[0]
    return action


def stand(env, mask):
    return legal(mask, STOP)


def battle(env, act) -> list:
    """One battle; what came back at each step, the reset first."""
    out = [env.reset()]
    while not out[-1]["done"]:
        td = out[-1].clone()
        td["agents", "action"] = act(env, td["agents", "action_mask"])
        out.append(env.step(td)["next"])
    return out


def flags(td) -> dict:
    return {key: bool(td[key]) for key in ("done", "terminated", "truncated", "battle_won", "game_died")}


# ---------------------------------------------------------------- sizes and rules


@pytest.mark.parametrize("task", TABLE3)
def test_sizes_of_table_3(make, task):
    env = make(task)
    spec, td = env.observation_spec, env.reset()
    n, state, obs, actions = TABLE3[task]
    assert spec["agents", "observation"].shape == td["agents", "observation"].shape == (n, obs)
    assert spec["state"].shape == td["state"].shape == (state,) and td["agents", "action_mask"].shape == (n, actions)


def test_tasks_are_the_papers():
    assert len(SMACV2_TASKS) == 15 and set(SMACV2_TASKS) | set(environments.starcraft.SMACV1_TASKS) == set(TABLE3)


@pytest.mark.parametrize("task", ["zerg_10_vs_11", "protoss_5_vs_5", "5m_vs_6m"])
def test_torchrl_specs(make, task):
    env = make(task)
    env.set_seed(0)
    check_env_specs(env, seed=None)


@pytest.mark.parametrize("task", ["zerg_10_vs_11", "terran_5_vs_5", "protoss_5_vs_5"])
def test_teams_are_the_configured_ones(make, task):
    env = make(task)
    env.set_seed(0)
    units, _, exceptions = environments.starcraft.RACES[task.split("_")[0]]
    names = {v: k for k, v in (env.reset() is not None and env.game.ally_unit_map).items()}
    seen = set()
    for _ in range(12):
        env.reset()
        team = [names[unit.unit_type] for unit in env.game.agents.values()]
        seen |= set(team)
        assert not set(team) <= set(exceptions)
    assert seen == set(units)


def test_a_dead_agent_has_its_no_op_alone_and_sees_nothing(make):
    env = make("5m_vs_6m")
    before_last = battle(env, stand)[-2]
    dead = torch.tensor([unit.health == 0 for unit in env.game.agents.values()])
    mask, n = before_last["agents", "action_mask"], 5
    gone = ~before_last["agents", "observation"][:, :-n].any(-1)  # all but the id
    assert dead.all() and gone.any() and not gone.all()
    assert torch.equal(mask[gone], torch.eye(12, dtype=torch.bool)[:1].expand(int(gone.sum()), 12))
    assert not mask[~gone, 0].any()


def test_a_forbidden_action_is_refused(make):
    env = make("5m_vs_6m")
    td = env.reset()
    td["agents", "action"] = torch.zeros(5, dtype=torch.int64)  # the dead's no-op
    with pytest.raises(AssertionError, match=r"No-op|cannot perform"):
        env.step(td)


# ---------------------------------------------------------------- how battles end


def test_a_battle_is_won_by_fighting(make, game):
    game.peaceful = True
    for _ in range(2):
        td = battle(make("5m_vs_6m"), fight)
        assert flags(td[-1]) == {
            "done": True,
            "terminated": True,
            "truncated": False,
            "battle_won": True,
            "game_died": False,
        }
        # 6 marines of 45 health, 10 for each, 200 for the victory, scaled to 20.
        assert sum(float(t["reward"]) for t in td[1:]) == pytest.approx(20, abs=1e-4)


def test_a_battle_is_lost_by_standing_still(make):
    td = battle(make("5m_vs_6m"), stand)
    assert flags(td[-1]) == {
        "done": True,
        "terminated": True,
        "truncated": False,
        "battle_won": False,
        "game_died": False,
    }
    assert sum(float(t["reward"]) for t in td[1:]) < 10


@pytest.mark.parametrize("task, limit", [("5m_vs_6m", 70), ("zerg_5_vs_5", 200)])
def test_the_time_limit_is_no_termination(make, game, task, limit):
    game.peaceful = True
    td = battle(make(task), stand)
    assert len(td) - 1 == limit
    assert flags(td[-1]) == {
        "done": True,
        "terminated": False,
        "truncated": True,
        "battle_won": False,
        "game_died": False,
    }
    assert not any(bool(t["done"]) for t in td[:-1])


def test_smacv2_battles_are_won_and_lost(make):
    env = make("zerg_10_vs_11")
    env.set_seed(0)
    assert not any(flags(battle(env, stand)[-1])["battle_won"] for _ in range(3))
    env = make("zerg_5_vs_5")
    env.set_seed(0)
    ends = [flags(battle(env, chase)[-1]) for _ in range(10)]
    assert any(end["battle_won"] for end in ends) and all(end["terminated"] or end["truncated"] for end in ends)


def test_each_battle_has_its_own_reward_scale(make, game):
    """smacv2 keeps the scale of its first battle, whose team has other health than a later one."""
    game.peaceful = True
    env = make("zerg_5_vs_5")
    env.set_seed(1)
    scales, returns = set(), []
    for _ in range(3):
        td = battle(env, chase)
        scales.add(env.game.max_reward)
        returns.append(sum(float(t["reward"]) for t in td[1:]) if flags(td[-1])["battle_won"] else None)
    assert len(scales) > 1 and any(r is not None for r in returns)
    assert all(r is None or r == pytest.approx(20, abs=1e-3) for r in returns)


@pytest.mark.parametrize("task", ["5m_vs_6m", "zerg_5_vs_5"])
@pytest.mark.parametrize("delay", [0, 3])
def test_resets_neither_hang_nor_launch_another_game(make, game, task, delay):
    """Resets twice before a battle began, in the middle of one and after its end.

    smacv2 itself launches a second game in the first case. On a SMAC map it waits forever in the others (its issue 55).
    """
    game.spawn_delay = delay
    env = make(task)
    env.reset()
    scale = env.game.max_reward
    td = env.reset()
    if task == "5m_vs_6m":
        assert env.game.max_reward == scale == 6 * 45 + 6 * 10 + 200
    td["agents", "action"] = stand(env, td["agents", "action_mask"])
    env.step(td)
    for _ in range(2):
        out = battle(env, stand)
        assert len(out) > 2 and sum(u.health > 0 for u in env.game.agents.values()) in range(5)
    td = env.reset()
    assert all(u.health == u.health_max for u in env.game.agents.values()) and not td["done"]
    assert game.launches == game.running == 1


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("task", ["zerg_5_vs_5", "5m_vs_6m"])
def test_seeds_make_battles_repeatable(make, task):
    env = make(task)

    def play(env, seed):
        env.set_seed(seed)
        return [
            torch.cat([t["state"], t["agents", "observation"].flatten()]) for _ in range(2) for t in battle(env, chase)
        ]

    first = play(env, 3)
    outside = np.random.get_state()[1].copy()
    again, other_env, other = play(env, 3), play(make(task), 3), play(env, 4)
    assert (np.random.get_state()[1] == outside).all()  # smacv2's draws are kept from the global stream
    for same in (again, other_env):
        assert len(first) == len(same) and all(torch.equal(a, b) for a, b in zip(first, same))
    assert not torch.equal(first[0], other[0])


# ---------------------------------------------------------------- games that die


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("task", ["zerg_5_vs_5", "5m_vs_6m"])
def test_a_game_that_dies_in_a_battle_ends_it_without_a_result(make, game, task, error):
    env = make(task)
    env.set_seed(0)
    battle(env, stand)
    game.crash(at="step", after=8, error=error)
    td = battle(env, stand)
    assert flags(td[-1]) == {
        "done": True,
        "terminated": False,
        "truncated": True,
        "battle_won": False,
        "game_died": True,
    }
    td = battle(env, stand)
    assert flags(td[-1])["terminated"] and not flags(td[-1])["game_died"]
    assert game.launches == 2 and game.running == 1


@pytest.mark.parametrize("at", ["step", "observation", "debug", "create_game", "join_game", "game_info"])
@pytest.mark.parametrize("task", ["zerg_5_vs_5", "5m_vs_6m"])
def test_a_game_that_dies_in_a_reset_is_launched_again(make, game, task, at):
    env = make(task)
    game.crash(at=at, after=1)
    for _ in range(2):
        td = battle(env, stand)
        assert not any(flags(t)["game_died"] for t in td) or at == "step"
    assert flags(battle(env, stand)[-1])["terminated"] and game.running == 1


def test_units_that_never_appear_end_in_one_line(make, game):
    env = make("zerg_5_vs_5")
    game.lost_spawns = 100
    with pytest.raises(BadInput, match="failed 3 times in a row to start a battle") as error:
        env.reset()
    assert "\n" not in str(error.value)
    game.lost_spawns = 1  # of the allies' team, once
    assert not env.reset()["done"]


class Stand(torch.nn.Module):
    """A policy that stands still."""

    def __init__(self):
        super().__init__()
        self.empty = torch.nn.Parameter(torch.zeros(1))

    def act(self, obs, mask):
        return torch.stack([legal(m, STOP) for m in mask.flatten(0, -3)]).reshape(mask.shape[:-1])


class Fight(Stand):
    def act(self, obs, mask):
        return torch.stack([fight(None, m) for m in mask.flatten(0, -3)]).reshape(mask.shape[:-1])


def worker(task: str, settings: dict, crashes: int = 0):
    """A game in a process of its own, with the stand-in installed there."""
    game = starcraft.install(**settings)
    for _ in range(crashes):
        game.crash(at="step", after=15)
    return StarCraftEnv("smacv2" if task in SMACV2_TASKS else "smacv1", task)


def test_evaluation_in_parallel_games(game):
    env = ParallelEnv(2, functools.partial(worker, "5m_vs_6m", {"peaceful": True}))
    try:
        result = evaluate(Fight(), env, 3, 0)
        assert result["winrate"] == 1 and result["replayed"] == 0
        assert result["return_mean"] == pytest.approx(20, abs=1e-3)
        assert len(result["returns"]) == 3
        lost = evaluate(Stand(), env, 2, 0)
        assert lost["winrate"] == 0 and lost["length"] == 70
    finally:
        env.close()


def test_evaluation_plays_battles_again_whose_game_died(game):
    env = ParallelEnv(2, functools.partial(worker, "5m_vs_6m", {"peaceful": True}, 1))
    try:
        result = evaluate(Fight(), env, 4, 0)
        assert result["replayed"] == 2 and len(result["returns"]) == 4
        assert result["winrate"] == 1 and result["returns"] == pytest.approx([20] * 4, abs=1e-3)
    finally:
        env.close()


def test_evaluation_gives_up_on_games_that_keep_dying(game):
    env = ParallelEnv(1, functools.partial(worker, "5m_vs_6m", {}, 50))
    try:
        with pytest.raises(BadInput, match=r"the game died in 3 battles while 0 were played"):
            evaluate(Stand(), env, 2, 0)
    finally:
        env.close()


def test_collection_leaves_out_battles_whose_game_died(make, game):
    env = make("5m_vs_6m")
    env.set_seed(0)
    game.crash(at="step", after=12)
    td, steps = env.reset(), []
    for _ in range(120):
        td["agents", "action"] = stand(env, td["agents", "action_mask"])
        step, td = env.step_and_maybe_reset(td)
        steps.append(step)
    splitter = EpisodeSplitter()
    recorded = list(splitter(torch.stack(steps)[None]))
    assert splitter.died == 1 and len(recorded) >= 2
    for episode in recorded:
        assert not episode["battle_won"].any() and bool(episode["done"][-2]) and not episode["done"][:-2].any()


# ---------------------------------------------------------------- SMACv1's benchmark observation


def unit(x, y, health, health_max=50, cooldown=0.0, shield=0.0):
    return SimpleNamespace(
        pos=SimpleNamespace(x=x, y=y),
        health=health,
        health_max=health_max,
        weapon_cooldown=cooldown,
        shield=shield,
        unit_type=1,
    )


def small_battle():
    """Two allies with shields, 5 apart (3 east, 4 north). The second is hurt.

    One enemy is 6 west of the first ally, one is far away, and one is dead.
    """
    available = {0: [0, 1, 1, 0, 1, 1, 1, 0, 0], 1: [0, 1, 1, 1, 1, 0, 0, 0, 0]}
    return SimpleNamespace(
        n_agents=2, n_enemies=3, n_actions=9, n_actions_no_attack=6, unit_type_bits=0, map_type="zealots",
        shield_bits_ally=1, shield_bits_enemy=0, map_x=32, map_y=32, max_distance_x=20, max_distance_y=10,
        last_action=np.eye(9)[[6, 2]],
        agents={0: unit(10, 12, 50, cooldown=11, shield=25), 1: unit(13, 16, 10, cooldown=5.5)},
        enemies={0: unit(4, 12, 25), 1: unit(30, 30, 50), 2: unit(10, 13, 0)},
        unit_max_shield=lambda u: 50, unit_max_cooldown=lambda u: 22, get_avail_agent_actions=available.__getitem__,
    )  # fmt: skip


def test_benchmark_observation_of_a_small_battle_by_hand():
    observation, state = environments.starcraft.benchmark_view(small_battle())
    last0, last1 = [0, 0, 0, 0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0]
    ally = [1, 5 / 9, 3 / 9, 4 / 9, 0.2, 0, *last1]  # seen, distance, x, y, health, shield, last action
    enemies = [1, 6 / 9, -6 / 9, 0, 0.5] + [0] * 5 + [0] * 5  # attackable, distance, x, y, health; out of sight; dead
    own = [1, 0, 0, 0, 1, 0.5, *last0]
    np.testing.assert_allclose(observation[0], [*ally, *enemies, 1, 0, 1, 1, *own, 1, 0], atol=1e-12)

    far = np.hypot(20, 18) / 9
    # as above with the cooldown, and where it is from the centre (16, 16)
    ally = [1, 5 / 9, 3 / 9, 4 / 9, 0.25, 0.2, 0, -3 / 20, 0, *last1]
    enemies = [1, 6 / 9, -6 / 9, 0, 1, 0.5, -12 / 20, -4 / 10, 0, far, 20 / 9, 2, 0, 1, 14 / 20, 14 / 10] + [0] * 8
    own = [1, 0, 0, 0, 1, 0.5, -6 / 20, -4 / 10, *last0]
    np.testing.assert_allclose(state[0], [*ally, *enemies, 1, 0, 1, 1, *own, 1, 0], atol=1e-12)
    assert environments.starcraft.benchmark_sizes(small_battle()) == (observation.shape[1], state.shape[1])


def test_a_dead_agent_is_its_id_in_the_benchmark_observation():
    battle = small_battle()
    battle.agents[1].health = 0
    observation, state = environments.starcraft.benchmark_view(battle)
    for view in (observation, state):
        assert view[1, -1] == 1 and not view[1, :-1].any()
        assert not view[0, :15].any()  # and the other does not see it


def test_standard_interface_is_smacs_own(make):
    """SMAC's observation of 5m_vs_6m has 55 entries, its state 98 (Samvelyan et al. 2019)."""
    env = make("5m_vs_6m", "standard")
    td = env.reset()
    assert td["agents", "observation"].shape == (5, 55) and td["state"].shape == (98,)
    np.testing.assert_array_equal(td["state"].numpy(), env.game.get_state())


def test_unit_types_of_a_mixed_map(make):
    """MMM: marauders, marines, a medivac, each side; smacv2 counts the allies' types wrong, or fails."""
    env = make("MMM")
    env.reset()
    allies = environments.starcraft.unit_features(env.game, env.game.agents, True)["type"].sum(0)
    enemies = environments.starcraft.unit_features(env.game, env.game.enemies, False)["type"].sum(0)
    assert allies.tolist() == enemies.tolist() == [2, 7, 1]


# ---------------------------------------------------------------- what is missing


def test_unknown_tasks_and_maps():
    with pytest.raises(NoSimulator, match="unknown smacv1 task '5m_vs_7m': use one of 3m"):
        StarCraftEnv("smacv1", "5m_vs_7m")
    with pytest.raises(NoSimulator, match="unknown smacv2 task 'orc_5_vs_5': use RACE_SIZE"):
        StarCraftEnv("smacv2", "orc_5_vs_5")


def test_a_missing_game_names_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    with pytest.raises(NoSimulator, match=r"StarCraft II is not installed.*--env smax") as error:
        StarCraftEnv("smacv2", "zerg_5_vs_5")
    assert "\n" not in str(error.value)


def test_a_missing_map_names_its_remedy(game, monkeypatch):
    def missing(self, name, players=None):
        raise ValueError(f"Map {name} not found")

    monkeypatch.setattr(starcraft.RunConfig, "map_data", missing)
    with pytest.raises(NoSimulator, match=r"the map 10gen_zerg is missing.*SMAC maps"):
        StarCraftEnv("smacv2", "zerg_5_vs_5")


def test_cards_name_the_engine(game):
    assert environments.starcraft.engine().startswith("StarCraft II 4.10.0 (smacv2 1.0.0, pysc2 ")
