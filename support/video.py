"""Videos of robots and battles, made without a display: `python comadice_eval.py --run RUN_A RUN_B --video FILE`.

A panel is one episode: that of the median return among those that a policy plays, or among a dataset's recorded ones.
MuJoCo draws robots off-screen, with EGL or OSMesa, whichever is installed. Battles of SMAX are drawn from the key
"state" alone, so recorded ones need no JAX. An MP4 has the whole episode. A GIF of robots has its first seconds, so
that it is small enough for a web page.
"""

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import Compose, EnvBase, RewardSum, Transform, TransformedEnv
from tqdm import tqdm

from environments import smax, stops
from environments.checks import BadInput
from environments.mamujoco import mamujoco_scenario
from offline_data.dataset import episode_returns, episodes
from offline_data.durable import check_new, write_bytes

SIDE = 240  # pixels of a panel's picture, and below it CAPTION for two lines of text; MP4 wants multiples of 16
CAPTION = 32
FPS = {".gif": 10, ".mp4": 25}  # pictures a second, at most
GIF_SECONDS = 6  # robots only: their moving floor makes each picture's file size large
BATTLE_STEP = 1 / 8  # seconds that a step of a battle is shown; in the game it is half a second
COLORS = 64  # of a GIF's palette
# Robots whose observations are pose and velocities, and how many coordinates of the pose are left out (x, or x and y).
HIDDEN = {"Hopper": 1, "HalfCheetah": 1, "Walker2d": 1, "Ant": 2}
LETTERS = {"marine": "m", "marauder": "M", "stalker": "s", "zealot": "Z", "zergling": "z", "hydralisk": "h"}
ALLY, ENEMY, GROUND, MARK = (38, 102, 191), (200, 60, 50), (238, 236, 228), (250, 205, 60)

Frame = tuple[np.ndarray, int, float]  # picture [SIDE, SIDE, 3] uint8, step, return so far


def check_file(file: str):
    """Raises BadInput for a file that can't be written, or a kind of video that can't be made here."""
    path = Path(file)
    if path.suffix not in (".gif", ".mp4"):
        raise BadInput(f"--video {file}: give a name that ends in .gif or .mp4")
    check_new("--video", path)
    if path.suffix == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            raise BadInput("MP4 needs a package: pip install imageio-ffmpeg, or give a .gif") from None


def choose_opengl():
    """Sets MUJOCO_GL to a library that can draw here: its present value if it is set, else EGL, else OSMesa.

    Each is tried in a process of its own: Python's OpenGL can't switch later, and a broken driver may crash. Raises
    BadInput if none can draw.
    """
    if sys.platform != "linux":
        return
    code = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    for name in [os.environ["MUJOCO_GL"]] if "MUJOCO_GL" in os.environ else ["egl", "osmesa"]:
        tried = subprocess.run([sys.executable, "-c", code], env=os.environ | {"MUJOCO_GL": name}, capture_output=True)
        if tried.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return
    raise BadInput(
        "MuJoCo finds neither EGL nor OSMesa to draw with: install a system package, libosmesa6, or libegl1 with "
        "libgl1-mesa-dri (their names in Debian and Ubuntu)"
    )


def check_env(card: dict):
    """Raises BadInput for an env that can't be drawn here, or for robots if no library can draw them."""
    if card["env"] == "mamujoco":
        choose_opengl()
    elif card["env"] != "smax":
        raise BadInput(f"--video draws mamujoco and smax, not {card['env']}: StarCraft II records replays itself")


# ---------------------------------------------------------------- pictures


def robot_camera(env: EnvBase, number: int):
    """A function that draws one robot of a MaMuJoCoEnv as it stands now, [SIDE, SIDE, 3] uint8."""
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
    from mujoco import mjtCamera

    simulator = env.simulators[number].unwrapped
    simulator.model.vis.quality.shadowsize = 1024  # a quarter of the default: without a GPU shadows take most time
    follow = {"type": mjtCamera.mjCAMERA_TRACKING, "trackbodyid": 1, "distance": 3.0, "elevation": -10, "azimuth": 90}
    renderer = MujocoRenderer(simulator.model, simulator.data, follow, SIDE, SIDE)
    renderer.camera_id = None  # otherwise it names a camera of the model, whose pictures cut some robots' legs off
    return lambda: renderer.render("rgb_array")


