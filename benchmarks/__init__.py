"""Measurements that back the project's claims; each module is a command, see its docstring."""
