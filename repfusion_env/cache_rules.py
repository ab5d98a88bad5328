"""What a feature cache needs of the rest of a configuration, before torch loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repfusion_env.config import ExperimentConfig

# What no key of the cache can tell.
CHANGES = ("rotation", "scale", "translation", "jitter")


def conflicts(config: ExperimentConfig) -> list[str]:
    """One sentence for each impossible combination with ``cache`` or ``teacher.noise_seed``."""
    found: list[str] = []
    teacher, store = config.teacher, config.cache.store
    fresh = teacher.input == "noised" and teacher.noise == "fresh"
    if teacher.noise_seed is not None and teacher.noise == "fresh":
        found.append(
            f"teacher.noise_seed: {teacher.noise_seed} given, but under teacher.noise fresh every "
            "visit has noise of its own; give teacher.noise fixed"
        )
    if store == "off":
        return found
    if fresh:
        found.append(
            f"cache.store: '{store}' given, but under teacher.noise fresh no feature comes twice; "
            "give teacher.noise fixed or teacher.input clean"
        )
    found += [
        f"augmentation.{change}: {getattr(config.augmentation, change):g} given, but changed "
        "images have no place in a feature cache; leave it at 0 (flip may stay), or give "
        "cache.store off"
        for change in CHANGES
        if getattr(config.augmentation, change)
    ]
    if not config.cache.folder:
        found.append("cache.folder: '' given; it must name a folder")
    return found
