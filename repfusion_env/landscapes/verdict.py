"""What a landscape says about choosing timesteps for each image, in one sentence with numbers."""

from __future__ import annotations

from repfusion_env.landscapes.landscape import Landscape
from repfusion_env.landscapes.selection import Gap

# Of what the best fixed timestep is worth over random ones; less is no reason to choose.
WORTH_NAMING = 0.01


def verdict(found: Landscape) -> str:
    """Whether per-sample selection can pay on the main row."""
    chosen = found.selection
    fixed = f"the best fixed timestep (t = {chosen.best_fixed}, reward {chosen.fixed_reward:.3f})"
    observable, split = chosen.observable, chosen.split_noise
    room = chosen.fixed_reward - chosen.random_reward
    others = found.draws - 1
    draws = f"{others} noise draw{'' if others == 1 else 's'}"
    if observable.low > 0:
        little = ", but little" if observable.gain < WORTH_NAMING * room else ""
        best = "" if split is None else f"; knowing each image's own best would gain {_told(split)}"
        return (
            f"Per-sample selection can pay{little}: by this reward, on held-out images, a timestep "
            f"chosen from the observation gains "
            f"{_told(observable)} over {fixed}, which itself is worth {room:+.3f} over random "
            f"timesteps{best}."
        )
    least = WORTH_NAMING * max(room, 1e-12)
    found_none = chosen.predictor.kind == "fixed"
    seen = (
        "no predictor from the observation beat it in cross-validation"
        if found_none
        else f"one chosen from the observation gains {_told(observable)}"
    )
    if split is not None and max(split.high, observable.high) < least:
        return (
            f"Per-sample selection would gain next to nothing here: each image's own best "
            f"timestep, as far as {draws} can tell it, gains {_told(split)} over {fixed}, less "
            f"than a hundredth of what that is worth over random timesteps, and {seen}; most of "
            f"the naive maximum of {chosen.naive.gain:+.3f} is noise."
        )
    if split is None:
        return (
            f"Per-sample selection has not been shown to pay over {fixed}: {seen}, while the best "
            f"of each image in hindsight gains {chosen.naive.gain:+.3f}."
        )
    if split.low <= 0:
        return (
            f"Per-sample selection has not been shown to pay over {fixed}: each image's own best "
            f"timestep, as far as {draws} can tell it, gains {_told(split)}, and {seen}."
        )
    return (
        f"Per-sample selection has something to find, but it was not found in the observation: "
        f"each image's own best timestep, known from its rewards under {draws} and so from its "
        f"label, gains {_told(split)} over {fixed}, and {seen}. An agent with this observation is "
        f"likelier to reach the best fixed timestep than to beat it."
    )


def _told(one: Gap) -> str:
    return f"{one.gain:+.3f} (95% {one.low:+.3f} to {one.high:+.3f})"
