"""The flags of `python comadice_eval.py report`, in a file of their own so that --help does not load torch."""

from dataclasses import dataclass

import tyro


@dataclass
class Args:
    """Make tables and figures of all finished runs below a folder."""

    runs: tyro.conf.Positional[str]
    """folder that holds run directories, at any depth"""
    out: str | None = None
    """folder for the report; without it RUNS/report"""
    last: float | None = None
    """a seed's score is the mean over its last evaluations, this share of all (default: as in summary.json, the last
    half and at most ten). A single evaluation would be noisy"""
