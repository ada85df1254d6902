"""Published statistics of the benchmark's datasets (Table 3, OG-MARL's cards), and a comparison with a dataset.

    python -m offline_data info data/mamujoco/hopper/medium-replay      # its row of Table 3 beside the published ones
    python -m offline_data plot data/mamujoco/hopper/medium-replay      # histogram of episode returns
"""

import json
from pathlib import Path

import tyro

from offline_data.card import check_card, digits, read_json, table_row
from offline_data.card import verify as compare_sums
from offline_data.durable import check_new, write_figure

# The paper's Table 3, beside the statistics on OG-MARL's dataset cards (docs/dataset_cards: omiga.md, og_marl.md).
# A row is: env, task, quality | agents, state, obs, action | Table 3's thousands of trajectories and of samples, mean
# return and deviation | OG-MARL's mean return, deviation, least and greatest return, rows, trajectories
PUBLISHED = """
smacv1   2c_vs_64zg   poor          |  2 675 478 70 | 0.3   21.7  8.9 1.0 |  8.91 1.01  2.53 10.00  10830  348
smacv1   2c_vs_64zg   medium        |  2 675 478 70 | 1.0   75.9 13.0 1.4 | 13.00 1.39 10.01 15.00  37940 1001
smacv1   2c_vs_64zg   good          |  2 675 478 70 | 1.0  118.4 19.9 1.3 | 19.94 1.26 15.18 21.61  59215 1001
smacv1   5m_vs_6m     poor          |  5 156 124 12 | 1.0  113.7  8.5 1.2 |  8.50 1.19  1.81  9.89  22747 1001
smacv1   5m_vs_6m     medium        |  5 156 124 12 | 1.0  138.6 11.0 0.6 | 11.03 0.58 10.08 11.96  27717 1001
smacv1   5m_vs_6m     good          |  5 156 124 12 | 1.0  138.7 20.0 0.0 | 20.00 0.00 20.00 20.00  27734 1001
smacv1   6h_vs_8z     poor          |  6 213 172 14 | 1.0  145.5  9.1 0.8 |  9.12 0.81  4.80  9.99  24255 1001
smacv1   6h_vs_8z     medium        |  6 213 172 14 | 1.0  177.1 12.0 1.3 | 11.97 1.26 10.00 14.99  29511 1001
smacv1   6h_vs_8z     good          |  6 213 172 14 | 1.0  228.2 17.8 2.1 | 17.84 2.15 15.01 20.02  38040 1001
smacv1   corridor     poor          |  6 435 346 30 | 1.0  307.6  4.9 1.7 |  4.93 1.71  0.00  9.99  51268 1001
smacv1   corridor     medium        |  6 435 346 30 | 1.0  756.1 13.1 1.3 | 13.07 1.27 10.02 14.99 126012 1001
smacv1   corridor     good          |  6 435 346 30 | 1.0  601.0 19.9 1.0 | 19.88 1.01 15.01 20.49 100170 1001
smacv2   protoss_5_vs_5   medium    |  5 130  92 11 | 1.0   60.8 16.8 6.3 |
smacv2   protoss_10_vs_10 medium    | 10 310 182 16 | 1.0   68.3 15.7 5.2 |
smacv2   protoss_10_vs_11 medium    | 10 327 191 17 | 1.0   62.9 15.3 5.7 |
smacv2   protoss_20_vs_20 medium    | 20 820 362 26 | 1.0   76.7 16.2 4.7 |
smacv2   protoss_20_vs_23 medium    | 20 901 389 29 | 1.0   65.0 14.0 4.5 |
smacv2   terran_5_vs_5    medium    |  5 120  82 11 | 1.0   47.6 15.2 7.2 |
smacv2   terran_10_vs_10  medium    | 10 290 162 16 | 1.0   56.4 14.7 6.2 |
smacv2   terran_10_vs_11  medium    | 10 306 170 17 | 1.0   52.5 12.1 5.7 |
smacv2   terran_20_vs_20  medium    | 20 780 322 26 | 1.0   63.0 14.0 6.0 |
smacv2   terran_20_vs_23  medium    | 20 858 346 29 | 1.0   51.3 11.7 5.7 |
smacv2   zerg_5_vs_5      medium    |  5 120  82 11 | 1.0   27.5 10.4 5.0 |
smacv2   zerg_10_vs_10    medium    | 10 290 162 16 | 1.0   31.9 14.7 6.0 |
smacv2   zerg_10_vs_11    medium    | 10 306 170 17 | 1.0   30.9 12.0 5.1 |
smacv2   zerg_20_vs_20    medium    | 20 780 322 26 | 1.0   35.4 12.3 4.2 |
smacv2   zerg_20_vs_23    medium    | 20 858 346 29 | 1.0   32.8 10.8 4.0 |
smacv2   terran_5_vs_5    replay    |  5 120  82 11 |                     | 10.05 5.84 0.00 36.34  898164 17958
smacv2   terran_5_vs_5    random    |  5 120  82 11 |                     |  2.43 1.73 0.00 16.18 1500000 37874
smacv2   terran_10_vs_10  replay    | 10 290 162 16 |                     |  6.32 3.62 0.00 23.01  749850 13588
smacv2   zerg_5_vs_5      replay    |  5 120  82 11 |                     |  7.34 3.60 0.00 24.00  863281 23294
mamujoco hopper expert             | 3  42  14 1 | 1.5  999 2452.0 1097.9 | 2452.02 1097.86  95.27 3762.69 1000391 1481
mamujoco hopper medium             | 3  42  14 1 | 4.0  915  723.6  211.7 | 723.57  211.66 128.38 2776.49  919391 4000
mamujoco hopper medium-replay      | 3  42  14 1 | 4.2 1311  746.4  671.9 | 746.42  671.89  70.76 2801.15 1314826 4160
mamujoco hopper medium-expert      | 3  42  14 1 | 5.5 1914 1190.6  973.4 | 1190.61  973.40  95.27 3762.69 1919782 5481
mamujoco ant expert                | 2 226 113 4 | 1.0 1000 2055.1   22.1 | 2055.07   22.07 1994.03 2124.15 1001000 1000
mamujoco ant medium                | 2 226 113 4 | 1.0 1000 1418.7   37.0 | 1418.70   37.04  840.77 1473.86 1001000 1000
mamujoco ant medium-replay         | 2 226 113 4 | 1.8 1750 1029.5  141.3 | 1029.51  141.27  895.37 1517.06 1751750 1750
mamujoco ant medium-expert         | 2 226 113 4 | 2.0 2000 1736.9  319.6 | 1736.88  319.64  840.77 2124.15 2002000 2000
mamujoco halfcheetah expert        | 6 138  23 1 | 1.0 1000 2785.1 1053.1 | 2785.10 1053.14  317.94 3866.09 1001000 1000
mamujoco halfcheetah medium        | 6 138  23 1 | 1.0 1000 1425.7  520.1 | 1425.66  520.12  251.94 2113.52 1001000 1000
mamujoco halfcheetah medium-replay | 6 138  23 1 | 1.0 1000  655.8  590.4 | 655.76  590.40 -198.77 2132.60 1001000 1000
mamujoco halfcheetah medium-expert | 6 138  23 1 | 2.0 2000 2105.4 1073.2 | 2105.38 1073.24  251.94 3866.09 2002000 2000
"""


