"""Makes offline datasets: trains a behaviour policy by MAPPO and records it at several qualities.

    python comadice_collect.py --env mamujoco --task hopper --out data

MAPPO (Yu et al. 2022) runs with TorchRL's own parts: MAPPOLoss, MultiAgentGAE, Collector, MultiAgentMLP. Its policy is an
unsquashed Gaussian, like the benchmark's behaviour policies, so recorded actions go beyond [-1, 1].

The protocol, fixed before any offline training looks at the data:

    expert          the checkpoint with the highest return of the stochastic policy (mean of the last 100 training episodes)
    medium          the first checkpoint whose return is at least a third of expert's
    medium-replay   every episode that training finished up to the medium checkpoint
    medium-expert   the medium and the expert episodes together
    demo            only with --demo-samples: every K-th episode of medium-replay, about so many transitions

Expert and medium are `--samples` transitions each, of whole episodes, by the stochastic policy.
Everything lies under OUT/ENV/TASK: the datasets, and behaviour/ with checkpoints, the learning curve
(curve.csv) and the episodes of training in one dataset a checkpoint. A run that was stopped goes on with the same command.
"""

import csv
import importlib.metadata
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tensordict import TensorDict
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal, MultiAgentMLP, ProbabilisticActor
from torchrl.objectives.multiagent import MAPPOLoss
from tqdm import tqdm

from comadice_data import BadInput, DatasetWriter, dataset_path, episodes, open_dataset, run_script, table_row
from comadice_envs import engine, make_env
from comadice_runs import DATA_ROOT, check_positive, pick_device

OBS, ACTION = ("agents", "observation"), ("agents", "action")


@dataclass
class Args:
    env: str = "mamujoco"
    """simulator"""
    task: str = "hopper"
    """task of that simulator"""
    agent_obsk: int | None = None
    """None: the benchmark's observations; k: gymnasium-robotics' own, joints up to k away"""
    steps: int = 3_000_000
    """environment steps of MAPPO"""
    samples: int = 1_000_000
    """transitions of the expert and of the medium dataset"""
    demo_samples: int = 0
    """transitions of the demo dataset; 0: none"""
    seed: int = 0
    """seeds networks, minibatches and simulators"""
    out: str = str(DATA_ROOT)
    """datasets go to OUT/ENV/TASK/QUALITY; training looks for them in data/ beside this file"""
    device: str = "cpu"
    """where MAPPO's networks live"""

    num_envs: int = 32
    """environments in each worker process"""
    workers: int = 1
    """worker processes"""
    checkpoints: int = 100
    """checkpoints over training"""
    horizon: int = 128
    """steps of each environment between updates"""
    epochs: int = 8
    """passes over the steps of one update"""
    minibatch: int = 512
    """team transitions in a gradient step"""
    lr: float = 3e-4
    """Adam's learning rate, falling linearly to 0"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip: float = 0.2
    """PPO's clip of the probability ratio"""
    entropy: float = 0.0
    """weight of the entropy bonus"""
    max_grad_norm: float = 0.5
    """clip of the gradient's norm"""
    hidden: int = 128
    """hidden units of actor and critic"""
    reward_scale: float = 0.1
    """factor on the rewards that MAPPO learns from; recorded rewards are the simulator's"""


def make_actor(env, hidden: int) -> ProbabilisticActor:
    """pi_i(a_i | o_i), one network for all agents; the standard deviation does not depend on the observation."""
    n, O = env.observation_spec[OBS].shape[-2:]
    A = env.full_action_spec[ACTION].shape[-1]
    mean = MultiAgentMLP(O, A, n, centralized=False, share_params=True, depth=2, num_cells=hidden, activation_class=torch.nn.Tanh)
    head = TensorDictSequential(
        TensorDictModule(mean, in_keys=[OBS], out_keys=[("agents", "loc")]),
        TensorDictModule(AddStateIndependentNormalScale((n, A)), in_keys=[("agents", "loc")], out_keys=[("agents", "loc"), ("agents", "scale")]),
    )
    return ProbabilisticActor(
        head, in_keys=[("agents", "loc"), ("agents", "scale")], out_keys=[ACTION],
        distribution_class=IndependentNormal, return_log_prob=True, log_prob_key=("agents", "log_prob"),
    )


def make_critic(env, hidden: int) -> TensorDictModule:
    """V(o_1, ..., o_n), one value for the team, repeated for each agent."""
    n, O = env.observation_spec[OBS].shape[-2:]
    value = MultiAgentMLP(O, 1, n, centralized=True, share_params=True, depth=2, num_cells=hidden, activation_class=torch.nn.Tanh)
    return TensorDictModule(value, in_keys=[OBS], out_keys=[("agents", "state_value")])


