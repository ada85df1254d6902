"""The simulators as TorchRL environments, and the checks that every script makes.

This folder imports nothing else of this project.
"""
