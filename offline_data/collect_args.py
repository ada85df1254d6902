"""The flags of `python -m offline_data collect`, in a file of their own so that --help does not load torch."""

from dataclasses import dataclass

from offline_data.card import DATA_ROOT


@dataclass
class Args:
    env: str = "mamujoco"
    """simulator"""
    task: str = "hopper"
    """task of that simulator"""
    interface: str | None = None
    """what agents see: benchmark (default), agent_obsk=K (mamujoco: gymnasium-robotics' own, joints up to K away),
    standard (smacv1: SMAC's own; smax: its only one)"""
    steps: int | None = None
    """environment steps of MAPPO (default: 3 million; in battles 10 million, as in the paper)"""
    samples: int = 1_000_000
    """robots: transitions of the expert and of the medium dataset"""
    trajectories: int = 1000
    """battles: trajectories of medium, and at most of each of SMACv1's qualities"""
    replay_trajectories: int = 10_000
    """battles: how many trajectories medium-replay has at most"""
    record_every: int | None = None
    """record every K-th training episode (default: 1; in battles so that all of training keeps --replay-trajectories
    of them, if they are 30 steps long; longer ones are fewer)"""
    demo_samples: int = 0
    """about how many transitions the demo dataset has; 0: no demo dataset"""
    seed: int = 0
    """seeds networks, minibatches and simulators"""
    out: str = str(DATA_ROOT)
    """datasets go to OUT/ENV/TASK/QUALITY; training looks for them in data/ at the repository's root"""
    overwrite: bool = False
    """replace datasets, and a behaviour policy, that another command made"""
    device: str = "cpu"
    """where MAPPO's networks are: cpu, cuda, ..., or auto"""

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
    """PPO's clipping of the probability ratio"""
    entropy: float | None = None
    """weight of the entropy bonus (default 0; 0.01 in battles)"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient; larger ones are clipped"""
    hidden: int = 128
    """hidden units of actor and critic"""
    reward_scale: float | None = None
    """factor on the rewards that MAPPO learns from (default 0.1; 1 in battles); recorded rewards are the simulator's"""
