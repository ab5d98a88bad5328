"""The student that a run left behind, and its features of a whole image bank.

Shape letters: M images, C,H,W image, S student width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from repfusion_env.config import ExperimentConfig
from repfusion_env.config_loading import load_config
from repfusion_env.data import ImageBank, load_data
from repfusion_env.noise import derive_seed, own_randomness
from repfusion_env.progress import watched
from repfusion_env.stage2.run_folder import check_finished
from students import Backbone, build_backbone

PREFIX = "backbone."


@dataclass(frozen=True, eq=False)
class SavedStudent:
    """A finished run's student.

    Attributes:
        backbone: With the run's weights, in eval mode, on the CPU.
        name: The student's name, as ``student.name`` of the configuration.
        in_channels: C of the images that it takes.
        image_size: Their side in pixels.
        config: The run's configuration.
        folder: The run's folder.
    """

    backbone: Backbone
    name: str
    in_channels: int
    image_size: int
    config: ExperimentConfig
    folder: Path


def load_student(run_dir: str | Path, *, shape: tuple[int, int, int] | None = None) -> SavedStudent:
    """Load the student of a finished run from ``config.yaml`` and ``student.safetensors``.

    Args:
        run_dir: The run's folder, of any training command.
        shape: (C, H, W) of the run's images, where the caller has them at hand; else they are
            loaded to see.

    Raises:
        ValueError: It is no run folder, the run is not finished, or weights and configuration do
            not belong together.
    """
    folder = check_finished(run_dir)
    config = load_config(folder / "config.yaml")
    channels, size, _ = shape if shape is not None else image_shape(config)
    path = folder / "student.safetensors"
    backbone = fresh_backbone(config, (channels, size, size), seed=0)
    try:
        stored = load_file(path)
        weights = {
            name.removeprefix(PREFIX): value
            for name, value in stored.items()
            if name.startswith(PREFIX)
        }
        backbone.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"'{path}' does not hold the weights of '{config.student.name}' for {channels}x{size}x"
            f"{size} images: {' '.join(reason[:2]).strip()}"
        ) from error
    return SavedStudent(backbone.eval(), config.student.name, channels, size, config, folder)


def load_banks(
    config: ExperimentConfig, device: torch.device | str = "cpu"
) -> tuple[ImageBank, ImageBank]:
    """The run's training and held-out images, on ``device``.

    Raises:
        ValueError: The images came without labels, without which classification has no stage 2.
            Those of a run on pseudo-labels (``data.labels: clusters``) are the ones that they came
            with. What other tasks need they say themselves.
    """
    train, heldout = load_data(config.data)
    if config.task == "classification" and len(train.classes) < 2:
        raise ValueError(
            f"data set '{train.name}' has no labels, so there is nothing to probe or to fine-tune "
            "on; stage 2 needs a run on images that came with two classes or more, which stage 1 "
            "may ignore by data.labels clusters"
        )
    return train.to(device), heldout.to(device)


def image_shape(config: ExperimentConfig) -> tuple[int, int, int]:
    """(C, H, W) of the configured images."""
    train, _ = load_data(replace(config.data, train_limit=1, heldout_limit=1))
    return train.shape


def fresh_backbone(config: ExperimentConfig, shape: tuple[int, int, int], *, seed: int) -> Backbone:
    """The configured student with random weights that depend on ``seed`` alone."""
    with own_randomness(derive_seed(seed, "fresh student")):
        return build_backbone(config.student.name, in_channels=shape[0], image_size=shape[1])


@torch.inference_mode()
def embed(backbone: Backbone, bank: ImageBank, *, batch_size: int = 256) -> Tensor:
    """The last stage's average of every image of ``bank``.

    Args:
        backbone: Any student; it stays as it is, and is used in eval mode.
        bank: M images.
        batch_size: Images in one forward.

    Returns:
        (M, S) float32 on the bank's device.
    """
    network = copy.deepcopy(backbone).to(bank.device).eval()
    ids = torch.arange(len(bank), device=bank.device)
    parts_of = bank.announced(ids.split(batch_size))
    pieces = watched(parts_of, len(bank), description="embed", unit="images")
    parts = [pooled(network, bank.pixels(part)) for part in pieces]
    # Cloned outside of inference mode, so that the caller may train on it.
    with torch.inference_mode(False):
        return torch.cat(parts).clone()


def pooled(backbone: Backbone, images: Tensor) -> Tensor:
    """The last stage's average, (M, S) float32."""
    last: Tensor = backbone(images)[backbone.stages[-1]]
    return last.float().mean((2, 3))
