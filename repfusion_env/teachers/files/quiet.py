"""Keeping libraries quiet while they build and load what we have checked ourselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence diffusers' warnings; the user's verbosity comes back afterwards."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def first_line(error: Exception) -> str:
    """The first line of an error's text, at most 200 characters."""
    return str(error).strip().split("\n")[0][:200]
