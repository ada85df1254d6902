"""Steps of SMAX battles per second: with a policy, without one, and with JaxMARL itself.

    python -m benchmarks.smax_speed --task zerg_10_vs_11 --battles 32

Steps are counted over all battles. If the machine also does other work, look at the ratios and at steps per CPU second.
"""

from dataclasses import dataclass

import tyro

from environments import stops
from support.flags import program


@dataclass
class Args:
    task: str = "zerg_10_vs_11"
    """one of environments/smax.py's tasks"""
    battles: int = 32
    """battles stepped together"""
    steps: int = 500
    """timed steps of all battles"""
    threads: int = 1
    """CPU threads of PyTorch; JAX uses all cores that it finds"""


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    stops.catch(begun=False)
    ARGS = tyro.cli(Args, prog=program())

# isort: split
import time
from collections.abc import Callable

import torch

from comadice_mixer import CategoricalPolicy
from environments.checks import BadInput, run_script
from environments.smax import SMAXEnv, check_task, engine


def measure(name: str, play: Callable[[int], None], args: Args, base: float | None = None) -> float:
    """Times play(steps), after a tenth as many steps to compile and warm up. Returns CPU seconds per step."""
    play(max(args.steps // 10, 2))
    wall, cpu = time.perf_counter(), time.process_time()
    play(args.steps)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    total = args.steps * args.battles
    ratio = "" if base is None else f"{cpu / args.steps / base:>9.2f} x JaxMARL's CPU time"
    print(f"{name:<24}{total / wall:>10.0f} steps/s{total / cpu:>10.0f} steps/CPU second{ratio}")
    return cpu / args.steps


def raw_player(env: SMAXEnv, actions: torch.Tensor) -> Callable[[int], None]:
    """JaxMARL called directly: its masks and its step, which resets finished battles."""
    import jax

    simulator, B = env.simulator, env.batch_size[0]

    @jax.jit
    def step(key, state, action):
        result = jax.vmap(simulator.step)(jax.random.split(key, B), state, dict(zip(simulator.agents, action.T)))
        return result, jax.vmap(simulator.get_avail_actions)(result[1])

    joint = [jax.numpy.asarray(action.numpy()) for action in actions]

    def play(steps: int):
        key = jax.random.PRNGKey(0)
        _, state = jax.vmap(simulator.reset)(jax.random.split(key, B))
        for t in range(steps):
            key, now = jax.random.split(key)
            (_, state, *_), _ = jax.block_until_ready(step(now, state, joint[t % len(joint)]))

    return play


@torch.no_grad()
def main(args: Args):
    check_task(args.task)
    if min(args.battles, args.steps, args.threads) < 1:
        raise BadInput("--battles, --steps and --threads must be positive")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    env = SMAXEnv(args.task, args.battles)
    env.set_seed(0)
    n, A, O = (
        *env.observation_spec["agents", "action_mask"].shape[-2:],
        env.observation_spec["agents", "observation"].shape[-1],
    )
    actions = torch.randint(A, (64, args.battles, n))
    policy = CategoricalPolicy(n, O, A)
    print(f"{engine()}, {args.task}, {args.battles} battles")

    def play(act):
        def steps(count: int):
            td = env.reset()
            for t in range(count):
                td["agents", "action"] = act(t, td)
                _, td = env.step_and_maybe_reset(td)

        return steps

    base = measure("JaxMARL", raw_player(env, actions), args)
    measure("SMAXEnv", play(lambda t, td: actions[t % len(actions)]), args, base)
    measure(
        "SMAXEnv and policy",
        play(lambda t, td: policy.act(td["agents", "observation"], td["agents", "action_mask"])),
        args,
        base,
    )


if __name__ == "__main__":
    run_script(main, ARGS)
