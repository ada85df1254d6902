"""The paper's whole benchmark (`python -m benchmarks.paper`), and measurements: speed, convert, smax_speed, soak,
disturb and cluster."""
