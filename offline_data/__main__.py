"""The commands for datasets: `python -m offline_data COMMAND`. Only the module of the given command is loaded.

    python -m offline_data list
    python -m offline_data collect --env mamujoco --task hopper
    python -m offline_data download --env mamujoco --task hopper --quality medium-replay
    python -m offline_data convert SOURCE --format omiga --env mamujoco --task hopper --quality expert
    python -m offline_data info data/mamujoco/hopper/medium-replay
    python -m offline_data plot data/mamujoco/hopper/medium-replay
"""

import shlex
import sys

import environments.cpu  # noqa: F401 -- before torch
from environments.checks import BadInput, run_script

HELP = """usage: python -m offline_data COMMAND ...

commands:
  list        what is on this disk, what comes with the code, what can be downloaded
  collect     train MAPPO in a simulator and record datasets of several qualities
  download    get a published dataset, check it and convert it
  convert     convert a public dataset into the native format
  info        check a dataset, and print its row of Table 3 beside the published ones
  plot        draw the histogram of a dataset's episode returns

`python -m offline_data COMMAND --help` prints a command's flags."""


def main(arguments: list[str]):
    name, *flags = arguments or [""]
    if name in ("-h", "--help"):
        print(HELP)
        return
    if name == "list":
        from offline_data.list import list_datasets as command
    elif name == "collect":
        from offline_data.collect_args import Args as command
    elif name == "download":
        from offline_data.download import download as command
    elif name == "convert":
        from offline_data.convert import convert as command
    elif name == "info":
        from offline_data.published import info as command
    elif name == "plot":
        from offline_data.published import plot as command
    else:
        what = f"there is no command '{name}'" if name else "no command is given"
        raise BadInput(f"{what}: use list, collect, download, convert, info or plot; --help says what they do")
    import tyro

    prog = f"python -m offline_data {name}"
    done = tyro.cli(command, prog=prog, args=flags)
    if name == "collect":
        from offline_data.collect import main as collect  # after the flags are read, since torch takes seconds to load

        collect(done)


if __name__ == "__main__":
    run_script(main, sys.argv[1:], go_on=shlex.join(["python", "-m", "offline_data", *sys.argv[1:]]))
