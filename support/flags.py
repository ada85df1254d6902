"""The command line of the training scripts: their flags, --version, and --config FILE. It does not load torch."""

import importlib.metadata
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from environments import stops
from environments.checks import BadInput, plain
from offline_data.card import NAME, is_number, read_json, short

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "torchrl", "tensordict", "numpy", "mujoco", "gymnasium-robotics", "jaxmarl")
# What config.json holds besides the flags. It may differ when a run goes on.
ABOUT = ("versions", "commit", "dataset")
NOT_AGAIN = ("seed", "algo", "resume", "overwrite", *ABOUT)  # in config.json, but not used by --config


def fits(value, kind) -> bool:
    """Whether a value of a config.json is what a flag of this type takes; texts are printable."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return any(type(value) is type(part) and value == part for part in parts)  # True must not count as 1
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if parts:  # a union of types
        return any(fits(value, part) for part in parts)
    if kind is float:
        return is_number(value)
    return type(value) is kind and (kind is not str or value.isprintable())


def take_config(words: list[str], Args, default):
    """The words without --config FILE, and the Args that FILE holds."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words:
        return words, default
    at = words.index("--config")
    file = Path(*words[at + 1 : at + 2])
    try:
        config = {key: value for key, value in read_json(file).items() if key not in NOT_AGAIN}
    except BadInput:
        raise BadInput(f"--config {file}: give the config.json of a run") from None
    foreign = sorted(config.keys() - {field.name for field in fields(Args)})
    if foreign:
        name = foreign[0].replace("_", "-") if NAME.fullmatch(foreign[0]) else short(foreign[0])
        raise BadInput(f"--config {file}: it is of another script or version, this one has no --{name}")
    flags = [word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    given = {flag.removeprefix("--").removeprefix("no-") for flag in flags}
    lacks = {field.name.replace("_", "-") for field in fields(Args) if field.name not in {*config, *NOT_AGAIN}} - given
    if lacks:  # their defaults may be other ones now
        missing = ", --".join(sorted(lacks))
        raise BadInput(f"--config {file}: it is older than these flags, so give them, too: --{missing}")
    for name, kind in get_type_hints(Args).items():
        if name in config and not fits(config[name], kind):
            raise BadInput(f"--config {file}: {name} is {short(config[name])}, which --{name.replace('_', '-')} is not")
    return words[:at] + words[at + 2 :], Args(**config)


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, if they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def commit() -> str | None:
    """The commit of this code, with "-dirty" if files differ from it. None without git."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def program() -> str | None:
    """How the script was called, for its help: python -m PACKAGE.MODULE, or None for a file, whose name tyro finds."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name}" if spec else None


def parse(Args, default=None):
    """The Args of the command line. `default` has the values of flags that are not given. Exits with 2 for a bad flag.

    Scripts call it before they import slow modules, so --help and a mistyped flag answer at once.
    """
    import tyro

    stops.catch(begun=False)
    words = sys.argv[1:]
    if "--version" in words:
        print(f"commit {commit() or 'unknown'}, " + ", ".join(f"{k} {v}" for k, v in versions().items()))
        sys.exit()
    try:
        words, default = take_config(words, Args, default)
    except BadInput as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        sys.exit(2)
    help = inspect.cleandoc(Args.__doc__) + (
        "\n\nTwo more flags: --config FILE takes the flags of a run's config.json, which other flags override. "
        "--version prints the commit and the versions of packages."
    )
    return tyro.cli(Args, default=default, args=words, description=help, prog=program())