def draw_battle(state: np.ndarray, task: str) -> np.ndarray:
    """A battle of SMAX from its state [S] -> [SIDE, SIDE, 3] uint8.

    Allies are blue, enemies red, with a letter for the unit's type and a bar for its health. A yellow ring means that
    the unit has just attacked.
    """
    from PIL import Image, ImageDraw, ImageFont

    n, m, types = smax.team_units(task)
    units = state[: -2 * (n + m)].reshape(n + m, -1)  # then come the teams and the types of all units, dead ones too
    image = Image.new("RGB", (SIDE, SIDE), GROUND)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(10)
    for i, (health, x, y, cooldown, *bits) in enumerate(units.tolist()):
        if health <= 0:
            continue
        x, y, r = SIDE * x, SIDE * (1 - y), 6
        if cooldown > 0:
            pen.ellipse((x - r - 2, y - r - 2, x + r + 2, y + r + 2), fill=MARK)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=ALLY if i < n else ENEMY)
        pen.text((x, y), LETTERS[types[int(np.argmax(bits))]], "white", font, "mm")
        pen.rectangle((x - r, y - r - 5, x + r, y - r - 4), fill="white")
        pen.rectangle((x - r, y - r - 5, x - r + 2 * r * health, y - r - 4), fill=(60, 150, 60))
    return np.asarray(image)


def time_step(card: dict, env: EnvBase | None) -> float:
    """Seconds that a step is shown. For robots it is the simulated time of a step."""
    return BATTLE_STEP if card["env"] == "smax" else env.simulators[0].unwrapped.dt


def steps_between(file: str, step: float) -> int:
    """How many steps of `step` seconds lie between two pictures."""
    return max(round(1 / (FPS[Path(file).suffix] * step)), 1)


class Film(Transform):
    """Keeps pictures of one of an environment's robots or battles until its episode ends, with the return so far.

    Why not TorchRL's own? PixelRenderTransform would also draw the steps that are left out. VideoRecorder keeps no
    numbers with the pictures. Its logger writes MP4 only with torchcodec, which needs FFmpeg's libraries on the system.
    """

    def __init__(self, card: dict, env: EnvBase, number: int, every: int):
        super().__init__()
        self.frames, self.step, self.over, self.number, self.every = [], 0, False, number, every
        if card["env"] == "smax":
            self.draw = lambda td: draw_battle(td["state"][number].cpu().numpy(), card["task"])
        else:
            camera = robot_camera(env, number)
            self.draw = lambda td: camera()

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        self.frames, self.step, self.over = [(self.draw(tensordict_reset), 0, 0.0)], 0, False
        return tensordict_reset

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        if not self.over:
            self.step, self.over = self.step + 1, next_tensordict["done"][self.number].item()
            if self.step % self.every == 0 or self.over:
                total = next_tensordict["episode_reward"][self.number].item()
                self.frames.append((self.draw(next_tensordict), self.step, total))
        return next_tensordict