# OG-MARL's vaults core/gymnasium_mamujoco, quality replay: recorded on gymnasium_robotics.mamujoco_v1, the engine used
# here, with agent_obsk=1. Nobody published statistics of them. Task -> OG-MARL's name.
REPLAYS = {"hopper": "3hopper", "ant": "2ant", "halfcheetah": "6halfcheetah", "ant_4x2": "4ant",
           "halfcheetah_2x3": "2halfcheetah", "walker2d_2x3": "2walker"}  # fmt: skip


def published() -> dict[tuple[str, str, str], list[list[str]]]:
    """(env, task, quality) -> the numbers of PUBLISHED as they are printed: [sizes, Table 3's, OG-MARL's]. A part that
    is missing is an empty list."""
    lines = [[part.split() for part in line.split("|")] for line in PUBLISHED.strip().splitlines()]
    return {tuple(name): parts for name, *parts in lines}


def downloadable() -> set[tuple[str, str, str]]:
    """(env, task, quality) of the datasets that `download` finds."""
    replays = {("mamujoco", task, "replay") for task in REPLAYS}
    return replays | {name for name, parts in published().items() if parts[2]}


def differences(card: dict) -> tuple[list[str], list[str]]:
    """(published rows of this dataset, differences from them), as lines. Both are empty if nothing was published."""
    found = published().get((card["env"], card["task"], card["quality"]))
    if found is None:
        return [], []
    sizes, paper, vault = found
    rows, lines, made = [], [], card.get("made") if isinstance(card.get("made"), dict) else {}
    for name, value, key in zip(
        ("agents", "state", "obs", "action"), sizes, ("n_agents", "state_dim", "obs_dim", "action_dim")
    ):
        if card[key] != int(value):
            lines.append(f"{name}: {card[key]}, published {value}")

    def compare(who: str, name: str, value: float, printed: str, slack: float = 0.0):
        digits = len(printed.partition(".")[2])
        if not abs(value - float(printed)) <= 0.51 * 10**-digits + slack:
            lines.append(f"{name}: {value:,.{digits}f}, {who} {printed}")

    # Table 3 counts samples of every agent in SMACv1, of the team elsewhere.
    samples = card["samples"] * (card["n_agents"] if card["env"] == "smacv1" else 1)
    if paper:
        trajectories, thousands, mean, std = paper
        rows.append(
            f"| Table 3 | {card['quality']} | {trajectories}K | {thousands}K | {' | '.join(sizes)} | {mean} ± {std} |"
        )
        compare("Table 3", "trajectories (thousands)", card["trajectories"] / 1000, trajectories)
        compare(
            "Table 3",
            f"samples (thousands{', of every agent' if card['env'] == 'smacv1' else ''})",
            samples / 1000,
            thousands,
        )
        compare("Table 3", "mean return", card["return_mean"], mean)
        compare("Table 3", "deviation of returns", card["return_std"], std)
    if vault:
        mean, std, low, high, count, trajectories = vault
        rows.append(
            f"| OG-MARL | {card['quality']} | {trajectories} | {count} rows | {' | '.join(sizes)} | {mean} ± {std}, "
            f"{low} to {high} |"
        )
        compare("OG-MARL", "trajectories", card["trajectories"], trajectories)
        # OG-MARL counts rows. They include last observations (in MuJoCo) and rows after the end of the last episode.
        seen = made.get("rows", card["samples"] + (card["trajectories"] if card["env"] == "mamujoco" else 0))
        compare("OG-MARL", "rows", seen if isinstance(seen, int) else 0, count)
        for name, printed in (("mean", mean), ("std", std), ("min", low), ("max", high)):
            value = card[f"return_{name}"]
            compare("OG-MARL", f"return's {name}", value, printed, 2e-5 * abs(value))  # OG-MARL adds up in float32
    return rows, lines


