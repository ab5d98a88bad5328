"""Whether what the contrastive term needs is installed; imports nothing heavy."""

from __future__ import annotations

from importlib.util import find_spec

from repfusion_env.config import ExperimentConfig

PACKAGES = {"kornia": "kornia", "pytorch_metric_learning": "pytorch-metric-learning"}


def missing_packages() -> str | None:
    """A sentence that says what has to be installed; None where nothing is missing."""
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if not missing:
        return None
    return (
        f"contrastive.weight: random views and their loss need {' and '.join(missing)}; "
        'install with: pip install "repfusion-env[compare]"'
    )


def conflicts(config: ExperimentConfig) -> list[str]:
    """A sentence where ``contrastive.weight`` asks for a package that is not there."""
    sentence = missing_packages() if config.contrastive.weight else None
    return [] if sentence is None else [sentence]
