"""What can be said about the fusion from the configuration alone, before torch loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repfusion_env.config import ExperimentConfig

ONE_LAYER = ("layer", "timestep_and_layer")


def chosen_timesteps(config: ExperimentConfig) -> int | None:
    """How many timesteps an action chooses; None for an action space of one's own."""
    if ":" in config.env.action:
        return None
    return config.env.set_size if config.env.action == "timestep_set" else 1


def conflicts(config: ExperimentConfig) -> list[str]:
    """One sentence for each impossible entry of ``fusion``.

    Where ``teacher.layers`` names none, their number is the teacher's secret, and
    :class:`repfusion_env.fusion.Fusion` asks again once it knows.
    """
    fusion, action = config.fusion, config.env.action
    learned, found = fusion.weights == "learned", []
    twice = sorted({t for t in fusion.timesteps if fusion.timesteps.count(t) > 1})
    if twice:
        found.append(f"fusion.timesteps: {twice} stand there more than once")
    for key in ("mixture", "layers"):
        if learned and getattr(fusion, key):
            found.append(
                f"fusion.{key}: with fusion.weights learned no weights can be given; leave one out"
            )
    chosen = chosen_timesteps(config)
    if chosen is not None and fusion.mixture:
        slots = chosen + len(fusion.timesteps)
        if len(fusion.mixture) != slots:
            found.append(
                f"fusion.mixture: {len(fusion.mixture)} weights given, but a target has {slots} "
                f"timestep{'' if slots == 1 else 's'} ({chosen} chosen, {len(fusion.timesteps)} of "
                "fusion.timesteps)"
            )
    if fusion.layers and action in ONE_LAYER:
        found.append(
            f"fusion.layers: env.action '{action}' distils one layer per decision, so there is "
            "nothing to weigh"
        )
    layers = len(config.teacher.layers)
    if fusion.layers and layers and len(fusion.layers) != layers:
        found.append(
            f"fusion.layers: {len(fusion.layers)} weights given, but there "
            f"{'is' if layers == 1 else 'are'} {layers} of teacher.layers"
        )
    single = layers == 1 or action in ONE_LAYER
    if learned and single and chosen == 1 and not fusion.timesteps:
        found.append(
            "fusion.weights: 'learned' has nothing to weigh, since a target is one timestep of "
            "one layer; give fusion.timesteps, several teacher.layers, or env.action timestep_set"
        )
    return found
