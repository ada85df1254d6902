"""The paper's baselines, a file each: `python -m baselines.omiga --env mamujoco --task hopper --quality
medium-replay`."""
