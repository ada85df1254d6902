"""Lists the tasks and their sizes: `python -m environments`.

The sizes are written down here, so no simulator has to be built, or even installed. Tests compare them with the
simulators. They are the sizes of each env's default interface. mamujoco and smacv1 also accept tasks that are not
listed here.
"""

from importlib.util import find_spec

from environments.checks import run_script

# env, task, number of agents, size of the state, of one agent's observation, of its action (battles: number of actions)
TASKS = """
mamujoco  hopper             3   42   14   1
mamujoco  ant                2  226  113   4
mamujoco  halfcheetah        6  138   23   1
smax      protoss_5_vs_5     5   80   87  10
smax      protoss_10_vs_10  10  160  177  15
smax      protoss_10_vs_11  10  168  186  16
smax      protoss_20_vs_20  20  320  357  25
smax      protoss_20_vs_23  20  344  384  28
smax      terran_5_vs_5      5   80   87  10
smax      terran_10_vs_10   10  160  177  15
smax      terran_10_vs_11   10  168  186  16
smax      terran_20_vs_20   20  320  357  25
smax      terran_20_vs_23   20  344  384  28
smax      zerg_5_vs_5        5   80   87  10
smax      zerg_10_vs_10     10  160  177  15
smax      zerg_10_vs_11     10  168  186  16
smax      zerg_20_vs_20     20  320  357  25
smax      zerg_20_vs_23     20  344  384  28
smax      3m                 3   72   75   8
smax      8m                 8  192  205  13
smax      25m               25  600  647  30
smax      5m_vs_6m           5  132  140  11
smax      10m_vs_11m        10  252  270  16
smax      27m_vs_30m        27  684  738  35
smax      2s3z               5  120  127  10
smax      3s5z               8  192  205  13
smax      3s5z_vs_3s6z       8  204  218  14
smax      3s_vs_5z           3   96  101  10
smax      6h_vs_8z           6  168  179  13
smax      corridor           6  360  387  29
smacv1    2c_vs_64zg         2  675  478  70
smacv1    5m_vs_6m           5  156  124  12
smacv1    6h_vs_8z           6  213  172  14
smacv1    corridor           6  435  346  30
smacv2    protoss_5_vs_5     5  130   92  11
smacv2    protoss_10_vs_10  10  310  182  16
smacv2    protoss_10_vs_11  10  327  191  17
smacv2    protoss_20_vs_20  20  820  362  26
smacv2    protoss_20_vs_23  20  901  389  29
smacv2    terran_5_vs_5      5  120   82  11
smacv2    terran_10_vs_10   10  290  162  16
smacv2    terran_10_vs_11   10  306  170  17
smacv2    terran_20_vs_20   20  780  322  26
smacv2    terran_20_vs_23   20  858  346  29
smacv2    zerg_5_vs_5        5  120   82  11
smacv2    zerg_10_vs_10     10  290  162  16
smacv2    zerg_10_vs_11     10  306  170  17
smacv2    zerg_20_vs_20     20  780  322  26
smacv2    zerg_20_vs_23     20  858  346  29
"""

# The modules that an env needs, and how to install them.
NEEDS = {
    "mamujoco": (("gymnasium_robotics", "mujoco"), "pip install -r requirements.txt"),
    "smax": (("jaxmarl",), "pip install -r requirements-smax.txt"),
    "smacv1": (("smacv2", "pysc2"), "smacv2 and StarCraft II, see the README"),
    "smacv2": (("smacv2", "pysc2"), "smacv2 and StarCraft II, see the README"),
}


def tasks() -> list[tuple[str, str, list[int]]]:
    """(env, task, [agents, state, observation, action])."""
    rows = [line.split() for line in TASKS.strip().splitlines()]
    return [(env, task, [int(size) for size in sizes]) for env, task, *sizes in rows]


def main():
    print(f"{'env':<10}{'task':<18}{'agents':<8}{'state':<7}{'obs':<6}action")
    missing = {}
    for env, task, (n, S, O, A) in tasks():
        modules, how = NEEDS[env]
        lacking = [module for module in modules if find_spec(module) is None]
        if lacking:
            missing[env] = f"{env} needs {' and '.join(lacking)}: {how}"
        print(f"{env:<10}{task:<18}{n:<8}{S:<7}{O:<6}{A:<8}{'needs ' + ', '.join(lacking) if lacking else ''}".rstrip())
    print("\n".join(["", *missing.values()] if missing else []))


if __name__ == "__main__":
    run_script(main)
