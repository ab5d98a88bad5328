"""What the values of ``data`` must be together where images are streamed."""

from __future__ import annotations

from repfusion_env.config import ExperimentConfig

STREAMED = ("folder", "tiny_imagenet", "webdataset")


def conflicts(config: ExperimentConfig) -> list[str]:
    """One sentence for each impossible combination."""
    data, found = config.data, []
    if data.storage == "stream" and data.name not in STREAMED:
        found.append(
            f"data.storage: 'stream' reads single images of {', '.join(STREAMED)} as they are "
            f"needed; data.name '{data.name}' is resident"
        )
    return found
