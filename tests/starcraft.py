"""A stand-in for the StarCraft II process, so that the real smacv2 plays battles where the game is not installed.

pysc2 talks to the game over a websocket, in protobuf messages. Here both ends are in one process. pysc2's own
controller sends real request bytes. `Server` answers with real response bytes from a small battle of its own.
Everything above the socket is the real thing: smacv2's environments, pysc2's controller, its state checks, its errors.

    with starcraft.installed() as game:
        env = StarCraft2Env(map_name="10gen_zerg", ...)
        game.crash(at="step", after=20)  # the 20th request to step from now kills the game
        ...
        env.close()
    assert game.launches == 2 and game.running == 0

In a worker process, where nothing has to be undone, starcraft.install() does the same.

What is simulated:
- units with health, shields, armour, range, cooldown, speed and size;
- move, attack, stop and heal orders, carried out loop by loop (16 a second);
- splash, banelings that explode, medivacs that heal;
- debug commands that create and kill; the maps' triggers.

As on the SMAC maps, the agents' units never act without an order. The enemies go for whatever is nearest. The real ones
do so whenever they are idle on the 10gen_ maps. On the other maps they march to where the agents appeared.
Hits of one loop are simultaneous. The only randomness is a little in where units appear and in cooldowns. It comes from
the seed in the request to create a game. Without a seed it differs each time, as in the game.

SMACv1's maps have units of their own. The trigger brings them back as soon as the last has died. smacv2's reset waits
to see no unit, so from the second reset on it never returns. This is so with the real game, too (oxwhirl/smacv2, issue
55). The stand-in raises an error when the player has waited too long. spawn_delay=3 leaves a gap that smacv2 sees.

What is not simulated: StarCraft II's combat model. There is no turning, acceleration, projectiles, cliffs, walls or
path finding: every map is a flat square. Wins here say nothing about the game, least of all where terrain decides
(corridor; 2c_vs_64zg can't be won).
"""

import contextlib
import itertools
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import websocket
from pysc2 import run_configs
from pysc2.lib import remote_controller
from pysc2.run_configs import lib
from s2clientprotocol import common_pb2, data_pb2, raw_pb2, sc2api_pb2

MOVE, STOP, ATTACK, HEAL = 16, 4, 23, 386  # ability ids
ALLY, ENEMY = 1, 2  # owners
SIZE = 32  # of every map
# The agents' unit types exist on the SMAC maps only. The game numbers them after its own, about 2,000, in alphabetical
# order. smacv2 has to guess the first one's number. On the 10gen_ maps it takes the number of all types less nine,
# elsewhere the lowest that it sees.
FIRST_CUSTOM = 200
PATIENCE = 3000  # loops; smacv2 waits up to 1,000 for units to appear


class Kind(NamedTuple):
    """A unit type. Times are seconds at the game speed Normal.

    The numbers are roughly the public unit statistics (Liquipedia, and the unit data in the SMAC maps).
    """

    type_id: int
    health: float
    shield: float
    armor: float
    radius: float
    speed: float
    damage: float = 0
    hits: int = 1  # at once; armour counts for each
    bonus: tuple = ("", 0)  # more damage to units of this attribute
    range: float = 0  # from edge to edge
    cooldown: float = 1
    splash: float = 0  # every enemy so near to the target is hit too
    attribute: str = "light"
    flies: bool = False
    hits_air: bool = False
    explodes: bool = False
    solid: bool = True  # whether others have to walk around it


KINDS = {
    "marine": Kind(48, 45, 0, 0, 0.375, 2.25, 6, range=5, cooldown=0.86, hits_air=True),
    "marauder": Kind(51, 125, 0, 1, 0.5625, 2.25, 10, bonus=("armored", 10), range=6, cooldown=1.5,
                     attribute="armored"),
    "medivac": Kind(54, 150, 0, 1, 0.75, 2.75, range=4, attribute="armored", flies=True, solid=False),
    "stalker": Kind(74, 80, 80, 1, 0.625, 2.95, 13, bonus=("armored", 5), range=6, cooldown=1.87,
                    attribute="armored", hits_air=True),
    "zealot": Kind(73, 100, 50, 1, 0.5, 2.25, 8, hits=2, range=0.1, cooldown=1.2),
    "colossus": Kind(4, 200, 150, 1, 1, 2.25, 10, hits=2, bonus=("light", 5), range=7, cooldown=1.5, splash=0.2,
                     attribute="armored", solid=False),
    "zergling": Kind(105, 35, 0, 0, 0.375, 2.95, 5, range=0.1, cooldown=0.7),
    "baneling": Kind(9, 30, 0, 0, 0.375, 2.5, 16, bonus=("light", 19), range=0.25, splash=2.2, attribute="",
                     explodes=True),
    "hydralisk": Kind(107, 80, 0, 0, 0.625, 2.25, 12, range=5, cooldown=0.83, hits_air=True),
}  # fmt: skip
HEAL_RATE, HEALTH_PER_ENERGY, FIRST_ENERGY, MAX_ENERGY, ENERGY_RATE = (
    9 / 16,
    3,
    50,
    200,
    0.56 / 16,
)  # of medivacs; rates are per loop
SHIELD_REST, SHIELD_RATE = 160, 2 / 16  # loops without a hit before shields grow back, and how fast

