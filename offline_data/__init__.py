"""Offline datasets: their one format, replay, and how to make, get and convert them.

The commands: `python -m offline_data --help`.
"""
