"""What was measured of a teacher and a bank.

Shape letters: L layers, R rows of rewards (layers, or the one of a run), T timesteps, M' held-out
images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from repfusion_env.landscapes.denoising import Denoising
from repfusion_env.landscapes.selection import Selection


@dataclass(frozen=True)
class Example:
    """A held-out image whose best timestep is among the lowest or highest.

    Attributes:
        image: (C, H, W) in [-1, 1].
        label: Name of its class.
        timestep: Its best one by the mean over draws.
        gain: Reward there above the best fixed timestep's.
    """

    image: np.ndarray
    label: str
    timestep: int
    gain: float


@dataclass(frozen=True)
class Landscape:
    """Everything measured; see ``docs/landscape.md`` for how to read it.

    Attributes:
        teacher: ``teacher.model``.
        data: Name of the bank.
        teacher_input: "noised" or "clean".
        run: The run folder whose student judged, or None.
        layers: The L layers, shallow to deep.
        widths: Feature width of each.
        timesteps: The T timesteps that the experiment leaves open.
        draws: Noise draws for each (image, timestep).
        train_images: Training images.
        heldout_images: Held-out images.
        labels: Training labels that heads learned from.
        reward_kind: "teacher_probe" for a head of its own at each (layer, timestep), else the
            run's.
        reward_rows: What the R rows of rewards belong to.
        main: The row that the experiment would use.
        accuracy: (L, T) of linear heads on the held-out images.
        strength: (L, T) their regularisation, chosen on a validation split.
        reward: (R, T) mean over held-out images and draws.
        train_reward: (R, T) over the training images.
        effective_rank: (L, T) of the training images' pooled features.
        norm: (L, T) mean norm of these.
        spread_share: (L, T) part of the squared norm that differs between images.
        cka: (L, T, T) linear CKA between timesteps.
        cka_debiased: (L, T, T) the same by the unbiased HSIC.
        image_rewards: (R, T, M') held-out rewards, mean over draws.
        selections: One for each row.
        lowest: Images with the lowest best timestep, on the main row.
        highest: With the highest.
        denoising: One-step reconstructions, or a sentence why there are none.
        seconds: Spent, timesteps read from an earlier measurement aside.
    """

    teacher: str
    data: str
    teacher_input: str
    run: str | None
    layers: tuple[str, ...]
    widths: tuple[int, ...]
    timesteps: tuple[int, ...]
    draws: int
    train_images: int
    heldout_images: int
    labels: int
    reward_kind: str
    reward_rows: tuple[str, ...]
    main: int
    accuracy: np.ndarray
    strength: np.ndarray
    reward: np.ndarray
    train_reward: np.ndarray
    effective_rank: np.ndarray
    norm: np.ndarray
    spread_share: np.ndarray
    cka: np.ndarray
    cka_debiased: np.ndarray
    image_rewards: np.ndarray
    selections: tuple[Selection, ...]
    lowest: tuple[Example, ...]
    highest: tuple[Example, ...]
    denoising: Denoising | str
    seconds: float

    @property
    def selection(self) -> Selection:
        """That of the main row."""
        return self.selections[self.main]