def info(path: tyro.conf.Positional[str], verify: bool = False):
    """Validate a dataset, print its row of Table 3 beside the published ones and flag every difference.

    Args:
        path: dataset directory
        verify: compare every file with the checksums in the card (for a small dataset this is always done)
    """
    from offline_data.dataset import open_dataset  # here, since torch takes seconds to load

    if verify:
        card = read_json(Path(path, "card.json"))
        check_card(path, card)
        compare_sums(Path(path), card)
    _, card = open_dataset(path)
    rows, lines = differences(card)
    print("\n".join([table_row(card), *rows]))
    print(f"engine: {card.get('engine')}\ninterface: {card.get('interface')}\nmade: {json.dumps(card.get('made'))}")
    made = card.get("made")
    if rows and isinstance(made, dict) and str(made.get("reward")).startswith("return-to-go"):
        print("published: its rewards are returns-to-go, so its returns can't be compared with the published ones")
    elif rows:
        print("\n".join(f"published: DIFFERS in {line}" for line in lines) or "published: agrees with every number")
    if verify:
        print(f"checksums: all {len(card['sha256'])} files are as they were written")


def plot(path: tyro.conf.Positional[str], out: str | None = None):
    """Draw the histogram of a dataset's episode returns.

    Args:
        path: dataset directory
        out: the image to write (default returns.png beside the data, in that directory)
    """
    from matplotlib.figure import Figure

    from offline_data.dataset import episode_returns, open_dataset

    if out is not None:
        check_new("--out", out)
    rows, card = open_dataset(path)
    out = Path(path, "returns.png") if out is None else Path(out)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(episode_returns(rows).numpy(), bins=50)
    returns = f"{card['return_mean']:.{digits(card)}f} ± {card['return_std']:.{digits(card)}f}"
    title = f"{card['task']} {card['quality']}: {card['trajectories']} episodes, {returns}"
    axes.set(title=title, xlabel="return of the episode", ylabel="episodes")
    write_figure(out, figure, 150)
    print(f"wrote {out}")
