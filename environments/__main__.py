"""Lists the tasks and their sizes: `python -m environments`."""

from environments import mamujoco, smax, starcraft
from environments.checks import NoSimulator
from environments.simulators import make_env


def main():
    print(f"{'env':<10}{'task':<18}{'agents':<8}{'state':<7}{'obs':<6}action")
    tasks = [("mamujoco", task) for task in mamujoco.MAMUJOCO_TASKS] + [("smax", task) for task in smax.TASKS]
    tasks += [("smacv1", task) for task in starcraft.SMACV1_TASKS] + [
        ("smacv2", task) for task in starcraft.SMACV2_TASKS
    ]
    missing = set()
    for name, task in tasks:
        try:
            made = make_env(name, task, 1)
        except NoSimulator as error:
            if name not in missing:
                print(f"{name:<10}{error}")
            missing.add(name)
            continue
        spec = made.observation_spec
        n, O = spec["agents", "observation"].shape[-2:]
        choices = spec["agents", "action_mask"] if name != "mamujoco" else made.full_action_spec["agents", "action"]
        print(f"{name:<10}{task:<18}{n:<8}{spec['state'].shape[-1]:<7}{O:<6}{choices.shape[-1]}")
        made.close()


if __name__ == "__main__":
    main()
