"""Names that diffusers has given up, in the files of models that are older than the change."""

from __future__ import annotations

from collections.abc import Container
from functools import cache

from repfusion_env.teachers.files.weight_files import Rename

# The projections of the attention block of 2022, which many models on the hub still name.
_PAIRS = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def current_names(known: Container[str]) -> Rename:
    """From the names of an old file to those that diffusers' network has today.

    Args:
        known: Names of the network's weights; a name that it has is left alone.
    """

    @cache
    def rename(name: str) -> str:
        if name in known:
            return name
        for old, new in _PAIRS.items():
            if name.replace(old, new) in known:
                return name.replace(old, new)
        return name

    return rename
