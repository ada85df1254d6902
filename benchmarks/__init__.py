"""Measurements: `python -m benchmarks.speed`, and sweep, convert and smax_speed likewise."""
