"""Lists the datasets on this disk, those that come with the code, and those to download.

    python -m offline_data list
    python -m offline_data list --root /mnt/data

Only cards are read: no simulator is built, no row is read, and torch is not loaded.
"""

from pathlib import Path

from environments.checks import BadInput
from offline_data.card import DATA_ROOT, check_card, digits, read_json
from offline_data.published import downloadable, published

# These come with the code.
SHIPPED = {("mamujoco", "hopper", "demo"), ("mamujoco", "hopper", "few-good"), ("smax", "zerg_5_vs_5", "demo")}
HEADER = ("env", "task", "quality", "episodes", "size", "mean return", "where")


def in_bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def on_disk(root: Path) -> list[tuple]:
    """A row for every ROOT/ENV/TASK/QUALITY with a card; one that can't be used says why."""
    rows = []
    for path in sorted(root.glob("*/*/*/card.json")):
        folder = path.parent
        name = folder.relative_to(root).parts
        if folder.name.endswith((".partial", ".replaced")):
            continue
        try:
            card = read_json(path)
            check_card(folder, card)
        except BadInput as error:
            rows.append((*name, "", "", "", f"unusable: {str(error).removeprefix(str(path)).lstrip(': ')}"))
            continue
        size, mean = in_bytes(sum(card["bytes"].values())), f"{card['return_mean']:.{digits(card)}f}"
        name = card["env"], card["task"], card["quality"]
        ships = " (comes with the code)" if root == DATA_ROOT and name in SHIPPED else ""
        rows.append((*name, f"{card['trajectories']:,}", size, mean, f"here: {folder}{ships}"))
    return rows


def to_download() -> list[tuple]:
    """A row for every published dataset; its size is that of the rows once they are converted."""
    rows, known = [], published()
    for name in sorted(downloadable()):
        sizes, _, vault = known.get(name, ([], [], []))
        if not vault:
            rows.append((*name, "?", "?", "?", "download"))
            continue
        n, S, O, A = map(int, sizes)
        count, mean, trajectories = int(vault[4]), vault[0], int(vault[5])
        action = 4 * n * A if name[0] == "mamujoco" else 8 * n + n * A  # battles: a number, and a mask
        row = 4 * S + 4 * n * O + action + 4 + 3 + 8
        rows.append((*name, f"{trajectories:,}", in_bytes(count * row), mean, "download"))
    return rows


def list_datasets(root: str | None = None):
    """List the datasets on this disk, those that come with the code, and those that can be downloaded.

    Args:
        root: another directory with datasets (ROOT/ENV/TASK/QUALITY), beside data/ of this project
    """
    roots = [DATA_ROOT]
    if root is not None:
        if not root or not Path(root).is_dir():
            raise BadInput(f"--root {root!r} is no directory")
        roots += [Path(root)] if Path(root).resolve() != DATA_ROOT.resolve() else []
    rows = [row for each in roots for row in on_disk(each)]
    table = [HEADER, *rows, *to_download()]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADER) - 1)]
    right = {HEADER.index(name) for name in ("episodes", "size", "mean return")}
    for row in table:
        cells = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        line = "  ".join([*cells, row[-1]])
        print(line if line.isprintable() else ascii(line))  # a folder's name may hold anything
    print(
        "\ndownload: `python -m offline_data download --env ENV --task TASK --quality QUALITY` (sizes once converted)\n"
        "the authors' own copies: https://cloud.tsinghua.edu.cn/d/dcf588d659214a28a777 (MaMuJoCo), "
        "https://cloud.tsinghua.edu.cn/d/f3c509d7a9d54ccd89c4 (SMACv1)\n"
        "any other task: `python -m offline_data collect` makes its data, `python -m environments` lists the tasks"
    )