# The units that a map places itself: {name: number} and where, first for the agents, then for their enemies.
# From the scripts in smacv2's map files.
MAPS = {
    "32x32_flat": ({}, (), {}, ()),  # what every 10gen_ map is to smacv2, which creates the units itself
    "3m": ({"marine": 3}, (9, 16), {"marine": 3}, (23, 16)),
    "8m": ({"marine": 8}, (9, 16), {"marine": 8}, (23, 16)),
    "5m_vs_6m": ({"marine": 5}, (9, 16), {"marine": 6}, (23, 16)),
    "MMM": ({"marauder": 2, "marine": 7, "medivac": 1}, (9, 16), {"marauder": 2, "marine": 7, "medivac": 1}, (23, 16)),
    "6h_vs_8z": ({"hydralisk": 6}, (14.6, 9.5), {"zealot": 8}, (14.4, 16.8)),
    "2c_vs_64zg": ({"colossus": 2}, (16, 16), {"zergling": 64}, (16, 9)),
    "corridor": ({"zealot": 6}, (19, 19.1), {"zergling": 24}, (27.9, 28.2)),
}


@dataclass
class Crash:
    at: str | None
    left: int
    error: bool


@dataclass
class Game:
    """What a test sets, at any time, and reads."""

    peaceful: bool = False  # the enemies stand still: agents that do so too reach the time limit
    spawn_delay: int = 0  # loops that units take to appear, once ordered; those that a map begins with are always there
    lost_spawns: int = 0  # so many of the next orders for units (a team each on the 10gen_ maps) are lost
    crashes: list[Crash] = field(default_factory=list)
    servers: list["Server"] = field(default_factory=list)  # of every process launched

    def crash(self, at: str | None = "step", after: int = 1, error: bool = False):
        """The `after`-th request from now kills the game. Only requests of the kind `at`, a method of Server, count.

        With at=None all count.
        The game's socket closes, which is a ConnectionError to pysc2. With `error` the game answers everything with an
        error instead, which is a ProtocolError. A newly launched process works until the next crash that was asked for.
        """
        self.crashes.append(Crash(at, after, error))

    @property
    def launches(self) -> int:
        return len(self.servers)

    @property
    def closes(self) -> int:
        return sum(s.closed for s in self.servers)

    @property
    def running(self) -> int:
        """Processes that nobody has closed yet, dead ones among them."""
        return self.launches - self.closes


@dataclass
class Unit:
    tag: int
    type_id: int
    kind: Kind
    owner: int
    xy: np.ndarray
    health: float
    shield: float
    energy: float
    cooldown: float = 0
    rest: int = 0  # loops since the last hit
    order: tuple | None = None  # (MOVE, a place) or (ATTACK or HEAL, a tag)

    def can_target(self, other: "Unit", ability: int) -> bool:
        if ability == HEAL:
            return self.kind.flies and other.owner == self.owner and not other.kind.flies
        return self.kind.damage > 0 and other.owner != self.owner and (self.kind.hits_air or not other.kind.flies)

    def suffer(self, weapon: Kind):
        attribute, extra = weapon.bonus
        self.rest = 0
        for _ in range(weapon.hits):
            damage = weapon.damage + (extra if attribute == self.kind.attribute else 0)
            absorbed = min(self.shield, damage)
            self.shield -= absorbed
            if damage > absorbed:
                self.health -= max(damage - absorbed - self.kind.armor, 0.5)

    def message(self) -> raw_pb2.Unit:
        side = raw_pb2.Self if self.owner == ALLY else raw_pb2.Enemy
        unit = raw_pb2.Unit(
            tag=self.tag,
            unit_type=self.type_id,
            owner=self.owner,
            alliance=side,
            display_type=raw_pb2.Visible,
            build_progress=1,
        )
        unit.pos.x, unit.pos.y, unit.pos.z = *self.xy, 10
        unit.health, unit.shield, unit.energy, unit.weapon_cooldown = (
            self.health,
            self.shield,
            self.energy,
            self.cooldown,
        )
        unit.health_max, unit.shield_max, unit.energy_max = (
            self.kind.health,
            self.kind.shield,
            MAX_ENERGY * self.kind.flies,
        )
        unit.radius, unit.is_flying = self.kind.radius, self.kind.flies
        return unit