def median(returns) -> int:
    """The index of the median return. Of two in the middle, it is the lower."""
    return int(np.argsort(np.asarray(returns), kind="stable")[(len(returns) - 1) // 2])


def played_frames(policy, card: dict, env: EnvBase, play: Callable, every: int) -> list[Frame]:
    """Pictures of the episode of median return. play(policy, env) plays episodes and gives their returns.

    The same episodes are played twice: to find the median, and to film it.
    """
    reel = Film(card, env, median(play(policy, env)), every)
    play(policy, TransformedEnv(env, Compose(RewardSum(), reel)))
    return reel.frames


# ---------------------------------------------------------------- recorded episodes


def median_episode(rows: TensorDict) -> TensorDict:
    """The episode of the median return, [T + 1] rows."""
    number = median(episode_returns(rows))
    return next(episode for i, episode in enumerate(episodes(rows)) if i == number)


def raw_observations(rows: TensorDict, card: dict) -> np.ndarray:
    """The robot's own observations [T, D], as MuJoCo gave them, up to float32.

    The benchmark's interface standardises them together with a one-hot id. The id was 0 and 1, so its standardised
    values give the shift and the scale, and both can be undone.
    """
    state = rows["state"].double().numpy()
    if card["interface"] != "benchmark":
        return state
    n, O = card["n_agents"], card["obs_dim"]
    one, zero = state[:, O - n], state[:, O - n + 1]  # the first agent's id is 1, 0, ...
    return (state[:, : O - n] - zero[:, None]) / (one - zero)[:, None]


def recorded_frames(rows: TensorDict, card: dict, env: EnvBase | None, every: int) -> list[Frame]:
    """Pictures of a recorded episode, [T + 1] rows. `env` is a MaMuJoCoEnv of its task; battles need none.

    Robots are put into each recorded pose. Nothing is simulated. Their place along the track is not in the data; it is
    the sum of the recorded velocities. Raises BadInput for a robot whose observations do not give its pose.
    """
    totals = np.concatenate([[0.0], rows["reward"][:-1, 0].double().cumsum(0).numpy()])
    if card["env"] == "mamujoco":
        robot = mamujoco_scenario(card["task"])[0]
        if robot not in HIDDEN:
            raise BadInput(f"recorded episodes of {card['task']} can't be drawn, only those of {', '.join(HIDDEN)}")
        simulator, camera, k = env.simulators[0].unwrapped, robot_camera(env, 0), HIDDEN[robot]
        nq, nv = simulator.model.nq, simulator.model.nv
        raw = raw_observations(rows, card)
        pose, velocity = raw[:, : nq - k], raw[:, nq - k : nq - k + nv]
        place = np.concatenate([np.zeros((1, k)), simulator.dt * velocity[1:, :k].cumsum(0)])
    frames = []
    for t in range(len(rows)):
        stops.leave()
        if t % every and t < len(rows) - 1:
            continue
        if card["env"] == "smax":
            picture = draw_battle(rows["state"][t].numpy(), card["task"])
        else:
            simulator.set_state(np.concatenate([place[t], pose[t]]), velocity[t])
            picture = camera()
        frames.append((picture, t, float(totals[t])))
    return frames


# ---------------------------------------------------------------- the file


def compose(panels: list[tuple[str, list[Frame]]]) -> list[np.ndarray]:
    """The panels side by side, each with its name, the step and the return so far below it.

    An episode that is over keeps its last picture, faded, until the longest ends.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, whole = ImageFont.load_default(12), []
    for i in range(max(len(frames) for _, frames in panels)):
        image = Image.new("RGB", (SIDE * len(panels), SIDE + CAPTION), "white")
        pen = ImageDraw.Draw(image)
        for j, (name, frames) in enumerate(panels):
            picture, step, total = frames[min(i, len(frames) - 1)]
            over = i >= len(frames)
            image.paste(Image.fromarray(picture // 2 + 127 if over else picture), (SIDE * j, 0))
            pen.line((SIDE * (j + 1) - 1, 0, SIDE * (j + 1) - 1, SIDE), "white", 2)
            pen.text((SIDE * j + 6, SIDE + 2), name, "black", font)
            said = f"step {step}   return {total:.1f}{'   end' if over else ''}"
            pen.text((SIDE * j + 6, SIDE + 16), said, "black", font)
        whole.append(np.asarray(image))
    return whole


def write(file: str, pictures: list[np.ndarray], seconds: float):
    """Writes a video with a picture every `seconds`; a GIF repeats endlessly. Raises BadInput if it can't write it."""
    if Path(file).suffix == ".gif":
        from PIL import Image

        # One palette for all pictures and no dithering: then parts that do not change take no space.
        some = np.concatenate(pictures[:: max(len(pictures) // 8, 1)])
        palette = Image.fromarray(some).quantize(COLORS, dither=Image.Dither.NONE)
        images = [Image.fromarray(x).quantize(palette=palette, dither=Image.Dither.NONE) for x in pictures]
        data = io.BytesIO()
        images[0].save(data, "GIF", save_all=True, append_images=images[1:], duration=1000 * seconds, loop=0)
        write_bytes(file, data.getvalue())
        return
    import imageio_ffmpeg

    height, width = pictures[0].shape[:2]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "video.mp4")
        writer = imageio_ffmpeg.write_frames(str(made), (width, height), fps=1 / seconds)
        writer.send(None)
        for picture in pictures:
            writer.send(np.ascontiguousarray(picture))
        writer.close()
        write_bytes(file, made.read_bytes())


def film(file: str, shown: list[tuple], make: Callable, play: Callable):
    """The episode of the median return of each player in `shown`, side by side, into a file; prints the returns.

    A player is (name, card, policy) or (name, card, rows of a dataset). make(card) gives an environment with one
    simulator per episode. play(policy, environment) plays an episode in each and gives the returns, the same ones each
    time. Raises BadInput for players of different tasks.
    """
    cards = [card for _, card, _ in shown]
    if any((card["env"], card["task"]) != (cards[0]["env"], cards[0]["task"]) for card in cards):
        raise BadInput("--video shows runs of one task side by side: give runs of one task")
    check_env(cards[0])
    panels = []
    for name, card, player in tqdm(shown, desc="film", unit="run", disable=None):
        recorded = isinstance(player, TensorDict)
        env = None if recorded and card["env"] == "smax" else make(card)
        step = time_step(card, env)
        count = steps_between(file, step)
        if recorded:
            panels.append((name, recorded_frames(median_episode(player), card, env, count)))
        else:
            panels.append((name, played_frames(player, card, env, play, count)))
    short = Path(file).suffix == ".gif" and cards[0]["env"] == "mamujoco"
    most = round(GIF_SECONDS / (count * step)) if short else None
    write(file, compose([(name, frames[:most]) for name, frames in panels]), count * step)
    for name, frames in panels:
        print(f"{name}: return {frames[-1][2]:.2f} in {frames[-1][1]} steps")
    print(f"video: {file}")
