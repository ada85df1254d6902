"""The flags of `python comadice_eval.py ratio`, in a file of their own so that --help does not load torch."""

from dataclasses import dataclass

import tyro


@dataclass
class Args:
    """Draw which transitions and episodes the ratio of a ComaDICE run prefers."""

    run: tyro.conf.Positional[str]
    """run directory of ComaDICE"""
    data: str | None = None
    """where the run's dataset is now, if it was moved"""
    out: str | None = None
    """the image to write, a new file; without it RUN/ratio.png"""
