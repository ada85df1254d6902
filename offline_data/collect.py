"""Makes offline datasets: trains a behaviour policy by MAPPO and records it at several qualities.

    python -m offline_data collect --env mamujoco --task hopper --out data
    python -m offline_data collect --env smax --task zerg_5_vs_5 --steps 2000000

MAPPO (Yu et al. 2022) uses TorchRL's own parts: MAPPOLoss, MultiAgentGAE, Collector, MultiAgentMLP. Its policy is an
unsquashed Gaussian, as in the benchmark. So recorded actions go beyond [-1, 1]. Where actions are discrete, the policy
is a categorical distribution over the available ones.

This protocol was fixed before any offline training on the data. The return of a checkpoint is the mean over the last
100 training episodes, played by the stochastic policy. Robots:

    expert          the checkpoint with the highest return
    medium          the first checkpoint whose return is at least a third of expert's
    medium-replay   every episode that training finished up to the medium checkpoint
    medium-expert   the medium and the expert episodes together

Battles (the paper's SMACv2 data are 1,000 trajectories of MAPPO's policy after 10 million steps):

    medium          the first checkpoint that wins 40% of its battles; if none does, the one that wins most
    medium-replay   training's battles up to that checkpoint, evenly thinned to at most --replay-trajectories
    poor, good      SMACv1's tasks only. There poor, medium and good are selected from training's battles by return, as
                    in the public datasets: poor up to half of the return of a perfect victory, medium up to three
                    quarters, good above

All are whole episodes of the stochastic policy. Expert and medium of robots have `--samples` transitions each; medium
of battles has `--trajectories` battles. demo (only with --demo-samples, about that many transitions) is every K-th
episode of medium-replay. OUT/ENV/TASK holds the datasets, and behaviour/ with checkpoints, the learning curve
(curve.csv, curve.png) and the training episodes, one dataset per checkpoint. A stopped run goes on with the same
command.

Existing files are not lost. A dataset that the same command has made is kept. Anything else in its place ends the
command before training starts, unless --overwrite is given. A folder that is not a dataset is never replaced.
"""

import csv
import importlib.metadata
import io
import math
import shutil
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal, MaskedCategorical, MultiAgentMLP, ProbabilisticActor
from torchrl.objectives.multiagent import MAPPOLoss
from tqdm import tqdm

from environments import starcraft, stops
from environments.checks import BadInput, check_positive, pick_device
from environments.simulators import check_interface, check_task, close_env, engine, make_env
from offline_data import sealed
from offline_data.card import check_free, dataset_path, read_json, short, table_row
from offline_data.collect_args import Args
from offline_data.dataset import episode_returns, episodes, open_dataset
from offline_data.durable import write_figure, write_text
from offline_data.lock import locked
from offline_data.writer import DatasetWriter

OBS, ACTION, MASK = ("agents", "observation"), ("agents", "action"), ("agents", "action_mask")


# Return of a perfect victory, by env. It sets the bounds of the qualities of SMACv1's tasks.
FULL_RETURN = {"smacv1": 20.0, "smax": 2.0}
SHORT_BATTLE = 30  # steps; if battles are this long on average, training keeps --replay-trajectories of them
MEDIUM_WINRATE = 0.4
BATTLES = ("smacv1", "smacv2", "smax")


