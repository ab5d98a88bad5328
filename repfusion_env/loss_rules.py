"""What can be said about losses before torch loads: their options, and what they cannot do.

The options' defaults stand with the losses; here stands what each may be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repfusion_env.registry import LOSSES, did_you_mean


@dataclass(frozen=True)
class Allowed:
    """The values that a number may take.

    Attributes:
        above: It must be greater than this.
        least: It must be this or more.
        below: It must be less than this.
        most: It must be this or less.
        whole: It must be a whole number.
    """

    above: float = -math.inf
    least: float = -math.inf
    below: float = math.inf
    most: float = math.inf
    whole: bool = False

    def refusal(self, value: Any) -> str | None:
        """What is wrong with ``value``, as the end of a sentence, or None."""
        kinds = (int,) if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            return f"{value!r} given; it must be a {'whole' if self.whole else 'finite'} number"
        if not value > self.above:
            return f"{value!r} given; it must be greater than {self.above}"
        if not value < self.below:
            return f"{value!r} given; it must be less than {self.below}"
        if not value >= self.least:
            return f"{value!r} given; it must be {self.least} or more"
        if not value <= self.most:
            return f"{value!r} given; it must be {self.most} or less"
        return None


POSITIVE = Allowed(above=0)
NON_NEGATIVE = Allowed(least=0)
COUNT = Allowed(least=1, whole=True)

OPTIONS: dict[str, dict[str, Allowed]] = {
    "crd": {
        "negatives": COUNT,
        "temperature": POSITIVE,
        "embedding": COUNT,
        "momentum": Allowed(least=0, below=1),
    },
    "vid": {"initial_variance": POSITIVE, "floor": POSITIVE},
    "factor_transfer": {"rate": POSITIVE, "power": Allowed(least=1, most=2, whole=True)},
    "correlation_congruence": {"gamma": POSITIVE, "order": COUNT},
    "dist": {"inter": NON_NEGATIVE, "intra": NON_NEGATIVE},
    "infonce": {"temperature": POSITIVE},
}

# On pooled features these compare a lane with the other lanes and say nothing about one alone.
RELATIONAL = frozenset(
    {
        "rkd_distance",
        "rkd_angle",
        "similarity_preserving",
        "pkt",
        "correlation_congruence",
        "infonce",
    }
)


def option_complaints(name: str, options: Mapping[str, Any]) -> list[str]:
    """One clause for each unknown or unfit option of a registered loss, headed by its name.

    A loss of one's own (``module:attribute``) is judged by its signature when it is built.
    """
    if name not in LOSSES:
        return []
    allowed = OPTIONS.get(name, {})
    found = []
    for option, value in options.items():
        if option not in allowed:
            found.append(unknown_option(option, list(allowed)))
        elif refusal := allowed[option].refusal(value):
            found.append(f"{option}: {refusal}")
    return found


def unknown_option(option: str, allowed: list[str]) -> str:
    """The clause that refuses an option's name."""
    choice = f"Allowed: {', '.join(allowed)}" if allowed else "This loss has no options"
    return f"{option}: there is no such option.{did_you_mean(option, allowed)} {choice}"


def option_conflicts(
    losses: Mapping[str, float], options: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """One sentence for each impossible entry of ``distillation.options``."""
    found = []
    for name, settings in options.items():
        if name not in losses:
            found.append(
                f"distillation.options: '{name}' is none of the losses in distillation.losses "
                f"({', '.join(losses)}).{did_you_mean(name, losses)}"
            )
            continue
        found += [
            f"distillation.options.{name}.{clause}" for clause in option_complaints(name, settings)
        ]
    return found


def lonely(losses: Mapping[str, float]) -> list[str]:
    """The losses that count, if every one of them needs other lanes to say anything."""
    counting = [name for name, weight in losses.items() if weight]
    return counting if counting and RELATIONAL.issuperset(counting) else []
