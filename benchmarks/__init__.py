"""Measurements: `python -m benchmarks.speed`, and sweep, convert, smax_speed and soak likewise."""
