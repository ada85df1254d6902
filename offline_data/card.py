"""A dataset's card, card.json: the folders of datasets, what a card must hold, and its checksums.

Nothing here loads torch, so reading a card takes no time. dataset.py describes the datasets themselves.

A card may come from anybody. Its names become folders, its texts are printed, its numbers become array sizes. So
`check_card` checks all of them first.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

from environments.checks import BadInput

DATA_ROOT = Path(__file__).parent.parent / "data"
NAME = re.compile(r"[\w-]{1,64}", re.ASCII)  # an env, a task or a quality: the name of one folder, never a path
INTERFACE = r"benchmark|standard|agent_obsk=[0-9]{1,2}"  # what the agents see, see environments/simulators.py
COUNTS = ("n_agents", "state_dim", "obs_dim", "action_dim", "trajectories", "samples")
RETURNS = ("return_mean", "return_std", "return_min", "return_max")
FIELDS = ("state", "agents/observation", "agents/action", "reward", "terminated", "done", "is_init", "episode")
MASK = "agents/action_mask"  # only if actions are discrete
LONGEST_JSON = 2**20  # bytes; a card has about 2,000
LARGEST_COUNT = 2**40
LARGEST_NUMBER = 3.4e38  # float32 ends here
DEEPEST = 20  # levels of nesting in "made"


def short(value: object) -> str:
    """A value as a few printable ASCII characters, for a message. A damaged file may hold huge values."""
    if isinstance(value, int) and abs(value) > LARGEST_COUNT:
        return "a huge number"
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_name(what: str, name: object, where: str = ""):
    """Raises BadInput unless `name` is a plain folder name."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadInput(f"{where}{what} is {short(name)}, not a name of letters, digits, _ and -")


def dataset_path(data: str | None, env: str, task: str, quality: str, root: str | Path = "data") -> Path:
    """`data` if it is given, else the folder that env, task and quality name."""
    if data is not None:
        if not data or "\0" in data:
            raise BadInput(f"{data!r} names no folder: give the dataset's directory")
        return Path(data)
    for what, name in (("env", env), ("task", task), ("quality", quality)):
        check_name(what, name)
    return Path(root, env, task, quality)


def check_free(path: Path, overwrite: bool):
    """Raises BadInput if `path` exists, unless it is a dataset and the user said to replace it."""
    if path.is_symlink() or path.exists():
        if not overwrite:
            raise BadInput(f"{path} is already there: give another --out or --overwrite")
        if not (path / "card.json").is_file():
            raise BadInput(f"{path} is no dataset and is left alone: give another --out")


def partial_of(path: str | Path) -> Path:
    """Where the dataset at `path` is while it is written. If `path` is a link, beside the folder that it leads to."""
    path = Path(path).resolve()
    return path.with_name(path.name + ".partial")


def remove_partial(folder: Path):
    """Removes the half-written dataset that a killed process left at `folder`.

    Raises BadInput if anything else is there.
    """
    if not folder.is_symlink() and not folder.exists():
        return
    own = {f"{name}{end}" for name in (*FIELDS, MASK) for end in (".raw", ".memmap")}
    own |= {"agents", "meta.json", "agents/meta.json", "card.json"}
    if folder.is_symlink() or not {path.relative_to(folder).as_posix() for path in folder.rglob("*")} <= own:
        raise BadInput(f"{folder} is in the way of a dataset and is left alone: move it away")
    shutil.rmtree(folder)


def read_json(path: Path) -> dict:
    """A file's JSON object. Raises BadInput for a file that is missing or holds anything else."""
    try:
        with open(path, "rb") as file:
            text = file.read(LONGEST_JSON + 1)
        if len(text) > LONGEST_JSON:
            raise ValueError(f"it has more than {LONGEST_JSON:,} bytes")
        content = json.loads(text.decode())
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise BadInput(f"there is no folder {path.parent}") from None
        below = sorted(found.parent.name for found in path.parent.glob(f"*/{path.name}"))
        instead = f"not complete, or you mean one of its folders: {', '.join(below)}" if below else "not complete"
        raise BadInput(f"{path} is missing: {path.parent} is {instead}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path} can't be read as JSON ({error}): make or copy it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} does not hold a JSON object: make or copy it again")
    return content


def is_number(value: object) -> bool:
    """Whether it is a finite number that fits into a float32. JSON also has nan, infinity and numbers of any length."""
    return type(value) in (int, float) and -LARGEST_NUMBER <= value <= LARGEST_NUMBER


def sound(value: object, levels: int) -> bool:
    """Whether free-form JSON can be printed and passed on: printable texts, numbers in bounds, few levels."""
    if isinstance(value, dict):
        return levels > 0 and all(sound(k, levels - 1) and sound(v, levels - 1) for k, v in value.items())
    if isinstance(value, list):
        return levels > 0 and all(sound(v, levels - 1) for v in value)
    if isinstance(value, str):
        return value.isprintable()
    return value is None or isinstance(value, bool) or is_number(value)


def files_of(card: dict) -> list[str]:
    """The files of a card's dataset, below its folder."""
    return ["card.json", "meta.json", "agents/meta.json", *(f"{key}.memmap" for key in card["bytes"])]