def fill_in(args: Args) -> Args:
    """The defaults that depend on the simulator."""
    battles = args.env in BATTLES
    defaults = {
        "steps": 10_000_000 if battles else 3_000_000,
        "entropy": 0.01 if battles else 0.0,
        "reward_scale": 1.0 if battles else 0.1,
    }
    filled = replace(
        args,
        interface=check_interface(args.env, args.interface),
        **{k: v for k, v in defaults.items() if getattr(args, k) is None},
    )
    if filled.record_every is None:
        filled.record_every = max(filled.steps // (SHORT_BATTLE * filled.replay_trajectories), 1) if battles else 1
    return filled


def mlp(inputs: int, outputs: int, n: int, hidden: int, centralized: bool = False) -> MultiAgentMLP:
    """One network for all n agents. A centralised one sees all agents' inputs."""
    return MultiAgentMLP(
        inputs, outputs, n, centralized=centralized, share_params=True, depth=2, num_cells=hidden,
        activation_class=torch.nn.Tanh,
    )  # fmt: skip


def make_actor(env, hidden: int) -> ProbabilisticActor:
    """pi_i(a_i | o_i), one network for all agents. A Gaussian's standard deviation does not depend on the
    observation."""
    n, O = env.observation_spec[OBS].shape[-2:]
    if MASK in env.observation_spec.keys(True, True):
        A = env.observation_spec[MASK].shape[-1]
        logits = mlp(O, A, n, hidden)
        return ProbabilisticActor(
            TensorDictModule(logits, in_keys=[OBS], out_keys=[("agents", "logits")]),
            in_keys={"logits": ("agents", "logits"), "mask": MASK}, out_keys=[ACTION],
            distribution_class=MaskedCategorical, return_log_prob=True, log_prob_key=("agents", "log_prob"),
        )
    A = env.full_action_spec[ACTION].shape[-1]
    mean = mlp(O, A, n, hidden)
    head = TensorDictSequential(
        TensorDictModule(mean, in_keys=[OBS], out_keys=[("agents", "loc")]),
        TensorDictModule(
            AddStateIndependentNormalScale((n, A)),
            in_keys=[("agents", "loc")],
            out_keys=[("agents", "loc"), ("agents", "scale")],
        ),
    )
    return ProbabilisticActor(
        head, in_keys=[("agents", "loc"), ("agents", "scale")], out_keys=[ACTION],
        distribution_class=IndependentNormal, return_log_prob=True, log_prob_key=("agents", "log_prob"),
    )


def make_critic(env, hidden: int) -> TensorDictModule:
    """V(o_1, ..., o_n), one value for the team, repeated for each agent."""
    n, O = env.observation_spec[OBS].shape[-2:]
    return TensorDictModule(mlp(O, 1, n, hidden, centralized=True), in_keys=[OBS], out_keys=[("agents", "state_value")])


class EpisodeSplitter:
    """Cuts batches of steps [B, T] into whole episodes. Each batch continues where the last one ended.

    Episodes in which a game died are left out, and counted in `died`.
    """

    def __init__(self):
        self.open, self.died = {}, 0

    def __call__(self, batch: TensorDict):
        """Yields each episode that ended, as T + 1 rows for a DatasetWriter."""
        for b in range(batch.shape[0]):
            done = batch["next", "done"][b, :, 0]
            start = 0
            for end in done.nonzero()[:, 0].tolist():
                steps, start = torch.cat([*self.open.pop(b, []), batch[b, start : end + 1]]), end + 1
                if steps["next"].get("game_died", torch.zeros(1)).any():
                    self.died += 1
                else:
                    yield self._close(steps)
            if start < batch.shape[1]:
                self.open.setdefault(b, []).append(batch[b, start:].clone())

    def _close(self, steps: TensorDict) -> TensorDict:
        rows = steps.select("state", OBS, ACTION, MASK, "battle_won", strict=False)
        rows = torch.cat([rows, rows[-1:]])
        for key in ("state", OBS, MASK, "battle_won"):
            if key in rows.keys(True):
                rows[key][-1] = steps["next", key][-1]
        for key in ("reward", "done", "terminated"):
            rows[key] = torch.cat([steps["next", key], steps["next", key][-1:]])
        return rows


# Arguments that may differ when a training run goes on: they don't change its result.
FREE = ("out", "overwrite", "device", "samples", "demo_samples", "trajectories")


def load_state(args: Args, root: Path) -> dict | None:
    """The saved state of a stopped training run, or None if nothing was saved.

    With --overwrite a run with other settings counts as none. Raises BadInput for a file that can't be read. Without
    --overwrite it also does for a run with other settings, and names them.
    """
    path = root / "state.pt"
    if not path.exists():
        return None
    try:
        state = sealed.load(path)
        old = {key: state["args"].get(key) for key in asdict(args)}
        if not {"loss", "optimizer", "curve", "recent", "wins"} <= state.keys() or not state["curve"]:
            raise ValueError("a part is missing")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # BadInput is a ValueError
        raise BadInput(f"{path} can't be read: delete {root} to train again") from error
    changed = [key for key, value in asdict(args).items() if key not in FREE and old[key] != value]
    if not changed:
        return state
    if args.overwrite:
        return None
    named = ", ".join(f"--{key.replace('_', '-')} {old[key]}" for key in changed)
    raise BadInput(
        f"{root} holds a run with other settings ({named}): give the same again, another --out, or --overwrite to "
        "replace it"
    )


def arguments_of(args: Args) -> dict:
    """The arguments that a dataset depends on. Its path is not one of them."""
    return {key: value for key, value in asdict(args).items() if key not in ("out", "overwrite")}


def made_already(args: Args, path: Path, free=("device",)) -> bool:
    """Whether the same command has made the dataset at `path`. Arguments in `free` may differ.

    Raises BadInput if anything else is there.
    """
    if not path.is_symlink() and not path.exists():
        return False
    if not (path / "card.json").is_file():
        raise BadInput(f"{path} is no dataset and is left alone: move it away or give another --out")
    made, now = read_json(path / "card.json").get("made"), arguments_of(args)
    old = made.get("arguments") if isinstance(made, dict) else None
    if not isinstance(old, dict):
        raise BadInput(f"{path} was not made by this command: give another --out, or --overwrite to replace it")
    free = {*free, *(["demo_samples"] if path.name != "demo" else [])}
    changed = sorted(key for key in now.keys() | old.keys() if key not in free and old.get(key) != now.get(key))
    if changed:
        named = ", ".join(f"--{key.replace('_', '-')} {short(old.get(key))}" for key in changed)
        raise BadInput(
            f"{path} was made with other arguments ({named}): give the same again, another --out, or --overwrite to "
            "replace it"
        )
    return True


def qualities(args: Args) -> list[str]:
    """The datasets that the command writes. poor and good are written only if training has such battles."""
    if args.env not in BATTLES:
        names = ["medium-replay", "medium", "expert", "medium-expert"]
    else:
        names = ["medium-replay", "medium"] + ([] if args.task in starcraft.SMACV2_TASKS else ["poor", "good"])
    return names + (["demo"] if args.demo_samples else [])


def finished_qualities(args: Args, root: Path) -> set[str]:
    """The qualities that are finished. Checks, before hours of work, every path that the command is going to write.

    Raises BadInput if existing files would be lost.
    """
    state, finished = load_state(args, root), set()
    for quality in qualities(args):
        path = root.parent / quality
        if args.overwrite:
            check_free(path, overwrite=True)
        elif made_already(args, path):
            finished.add(quality)
    for shard in sorted(root.glob("episodes-*")):  # a killed run may have left one that its checkpoint does not know
        number = shard.name.removeprefix("episodes-")
        if number.isdecimal() and int(number) >= (len(state["curve"]) if state else 0) and not args.overwrite:
            made_already(args, shard, FREE)
    return finished


def forget(root: Path):
    """Removes the files of another training run, and nothing else. Used for --overwrite."""
    for pattern in ("state.pt", "actor-*.pt", "curve.csv", "curve.png"):
        for path in root.glob(pattern):
            path.unlink()
    for shard in root.glob("episodes-*"):
        if (shard / "card.json").is_file():
            shutil.rmtree(shard)


def update(loss: MAPPOLoss, optimizer, batch: TensorDict, args: Args):
    """MAPPO's epochs over one batch of steps."""
    batch = batch.to(args.device)
    batch["next", "reward"] = batch["next", "reward"] * args.reward_scale
    with torch.no_grad():
        loss.value_estimator(batch, params=loss.critic_network_params, target_params=loss.target_critic_network_params)
    flat = batch.reshape(-1)
    for _ in range(args.epochs):
        for index in torch.randperm(len(flat), device=flat.device).split(args.minibatch):
            losses = loss(flat[index])
            optimizer.zero_grad()
            sum(losses[k] for k in ("loss_objective", "loss_critic", "loss_entropy") if k in losses.keys()).backward()
            torch.nn.utils.clip_grad_norm_(loss.parameters(), args.max_grad_norm)
            optimizer.step()


def card(args: Args, quality: str, made: dict) -> dict:
    """All that is needed to make the dataset again."""
    arguments = arguments_of(args)
    versions = {package: importlib.metadata.version(package) for package in ("torch", "torchrl", "tensordict", "numpy")}
    made = {"by": "python -m offline_data collect", "arguments": arguments, "versions": versions, **made}
    return {
        "env": args.env,
        "task": args.task,
        "quality": quality,
        "engine": engine(args.env),
        "interface": args.interface,
        "made": made,
    }


def resume(env, args: Args, root: Path, loss, optimizer) -> tuple[list[dict], deque, deque]:
    """The curve and the last 100 returns and wins of a stopped run, whose state is loaded. A new run has none.

    A stopped run has left checkpoints, and one dataset of episodes for each.
    """
    curve, recent, wins = [], deque(maxlen=100), deque(maxlen=100)
    state = load_state(args, root)
    if state is None and args.overwrite:
        forget(root)
    if state is not None:
        loss.load_state_dict(state["loss"])
        optimizer.load_state_dict(state["optimizer"])
        curve = state["curve"]
        recent.extend(state["recent"])
        wins.extend(state["wins"])
        torch.manual_seed(args.seed + curve[-1]["step"])
        env.set_seed(args.seed + curve[-1]["step"])
    return curve, recent, wins


def save_checkpoint(args: Args, root: Path, actor, loss, optimizer, curve: list[dict], recent: deque, wins: deque):
    """Writes the actor, the state that a stopped run goes on from, and the learning curve."""
    sealed.save(root / f"actor-{len(curve) - 1:03d}.pt", actor.state_dict())
    state = {"args": asdict(args), "loss": loss.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
    sealed.save(root / "state.pt", state | {"recent": list(recent), "wins": list(wins)})
    text = io.StringIO()
    table = csv.DictWriter(text, list(curve[0]))
    table.writeheader()
    table.writerows(curve)
    write_text(root / "curve.csv", text.getvalue())


def train_in(env, args: Args, root: Path) -> list[dict]:
    torch.manual_seed(args.seed)
    with stops.not_for_children():  # worker processes start here
        env.set_seed(args.seed)
    actor, critic = make_actor(env, args.hidden).to(args.device), make_critic(env, args.hidden).to(args.device)
    loss = MAPPOLoss(actor, critic, clip_epsilon=args.clip, entropy_coeff=args.entropy)
    loss.set_keys(action=ACTION, value=("agents", "state_value"), sample_log_prob=("agents", "log_prob"))
    loss.make_value_estimator(gamma=args.gamma, lmbda=args.gae_lambda)
    optimizer = torch.optim.Adam(loss.parameters(), args.lr, eps=1e-5)
    curve, recent, wins = resume(env, args, root, loss, optimizer)

    frames = env.numel() * args.horizon
    done_steps = curve[-1]["step"] if curve else 0
    if done_steps >= args.steps:
        return curve
    collector = Collector(
        env, actor, frames_per_batch=frames, total_frames=-1, policy_device=args.device,
        auto_register_policy_transforms=False,
    )  # fmt: skip
    splitter, every = EpisodeSplitter(), max(args.steps // args.checkpoints, frames)
    writer = DatasetWriter(root / f"episodes-{len(curve):03d}", overwrite=True)
    finished, kept, steps, next_checkpoint = 0, 0, done_steps, done_steps + every
    mean = lambda values: sum(values) / len(values)
    with tqdm(total=args.steps, initial=done_steps, unit="step", desc=f"MAPPO {args.task}", mininterval=1) as bar:
        for batch in collector:
            stops.leave()
            for episode in splitter(batch.reshape(-1, args.horizon).cpu()):
                # A checkpoint comes with at least one episode.
                if finished % args.record_every == 0 or (not kept and steps + frames >= next_checkpoint):
                    writer.append(episode)
                    kept += 1
                recent.append(episode["reward"][:-1].sum().item())
                wins.append(bool(episode["battle_won"][-1]) if args.env in BATTLES else None)
                finished += 1
            update(loss, optimizer, batch, args)
            if not all(parameter.isfinite().all() for parameter in loss.parameters()):
                raise BadInput(f"MAPPO diverged after {steps:,} steps: give a lower --lr, and --overwrite")
            steps += frames
            for group in optimizer.param_groups:
                group["lr"] = args.lr * max(0.0, 1 - steps / args.steps)
            bar.update(frames)
            if recent:
                won = {"won": f"{mean(wins):.0%}"} if args.env in BATTLES else {}
                bar.set_postfix({"return": f"{mean(recent):.2f}"} | won)
            if (steps >= next_checkpoint or steps >= args.steps) and kept:
                writer.close(card(args, "training", {"steps": steps}))
                winrate = mean(wins) if args.env in BATTLES else None
                curve.append({"step": steps, "return": mean(recent), "winrate": winrate})
                save_checkpoint(args, root, actor, loss, optimizer, curve, recent, wins)
                next_checkpoint += every
                if steps >= args.steps:
                    break
                writer, kept = DatasetWriter(root / f"episodes-{len(curve):03d}", overwrite=True), 0
    if splitter.died:
        print(f"{splitter.died} battles were left out: their game died")
    return curve


def train(args: Args, root: Path) -> list[dict]:
    """MAPPO for args.steps.

    Returns the learning curve: step, return and winrate (of the last 100 episodes) at each checkpoint.
    """
    env = make_env(args.env, args.task, args.num_envs, args.workers, args.interface)
    try:
        return train_in(env, args, root)
    finally:
        close_env(env)


def plot_curve(curve: list[dict], path: Path, title: str):
    """The behaviour policy's learning curve: the return, and the winrate of battles."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    quantities = [key for key in ("return", "winrate") if curve[0][key] is not None]
    figure = Figure(figsize=(5 * len(quantities), 3.5))
    axes = figure.subplots(1, len(quantities), squeeze=False)
    for axis, key in zip(axes[0], quantities):
        label, scale = ("winrate (%", 100) if key == "winrate" else ("return (mean", 1)
        axis.plot([point["step"] for point in curve], [scale * point[key] for point in curve])
        axis.set(xlabel="environment steps", ylabel=f"{label}, last 100 episodes)", title=title)
        if key == "winrate":
            axis.set_ylim(0, 100)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.tight_layout()
    write_figure(path, figure, 120)


def keep(args: Args, path: Path) -> bool:
    """Whether the dataset at `path` is finished, and so is kept."""
    if args.overwrite or not made_already(args, path):
        return False
    print(f"{path} is there already and is kept")
    return True


def record_in(env, args: Args, root: Path, checkpoint: int, quality: str, made: dict, seed: int):
    torch.manual_seed(seed)
    with stops.not_for_children():
        env.set_seed(seed)
    actor = make_actor(env, args.hidden)
    actor.load_state_dict(sealed.load(root / f"actor-{checkpoint:03d}.pt"))
    writer, splitter, recorded = DatasetWriter(root.parent / quality, args.overwrite), EpisodeSplitter(), 0
    battles = args.env in BATTLES
    wanted = args.trajectories if battles else args.samples
    bar = tqdm(total=wanted, unit="battle" if battles else "step", desc=f"record {quality}", mininterval=1)
    with bar:
        td = env.reset()
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            while recorded < wanted:
                steps = []
                for _ in range(args.horizon):
                    stops.leave()
                    step, td = env.step_and_maybe_reset(actor(td))
                    steps.append(step)
                for episode in splitter(torch.stack(steps, len(env.batch_size)).reshape(-1, args.horizon)):
                    if recorded < wanted:
                        writer.append(episode)
                        more = 1 if battles else len(episode) - 1
                        recorded += more
                        bar.update(more)
    writer.close(card(args, quality, made))


def record(args: Args, root: Path, checkpoint: int, quality: str, made: dict, seed: int):
    """Whole episodes of a checkpoint's stochastic policy: args.trajectories battles, or at least args.samples
    transitions of robots."""
    if keep(args, root.parent / quality):
        return
    env = make_env(args.env, args.task, args.num_envs, args.workers, args.interface)
    try:
        record_in(env, args, root, checkpoint, quality, made, seed)
    finally:
        close_env(env)


def merge(args: Args, sources: list[Path], quality: str, root: Path, made: dict,
          every: int = 1, limit: int | None = None, between=(-math.inf, math.inf)) -> bool:
    """One dataset of the sources' episodes with low < return <= high: every `every`-th of them, or at most `limit`,
    evenly spread. Returns False if there are no such episodes."""
    if keep(args, root.parent / quality):
        return True
    low, high = between
    opened = [open_dataset(source)[0] for source in sources]
    returns = torch.cat([episode_returns(rows) for rows in opened])
    fitting = ((low < returns) & (returns <= high)).nonzero()[:, 0]
    if len(fitting) == 0:
        return False
    if limit is None:
        chosen = fitting[::every]
    else:
        count = min(limit, len(fitting))
        chosen = fitting[torch.arange(count) * len(fitting) // count]
    wanted, writer, number = set(chosen.tolist()), DatasetWriter(root.parent / quality, args.overwrite), 0
    for rows in tqdm(opened, desc=f"write {quality}"):
        for episode in episodes(rows):
            stops.leave()
            if number in wanted:
                writer.append(episode)
            number += 1
    writer.close(card(args, quality, made))
    return True


def write_robots(args: Args, root: Path, curve: list[dict]) -> list[str]:
    """Writes the qualities of MaMuJoCo; returns their names."""
    returns = [point["return"] for point in curve]
    expert = max(range(len(curve)), key=returns.__getitem__)
    if returns[expert] <= 0:
        raise BadInput(
            f"the best return of {args.task} is {returns[expert]:.1f}, and a third of that defines no medium policy: "
            "train for more --steps, with --overwrite; a task with negative returns alone can't be collected"
        )
    medium = next(i for i, r in enumerate(returns) if r >= returns[expert] / 3)
    print(f"expert: checkpoint {expert}, step {curve[expert]['step']:,}, return {returns[expert]:.1f}")
    print(f"medium: checkpoint {medium}, step {curve[medium]['step']:,}, return {returns[medium]:.1f}")
    shards = [root / f"episodes-{i:03d}" for i in range(medium + 1)]
    merge(args, shards, "medium-replay", root, {"up to checkpoint": medium, **curve[medium]})
    # If expert is the medium checkpoint, it needs other episodes, and so a seed that no checkpoint has.
    seeds = {"medium": medium, "expert": len(curve) if expert == medium else expert}
    for quality, checkpoint in (("medium", medium), ("expert", expert)):
        made = {"checkpoint": checkpoint, **curve[checkpoint]}
        record(args, root, checkpoint, quality, made, args.seed + 1 + seeds[quality])
    merge(args, [root.parent / "medium", root.parent / "expert"], "medium-expert", root, {"of": "medium and expert"})
    return ["medium-replay", "medium", "expert", "medium-expert"]


def write_battles(args: Args, root: Path, curve: list[dict]) -> list[str]:
    """Writes the qualities of a StarCraft task; returns their names."""
    best = max(range(len(curve)), key=lambda i: curve[i]["winrate"])
    medium = next((i for i, point in enumerate(curve) if point["winrate"] >= MEDIUM_WINRATE), best)
    print(
        f"medium: checkpoint {medium}, step {curve[medium]['step']:,}, return {curve[medium]['return']:.2f}, "
        f"{curve[medium]['winrate']:.0%} of battles won"
    )
    shards = [root / f"episodes-{i:03d}" for i in range(len(curve))]
    merge(
        args,
        shards[: medium + 1],
        "medium-replay",
        root,
        {"up to checkpoint": medium, **curve[medium]},
        limit=args.replay_trajectories,
    )
    if args.task in starcraft.SMACV2_TASKS:
        record(args, root, medium, "medium", {"checkpoint": medium, **curve[medium]}, args.seed + 1 + medium)
        return ["medium-replay", "medium"]
    made, full = ["medium-replay"], FULL_RETURN[args.env]
    for quality, low, high in (
        ("poor", -math.inf, full / 2),
        ("medium", full / 2, full * 3 / 4),
        ("good", full * 3 / 4, math.inf),
    ):
        if merge(
            args,
            shards,
            quality,
            root,
            {"of": f"training, returns from {low} to {high}"},
            limit=args.trajectories,
            between=(low, high),
        ):
            made.append(quality)
        else:
            print(f"{quality}: training had no battle with a return from {low} to {high}, no dataset is written")
    return made


def make_datasets(args: Args, root: Path):
    """Trains, or continues training, and writes every dataset that is missing."""
    curve = train(args, root)
    plot_curve(curve, root / "curve.png", f"MAPPO, {args.env} {args.task}")
    made = (write_battles if args.env in BATTLES else write_robots)(args, root, curve)
    if args.demo_samples:
        every = max(open_dataset(root.parent / "medium-replay")[1]["samples"] // args.demo_samples, 1)
        merge(
            args,
            [root.parent / "medium-replay"],
            "demo",
            root,
            {"of": f"one of every {every} episodes of medium-replay"},
            every,
        )
        made.append("demo")
    for quality in made:
        print(f"\n{root.parent / quality}")
        print(table_row(open_dataset(root.parent / quality)[1]))


def main(args: Args):
    check_task(args.env, args.task)  # an unknown task ends here, before anything is written
    check_positive(args, "samples", "trajectories", "replay_trajectories", "num_envs", "workers", "checkpoints")
    check_positive(args, "horizon", "epochs", "minibatch", "hidden", "lr", "clip", "max_grad_norm")
    args = fill_in(args)
    check_positive(args, "steps", "reward_scale", "record_every")
    if not 0 <= args.seed < 2**31 or args.demo_samples < 0 or not 0 <= args.entropy < 1e38:
        raise BadInput("--demo-samples and --entropy must be at least 0, --seed from 0 to 2**31 - 1")
    if not 0 <= args.gamma <= 1 or not 0 <= args.gae_lambda <= 1:
        raise BadInput("--gamma and --gae-lambda must be in [0, 1]")
    args.device = str(pick_device(args.device))
    make_env(args.env, args.task, 1, 1, args.interface).close()  # a missing simulator ends here too
    root = dataset_path(None, args.env, args.task, "behaviour", args.out)
    if finished_qualities(args, root) == set(qualities(args)):
        for quality in qualities(args):
            print(f"{root.parent / quality} is there already and is kept")
            print(table_row(open_dataset(root.parent / quality)[1]))
        return
    with locked(root):
        make_datasets(args, root)
