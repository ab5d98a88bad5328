"""Architectures that no library has, and the layouts of published checkpoints."""