class Battle:
    """A map with its units and its trigger."""

    def __init__(self, game: Game, map_name: str, seed: int | None):
        self.game, self.rng, self.loops = game, np.random.default_rng(seed), 0
        allies, here, enemies, there = MAPS[map_name]
        self.names = {k.type_id: name for name, k in KINDS.items()} | dict(
            enumerate(sorted(allies or KINDS), FIRST_CUSTOM)
        )
        agents = {name: i for i, name in self.names.items() if i >= FIRST_CUSTOM}
        self.own = [
            (agents[name], ALLY, here) for name, n in allies.items() for _ in range(n)
        ]  # the map's own units, as (type id, owner, place)
        self.own += [(KINDS[name].type_id, ENEMY, there) for name, n in enemies.items() for _ in range(n)]
        self.tags = itertools.count(1 << 32)  # of no unit twice in a game, but the next game begins with the same ones
        self.units: dict[int, Unit] = {}
        self.doomed: set[int] = set()  # tags of those to die in this loop, whatever their health
        self.coming: list[tuple] = []  # (loop, type id, owner, place)
        for one in self.own:
            self.place(*one)

    def spawn(self, team: list[tuple]):
        if team and self.game.lost_spawns > 0:
            self.game.lost_spawns -= 1
            return
        self.coming += [(self.loops + self.game.spawn_delay, *one) for one in team]

    def place(self, type_id: int, owner: int, at: tuple):
        """A new unit at the free spot nearest to a place, looked for along a spiral."""
        kind = KINDS[self.names[type_id]]
        middle = np.array(at) + self.rng.uniform(-0.2, 0.2, 2)
        for k in itertools.count():
            xy = np.clip(
                middle + 0.3 * math.sqrt(k) * np.array([math.cos(2.4 * k), math.sin(2.4 * k)]), 0.25, SIZE - 0.25
            )
            if all(math.dist(xy, u.xy) >= u.kind.radius + kind.radius for u in self.units.values()):
                break
        tag = next(self.tags)
        self.units[tag] = Unit(tag, type_id, kind, owner, xy, kind.health, kind.shield, FIRST_ENERGY * kind.flies)

    def command(self, command: raw_pb2.ActionRawUnitCommand):
        """An order replaces the last one. An order that can't be carried out changes nothing.

        Examples: the target is gone, or a marauder is told to hit a medivac, which flies.
        """
        point, target = command.target_world_space_pos, self.units.get(command.target_unit_tag)
        for unit in [self.units[tag] for tag in command.unit_tags if tag in self.units]:
            if command.ability_id == STOP:
                unit.order = None
            elif command.ability_id == MOVE:
                unit.order = MOVE, (point.x, point.y)
            elif command.ability_id not in (ATTACK, HEAL):
                raise NotImplementedError(f"the stand-in knows no ability {command.ability_id}")
            elif target and unit.can_target(target, command.ability_id):
                unit.order = command.ability_id, target.tag

    def advance(self):
        """One loop: all act on how things stood at its beginning, then the dead vanish and new units appear."""
        self.loops += 1
        if self.units:
            self.act(list(self.units.values()))
        dead = [u.tag for u in self.units.values() if u.health <= 0 or u.tag in self.doomed]
        for tag in dead:
            del self.units[tag]
        self.doomed.clear()
        if dead and not self.units:
            self.spawn(self.own)  # the map's trigger: when the last unit of both sides dies, all are back at once
        due = [one for one in self.coming if one[0] <= self.loops]
        self.coming = [one for one in self.coming if one[0] > self.loops]
        for _, *one in due:
            self.place(*one)

    def enemy_order(self, unit: Unit, units: list[Unit], gaps: list[float]) -> tuple | None:
        """Attack the nearest; a medivac heals the nearest that is hurt, or goes along with the nearest."""
        ability = HEAL if unit.kind.flies else ATTACK
        targets = [j for j, u in enumerate(units) if unit.can_target(u, ability)]
        if self.game.peaceful or not targets:
            return None
        nearest = min(targets, key=lambda j: (ability == HEAL and units[j].health == units[j].kind.health, gaps[j]))
        return ability, units[nearest].tag

    def act(self, units: list[Unit]):
        xy, radius = np.array([u.xy for u in units]), np.array([u.kind.radius for u in units])
        distance = np.hypot(*(xy - xy[:, None]).T)
        gaps = (distance - radius - radius[:, None]).tolist()
        index = {u.tag: i for i, u in enumerate(units)}
        struck = []  # (weapon, victim)
        for i, unit in enumerate(units):
            kind = unit.kind
            unit.cooldown, unit.rest = max(unit.cooldown - 1, 0), unit.rest + 1
            unit.shield = min(unit.shield + SHIELD_RATE * (unit.rest > SHIELD_REST), kind.shield)
            unit.energy = min(unit.energy + ENERGY_RATE, MAX_ENERGY * kind.flies)
            if unit.owner == ENEMY:
                unit.order = self.enemy_order(unit, units, gaps[i])
            ability, aim = unit.order or (STOP, None)
            if ability == MOVE:
                way, far = aim - xy[i], math.dist(aim, xy[i])
            elif aim in index:
                j = index[aim]
                way, far = xy[j] - xy[i], gaps[i][j] - kind.range
            else:
                unit.order = None  # nothing to do, or the target is gone
                continue
            if far > 1e-3:
                unit.xy = xy[i] + way / max(math.hypot(*way), 1e-6) * min(kind.speed / 16, far)
            elif ability == HEAL:
                gain = min(HEAL_RATE, units[j].kind.health - units[j].health, unit.energy * HEALTH_PER_ENERGY)
                units[j].health += gain
                unit.energy -= gain / HEALTH_PER_ENERGY
            elif ability == ATTACK and unit.cooldown == 0:
                near = gaps[i if kind.explodes else j]
                struck += [
                    (kind, u)
                    for k, u in enumerate(units)
                    if k == j or (near[k] <= kind.splash and kind.splash and unit.can_target(u, ATTACK))
                ]
                unit.cooldown = 16 * kind.cooldown + self.rng.uniform(-1, 2)
                self.doomed |= {unit.tag} if kind.explodes else set()
        for kind, victim in struck:
            victim.suffer(kind)
        # Units that have walked into one another are pushed apart, each by half of the overlap.
        xy, solid = np.array([u.xy for u in units]), np.array([u.kind.solid for u in units])
        away = xy[:, None] - xy
        distance = np.hypot(away[..., 0], away[..., 1]) + 1e-6
        overlap = np.maximum(radius + radius[:, None] - distance, 0) * (
            solid & solid[:, None] & ~np.eye(len(units), dtype=bool)
        )
        xy = np.clip(xy + (away * (overlap / distance / 2)[..., None]).sum(1), 0.25, SIZE - 0.25)
        for unit, place in zip(units, xy):
            unit.xy = place


