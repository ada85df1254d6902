"""The values of comadice_train.py's flags that were not given.

A flag takes the preset's value. Where the preset has none, it takes the objective's, and after that COMMON's.
"""

from dataclasses import asdict, replace

from environments.checks import BadInput, check_positive
from support.runs import check_discount, check_policy_stage

PRESETS = {
    "comadice": {"objective": "semi"},
    "paper": {  # Table 4; Eq. 10 as it is printed
        "objective": "printed", "alpha": 10.0, "lambda_scale": 1.0, "tau": 0.005, "critic_lr": 1e-4, "lr": 1e-4,
        "lr_decay": False, "ema": 0.0, "layer_norm": False, "reward_scale": 1.0, "action_scale": 1.0,
    },
}  # fmt: skip
# alpha is in units of the data's mean_abs_reward, and episode_alpha in units of its return_deviation, both in
# offline_data/facts.py. So they mean the same on robots and in battles.
OBJECTIVES = {
    "semi": {
        "advantage": "td", "alpha": 5.0, "policy_alpha": 0.5, "episode_alpha": 1.0, "neighbours": True, "tau": 0.05,
        "bound": True, "critic_lr": 1e-3, "critic_lr_decay": True, "action_scale": 0.8,
    },
    "exact": {"advantage": "td", "alpha": 0.5, "tau": 0.005, "bound": False},
    "printed": {"advantage": "q", "alpha": 5.0, "tau": 0.005, "bound": False},
    "released_nu": {"advantage": "q", "alpha": 5.0, "tau": 0.005, "bound": False},
}  # fmt: skip
COMMON = {
    "episode_alpha": 0.0, "lambda_scale": 0.0, "critic_lr": 3e-4, "layer_norm": True, "lr": 1e-3, "lr_decay": True,
    "ema": 0.999, "action_scale": 0.85, "policy_alpha": 1.0, "neighbours": False, "critic_lr_decay": False,
}  # fmt: skip


def four_digits(x: float) -> float:
    """x rounded to four digits, since the last digits of a sum depend on the machine."""
    return float(f"{x:.4g}")


def check(args):
    """Raises BadInput for a flag out of its range, or flags that contradict each other."""
    check_positive(args, "critic_lr", "mixer_hidden", "init_batch_size", "reward_scale", "action_scale", "policy_alpha")
    check_policy_stage(args)
    check_discount(args)
    if not 0 <= args.lambda_scale < 1e38 or not 0 <= args.episode_alpha < 1e38:
        raise BadInput("--lambda-scale and --episode-alpha must be 0 or positive numbers below 1e38")
    if args.objective == "semi" and args.lambda_scale:
        raise BadInput("--objective semi has E[w | s] = 1 in every state and no multiplier: use --lambda-scale 0")
    if args.objective == "released_nu" and args.mixer_layers == 2:
        raise BadInput("--objective released_nu needs local weights W_i, so it needs --mixer-layers 1")
    if args.objective in ("printed", "released_nu") and args.advantage != "q":
        raise BadInput(f"--objective {args.objective} is defined with q: use --advantage q")


def resolve(args, mean_abs_reward: float, return_deviation: float = 0.0, policy_deviation: float | None = None):
    """comadice_train.Args with every flag filled in. Raises BadInput as check does.

    mean_abs_reward and return_deviation: see offline_data/facts.py. policy_deviation is the latter with `neighbours`,
    by default the same as without. With a deviation of 0 all episodes count the same.
    """
    given = {name: value for name, value in asdict(args).items() if value is not None}
    if "alpha" in given:
        check_positive(args, "alpha")
    preset = PRESETS[args.preset]
    if args.objective not in (None, preset["objective"]):  # another objective brings its own values and lambda_scale 0
        preset = {k: v for k, v in preset.items() if k not in OBJECTIVES[args.objective] and k != "lambda_scale"}
    own = dict(OBJECTIVES[given.get("objective", preset["objective"])])
    own["alpha"] = four_digits(own["alpha"] * mean_abs_reward)
    if "episode_alpha" in own:
        # A large --alpha means imitation, so episode_alpha grows with it. At the default the ratio between episodes is
        # much farther from 1 than w*, so it grows by the square, to catch up with w*. It does not shrink with --alpha:
        # too few episodes would be left to learn from.
        times = max(given.get("alpha", own["alpha"]) / own["alpha"], 1.0) ** 2
        neighbours = (COMMON | own | preset | given)["neighbours"]
        deviation = policy_deviation if neighbours and policy_deviation is not None else return_deviation
        own["episode_alpha"] = four_digits(own["episode_alpha"] * deviation * times)
    own["reward_scale"] = four_digits(0.2 / mean_abs_reward)
    args = replace(args, **COMMON | own | preset | given)
    check(args)
    return args
