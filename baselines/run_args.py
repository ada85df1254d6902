"""The flags that all baselines have, in a file of their own so that --help does not load torch."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RunArgs:
    """The flags that all baselines have."""

    env: str | None = None
    """simulator: mamujoco, smacv2, smacv1, smax (default: mamujoco, or that of --data)"""
    task: str | None = None
    """task of that simulator (default: hopper or zerg_5_vs_5, or that of --data)"""
    quality: str | None = None
    """quality of the dataset (default: that of --data, or medium-replay for robots and medium for battles; demo if that
    is missing and a demo comes with the code)"""
    data: str | None = None
    """a dataset directory, instead of data/ENV/TASK/QUALITY"""
    out: str = "runs"
    """run directories go to OUT/ENV/TASK/QUALITY/ALGO/seedN"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """one run for each seed; they are trained together"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    data_device: Literal["auto", "cpu", "device"] = "auto"
    """where the dataset is kept: cpu, device (that of --device), or auto (on --device if it fits). A resumed run keeps
    its choice"""
    tf32: bool = False
    """on a GPU: matrix products in TF32, faster and less exact"""
    graph: bool = True
    """on a GPU: replay the update as a CUDA graph"""
    quiet: bool = False
    """no progress bars"""
    logger: Literal["none", "csv", "tensorboard", "wandb"] = "none"
    """also log metrics.csv's rows with TorchRL's csv, tensorboard or (offline) wandb logger (support/loggers.py)"""
    resume: bool = False
    """go on with runs that were stopped, leave finished ones as they are, extend them with more --steps and --evals"""
    overwrite: bool = False
    """replace runs that are already there"""

    steps: int = 200_000
    """gradient steps"""
    lr: float = 1e-3
    """Adam's learning rate"""
    lr_decay: bool = True
    """let the learning rate fall linearly to 0, as in comadice_bc.py"""
    ema: float = 0.999
    """decay of the average of the policy's weights, which is the policy that is played, as in comadice_bc.py; 0: off"""
    gamma: float = 0.99
    """discount (Table 4)"""
    tau: float = 0.05
    """step of the target networks towards the networks, ComaDICE's default. The authors of most of these methods use
    0.005, some 0.01, or a copy after every so many steps"""
    reward_scale: float | None = None
    """factor on the rewards (default: 0.2 / mean absolute reward, as in comadice_train.py)"""
    layer_norm: bool = True
    """LayerNorm in q and v, as in comadice_train.py"""
    episode_alpha: float = 0.0
    """transitions of episodes with a higher return are drawn more often, as in comadice_train.py with --neighbours
    False; in units of the return. 0: all equally often, as published"""
    batch_size: int = 128
    """transitions in a batch (Table 4)"""
    hidden: int = 256
    """hidden units of the local networks (Table 4)"""
    evals: int = 100
    """evaluations over the training of the policy (Table 4)"""
    eval_episodes: int = 32
    """episodes per evaluation (Table 4)"""
    workers: int = 1
    """processes that simulate evaluation episodes; the start states depend on it"""
