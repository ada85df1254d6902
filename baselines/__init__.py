"""The paper's baselines, one file each: `python -m baselines.omiga --env mamujoco --task hopper`."""