def check_card(path: str | Path, card: dict):
    """Raises BadInput, in one line, for a field of the card of the dataset at `path` that is missing or absurd."""
    at = f"{path}/card.json: "
    for name in ("env", "task", "quality"):
        check_name(f"'{name}'", card.get(name), at)
    interface = card.get("interface")
    if not isinstance(interface, str) or not re.fullmatch(INTERFACE, interface):
        raise BadInput(f"{at}'interface' is {short(interface)}, not benchmark, standard or agent_obsk=K (0 to 99)")
    for name in COUNTS:
        if type(card.get(name)) is not int or not 1 <= card[name] <= LARGEST_COUNT:
            raise BadInput(f"{at}'{name}' is {short(card.get(name))}, not a positive count")
    for name in ("action_low", "action_high"):
        if not is_number(card.get(name)):
            raise BadInput(f"{at}'{name}' is {short(card.get(name))}: action_low and action_high are numbers")
    for name in RETURNS:
        if not is_number(card.get(name)):
            raise BadInput(f"{at}the card says {name} {short(card.get(name))}, which is not a number")
    if type(card.get("discrete")) is not bool:
        raise BadInput(f"{at}'discrete' is {short(card.get('discrete'))}, not true or false")
    sizes, fields = card.get("bytes"), {*FIELDS, *([MASK] if card["discrete"] else [])}
    if not isinstance(sizes, dict) or set(sizes) != fields:
        raise BadInput(f"{at}'bytes' is {short(sizes)}, not a size for each of {', '.join(sorted(fields))}")
    if any(type(size) is not int or not 0 <= size <= LARGEST_COUNT for size in sizes.values()):
        raise BadInput(f"{at}'bytes' holds a value that is not a file's size")
    engine = card.get("engine")
    if engine is not None and not (isinstance(engine, str) and len(engine) <= 1000 and engine.isprintable()):
        raise BadInput(f"{at}'engine' is {short(engine)}, not a line of text")
    if not sound(card.get("made"), DEEPEST):
        raise BadInput(f"{at}'made' holds control characters, a number that is too large, or too many levels")
    sums = card.get("sha256", {})
    if not isinstance(sums, dict) or not all(
        isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) for x in sums.values()
    ):
        raise BadInput(f"{at}'sha256' is {short(sums)}, not a checksum for every file")
    unknown = sorted(set(sums) - set(files_of(card)))
    if unknown:
        raise BadInput(f"{at}'sha256' names {short(unknown[0])}, which is not a file of a dataset")


# ---------------------------------------------------------------- checksums


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_card(text: str, own: str) -> str:
    """The card's own checksum. Since the card holds it, it is computed with zeros in place of these 64 digits."""
    return hashlib.sha256(text.replace(own, "0" * 64).encode()).hexdigest()


def card_text(card: dict, folder: Path) -> str:
    """card.json's text, with the checksums of the dataset's files. `folder` holds the complete files."""
    sums = {name: sha256(folder / name) for name in files_of(card) if name != "card.json"}
    text = json.dumps(card | {"sha256": {"card.json": "0" * 64} | sums}, indent=2) + "\n"
    return text.replace("0" * 64, sha256_of_card(text, "0" * 64))


def verify(path: Path, card: dict, whole: bool = True):
    """Compares a dataset's files with the card's checksums. Raises BadInput that names the file that differs.

    The card itself is compared only with `whole`: its numbers are checked against the rows anyway, and a note in it may
    be edited by hand. A card without checksums (from an older version) is accepted, but not with `whole`.
    """
    sums = card.get("sha256")
    if sums is None:
        if whole:
            raise BadInput(f"{path}/card.json has no checksums ('sha256'): nothing to verify the files with")
        return
    for name in files_of(card):
        if name not in sums:
            raise BadInput(f"{path}/card.json has no checksum of {name}: make or copy the dataset again")
        try:
            if name != "card.json":
                found = sha256(path / name)
            elif whole:
                found = sha256_of_card((path / name).read_bytes().decode(), sums[name])
            else:
                continue
        except (OSError, ValueError) as error:
            raise BadInput(f"{path / name} can't be read ({error}): copy the dataset again") from None
        if found != sums[name]:
            raise BadInput(
                f"{path / name} differs from the card's checksum: its bytes have changed since it was written, copy "
                "the dataset again"
            )


# ---------------------------------------------------------------- printing


def digits(card: dict) -> int:
    """How many decimals of a return are printed. A battle of SMAX is worth at most about 2."""
    return 1 if card["return_max"] > 10 else 2


def table_row(card: dict) -> str:
    """The dataset's row of the paper's Table 3 (samples are transitions of the team)."""
    header = ["Instance", "Quality", "Trajectories", "Samples", "Agents", "State dim", "Obs dim", "Action dim"]
    header.append("Average returns")
    counts = ("trajectories", "samples", "n_agents", "state_dim", "obs_dim", "action_dim")
    row = [card["task"], card["quality"], *(card[k] for k in counts)]
    row.append(f"{card['return_mean']:.{digits(card)}f} ± {card['return_std']:.{digits(card)}f}")
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, ["---"] * len(header), row))
