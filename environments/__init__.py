"""The simulators as TorchRL environments, and what every script checks.

Nothing of this project lies below this folder.
"""