class Server:
    """The game's end of the socket, with the methods of a websocket that pysc2 uses."""

    def __init__(self, game: Game):
        self.game, self.closed, self.status = game, False, sc2api_pb2.launched
        self.died: Crash | None = None
        self.create: sc2api_pb2.RequestCreateGame | None = None  # as asked; tests find the seed here
        self.battle: Battle | None = None
        self.idle = 0  # loops since the last order
        self.sock = self  # pysc2 asks the websocket's socket for its port

    def getpeername(self) -> tuple:
        return "", 0

    def close(self):
        self.closed = True

    def send(self, data: bytes):
        self.check()
        self.request = sc2api_pb2.Request.FromString(data)

    def recv(self) -> bytes:
        what, crashes = self.request.WhichOneof("request"), self.game.crashes
        if not self.died and crashes and crashes[0].at in (None, what):
            crashes[0].left -= 1
            self.died = crashes.pop(0) if crashes[0].left == 0 else None
        self.check()
        answer = (
            {"error": ["the stand-in's game has died"]}
            if self.died
            else {what: getattr(self, what)(getattr(self.request, what))}
        )
        return sc2api_pb2.Response(id=self.request.id, status=self.status, **answer).SerializeToString()

    def check(self):
        if self.died and not self.died.error:
            raise websocket.WebSocketConnectionClosedException("the stand-in's game has died")

    # Each of the following answers the request of its name.

    def ping(self, request):
        return sc2api_pb2.ResponsePing()

    def create_game(self, request):
        self.create, self.map_name = request, PurePath(request.local_map.map_path).stem
        if self.map_name not in MAPS:
            return sc2api_pb2.ResponseCreateGame(error=sc2api_pb2.ResponseCreateGame.InvalidMapPath)
        self.status = sc2api_pb2.init_game
        return sc2api_pb2.ResponseCreateGame()

    def join_game(self, request):
        self.battle = Battle(
            self.game, self.map_name, self.create.random_seed if self.create.HasField("random_seed") else None
        )
        self.status = sc2api_pb2.in_game
        return sc2api_pb2.ResponseJoinGame(player_id=ALLY)

    def game_info(self, request):
        size = common_pb2.Size2DI(x=SIZE, y=SIZE)
        area = common_pb2.RectangleI(p0=common_pb2.PointI(x=0, y=0), p1=common_pb2.PointI(x=SIZE, y=SIZE))
        # one bit per cell, set where units can walk
        pathing = common_pb2.ImageData(bits_per_pixel=1, size=size, data=b"\xff" * (SIZE * SIZE // 8))
        height = common_pb2.ImageData(bits_per_pixel=8, size=size, data=b"\x80" * (SIZE * SIZE))
        raw = raw_pb2.StartRaw(map_size=size, playable_area=area, pathing_grid=pathing, terrain_height=height)
        return sc2api_pb2.ResponseGameInfo(map_name=self.map_name, start_raw=raw)

    def data(self, request):
        names = self.battle.names
        return sc2api_pb2.ResponseData(
            units=[data_pb2.UnitTypeData(unit_id=i, name=names.get(i, "")) for i in range(max(names) + 1)]
        )

    def observation(self, request):
        raw = raw_pb2.ObservationRaw(units=[u.message() for u in self.battle.units.values()])
        return sc2api_pb2.ResponseObservation(
            observation=sc2api_pb2.Observation(game_loop=self.battle.loops, raw_data=raw)
        )

    def action(self, request):
        self.idle = 0
        for action in request.actions:
            self.battle.command(action.action_raw.unit_command)
        return sc2api_pb2.ResponseAction()

    def debug(self, request):
        """What it asks for happens in the next loop. Drawings are not drawn."""
        self.idle = 0
        self.battle.doomed |= {tag for d in request.debug for tag in d.kill_unit.tag}
        created = [d.create_unit for d in request.debug]
        self.battle.spawn([(c.unit_type, c.owner, (c.pos.x, c.pos.y)) for c in created for _ in range(c.quantity)])
        return sc2api_pb2.ResponseDebug()

    def step(self, request):
        for _ in range(request.count):
            self.battle.advance()
        self.idle += request.count
        assert self.idle < PATIENCE, f"no order for {self.idle} loops: whoever plays waits for what won't happen"
        return sc2api_pb2.ResponseStep(simulation_loop=self.battle.loops)

    def save_replay(self, request):
        return sc2api_pb2.ResponseSaveReplay(data=b"no replay")


class Controller(remote_controller.RemoteController):
    """pysc2's own, but connected to the stand-in."""

    def __init__(self, server: Server):
        self._server = server
        super().__init__("", 0)

    def _connect(self, *_):
        return self._server


class Process:
    """What smacv2 uses of pysc2's StarcraftProcess, which likewise ends the game when it is closed or forgotten."""

    def __init__(self, game: Game):
        self.controller, self.server = None, Server(game)
        game.servers.append(self.server)
        self.controller = Controller(self.server)

    def close(self):
        if self.controller is not None:
            self.controller.quit()
        self.controller = None
        self.server.close()

    __del__ = close


class RunConfig(lib.RunConfig):
    """How pysc2 would find the game on this machine."""

    def __init__(self, game: Game):
        super().__init__(replay_dir=tempfile.gettempdir(), data_dir="", tmp_dir=None, version="4.10.0")
        self.game = game

    def map_data(self, map_name, players=None) -> bytes:
        return b"the stand-in knows its maps by name"

    def start(self, **window) -> Process:
        return Process(self.game)


def install(**settings) -> Game:
    """Puts the stand-in where pysc2 looks for the game, for good. `settings` are the fields of Game."""
    game = Game(**settings)
    run_configs.get = lambda version=None: RunConfig(game)
    return game


@contextlib.contextmanager
def installed(**settings):
    """The same for the length of a with statement."""
    real = run_configs.get
    try:
        yield install(**settings)
    finally:
        run_configs.get = real