class EpisodeSplitter:
    """Cuts batches of steps [B, T], which run on from one call to the next, into whole episodes."""

    def __init__(self):
        self.open = {}

    def __call__(self, batch: TensorDict):
        """Yields each episode that ended, as T + 1 rows for a DatasetWriter."""
        for b in range(batch.shape[0]):
            done = batch["next", "done"][b, :, 0]
            start = 0
            for end in done.nonzero()[:, 0].tolist():
                yield self._close([*self.open.pop(b, []), batch[b, start : end + 1]])
                start = end + 1
            if start < batch.shape[1]:
                self.open.setdefault(b, []).append(batch[b, start:].clone())

    def _close(self, pieces: list[TensorDict]) -> TensorDict:
        steps = torch.cat(pieces)
        rows = steps.select("state", OBS, ACTION)
        rows = torch.cat([rows, rows[-1:]])
        for key in ("state", OBS):
            rows[key][-1] = steps["next", key][-1]
        for key in ("reward", "done", "terminated"):
            rows[key] = torch.cat([steps["next", key], steps["next", key][-1:]])
        return rows


def train(args: Args, root: Path) -> list[dict]:
    """MAPPO for args.steps. Returns the learning curve: step, return (of the last 100 episodes) at each checkpoint."""
    torch.manual_seed(args.seed)
    env = make_env(args.env, args.task, args.num_envs, args.workers, args.agent_obsk)
    env.set_seed(args.seed)
    actor, critic = make_actor(env, args.hidden).to(args.device), make_critic(env, args.hidden).to(args.device)
    loss = MAPPOLoss(actor, critic, clip_epsilon=args.clip, entropy_coeff=args.entropy)
    loss.set_keys(action=ACTION, value=("agents", "state_value"), sample_log_prob=("agents", "log_prob"))
    loss.make_value_estimator(gamma=args.gamma, lmbda=args.gae_lambda)
    optimizer = torch.optim.Adam(loss.parameters(), args.lr, eps=1e-5)

    # What a stopped run left: checkpoints and one dataset of episodes for each.
    curve, recent = [], deque(maxlen=100)
    if (root / "state.pt").exists():
        try:
            state = torch.load(root / "state.pt", weights_only=True)
        except Exception as error:  # torch.load has no one type for a file that is cut, foreign or unsafe
            raise BadInput(f"{root / 'state.pt'} can't be read: delete {root} to train again") from error
        free = ("out", "device", "workers", "samples", "demo_samples")  # may differ when a run goes on
        if any(state["args"][k] != v for k, v in asdict(args).items() if k not in free):
            raise BadInput(f"{root} holds a run with other settings: give them again, another --out, or delete it")
        loss.load_state_dict(state["loss"])
        optimizer.load_state_dict(state["optimizer"])
        curve, recent = state["curve"], deque(state["recent"], maxlen=100)
        torch.manual_seed(args.seed + curve[-1]["step"])
        env.set_seed(args.seed + curve[-1]["step"])

    frames = args.num_envs * args.workers * args.horizon
    done_steps = curve[-1]["step"] if curve else 0
    if done_steps >= args.steps:
        return curve
    collector = Collector(env, actor, frames_per_batch=frames, total_frames=-1, policy_device=args.device, auto_register_policy_transforms=False)
    splitter, every = EpisodeSplitter(), max(args.steps // args.checkpoints, frames)
    writer, finished, next_checkpoint = DatasetWriter(root / f"episodes-{len(curve):03d}"), 0, done_steps + every
    bar = tqdm(total=args.steps, initial=done_steps, unit="step", desc=f"MAPPO {args.task}", mininterval=1)
    steps = done_steps
    for batch in collector:
        for episode in splitter(batch.reshape(-1, args.horizon).cpu()):
            writer.append(episode)
            recent.append(episode["reward"][:-1].sum().item())
            finished += 1
        update(loss, optimizer, batch, args)
        steps += frames
        for group in optimizer.param_groups:
            group["lr"] = args.lr * max(0.0, 1 - steps / args.steps)
        bar.update(frames)
        if recent:
            bar.set_postfix({"return": f"{sum(recent) / len(recent):.0f}"})
        if (steps >= next_checkpoint or steps >= args.steps) and finished:
            writer.close(card(args, "training", {"steps": steps}))
            curve.append({"step": steps, "return": sum(recent) / len(recent)})
            torch.save(actor.state_dict(), root / f"actor-{len(curve) - 1:03d}.pt")
            state = {"args": asdict(args), "loss": loss.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve, "recent": list(recent)}
            torch.save(state, root / "state.pt.partial")
            (root / "state.pt.partial").rename(root / "state.pt")
            with open(root / "curve.csv", "w", newline="") as file:
                table = csv.DictWriter(file, ["step", "return"])
                table.writeheader()
                table.writerows(curve)
            next_checkpoint += every
            if steps >= args.steps:
                break
            writer, finished = DatasetWriter(root / f"episodes-{len(curve):03d}"), 0
    bar.close()
    collector.shutdown()
    return curve


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


def record(args: Args, root: Path, checkpoint: int, quality: str, made: dict):
    """Whole episodes of a checkpoint's stochastic policy, at least args.samples transitions."""
    env = make_env(args.env, args.task, args.num_envs, args.workers, args.agent_obsk)
    seed = args.seed + 1 + checkpoint
    torch.manual_seed(seed)
    env.set_seed(seed)
    actor = make_actor(env, args.hidden)
    actor.load_state_dict(torch.load(root / f"actor-{checkpoint:03d}.pt", weights_only=True, map_location="cpu"))
    writer, splitter, recorded = DatasetWriter(root.parent / quality), EpisodeSplitter(), 0
    bar = tqdm(total=args.samples, unit="step", desc=f"record {quality}", mininterval=1)
    td = env.reset()
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        while recorded < args.samples:
            steps = []
            for _ in range(args.horizon):
                step, td = env.step_and_maybe_reset(actor(td))
                steps.append(step)
            for episode in splitter(torch.stack(steps, len(env.batch_size)).reshape(-1, args.horizon)):
                if recorded < args.samples:
                    writer.append(episode)
                    recorded += len(episode) - 1
                    bar.update(len(episode) - 1)
    bar.close()
    env.close()
    writer.close(card(args, quality, made))


def merge(args: Args, sources: list[Path], quality: str, root: Path, made: dict, every: int = 1):
    """One dataset of every `every`-th episode of several."""
    writer, count = DatasetWriter(root.parent / quality), 0
    for source in tqdm(sources, desc=f"write {quality}"):
        for episode in episodes(open_dataset(source)[0]):
            if count % every == 0:
                writer.append(episode)
            count += 1
    writer.close(card(args, quality, made))


def card(args: Args, quality: str, made: dict) -> dict:
    """All that it takes to make the dataset again."""
    interface = "benchmark" if args.agent_obsk is None else f"agent_obsk={args.agent_obsk}"
    arguments = {k: v for k, v in asdict(args).items() if k != "out"}
    versions = {package: importlib.metadata.version(package) for package in ("torch", "torchrl", "tensordict", "numpy")}
    made = {"by": "comadice_collect.py", "arguments": arguments, "versions": versions, **made}
    return {"env": args.env, "task": args.task, "quality": quality, "engine": engine(args.env), "interface": interface, "made": made}


def main(args: Args):
    check_positive(args, "steps", "samples", "num_envs", "workers", "checkpoints", "horizon", "epochs", "minibatch", "hidden", "lr", "clip", "reward_scale")
    if args.seed < 0 or args.demo_samples < 0 or not 0 <= args.gamma <= 1 or not 0 <= args.gae_lambda <= 1:
        raise BadInput("--seed and --demo-samples must be at least 0, --gamma and --gae-lambda in [0, 1]")
    args.device = str(pick_device(args.device))
    make_env(args.env, args.task, 1, 1, args.agent_obsk).close()  # an unknown task ends here, before anything is written
    root = dataset_path(None, args.env, args.task, "behaviour", args.out)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"can't write to --out {args.out}: {error.strerror}") from error
    curve = train(args, root)
    returns = [point["return"] for point in curve]
    expert = max(range(len(curve)), key=returns.__getitem__)
    if returns[expert] <= 0:
        raise BadInput(f"the best return of {args.task} is {returns[expert]:.1f}, and a third of it makes no medium policy: train for more --steps")
    medium = next(i for i, r in enumerate(returns) if r >= returns[expert] / 3)
    print(f"expert: checkpoint {expert}, step {curve[expert]['step']:,}, return {returns[expert]:.1f}")
    print(f"medium: checkpoint {medium}, step {curve[medium]['step']:,}, return {returns[medium]:.1f}")
    shards = [root / f"episodes-{i:03d}" for i in range(medium + 1)]
    merge(args, shards, "medium-replay", root, {"up to checkpoint": medium, **curve[medium]})
    for quality, checkpoint in (("medium", medium), ("expert", expert)):
        record(args, root, checkpoint, quality, {"checkpoint": checkpoint, **curve[checkpoint]})
    merge(args, [root.parent / "medium", root.parent / "expert"], "medium-expert", root, {"of": "medium and expert"})
    made = ["medium-replay", "medium", "expert", "medium-expert"]
    if args.demo_samples:
        every = max(open_dataset(root.parent / "medium-replay")[1]["samples"] // args.demo_samples, 1)
        merge(args, [root.parent / "medium-replay"], "demo", root, {"of": f"every {every}th episode of medium-replay"}, every)
        made.append("demo")
    for quality in made:
        print(f"\n{root.parent / quality}")
        print(table_row(open_dataset(root.parent / quality)[1]))


if __name__ == "__main__":
    run_script(main, tyro.cli(Args))
