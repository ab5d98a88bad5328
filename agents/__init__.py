"""Agents for ``RepFusion-v0``: our REINFORCE, Stable-Baselines3, and what both share."""
