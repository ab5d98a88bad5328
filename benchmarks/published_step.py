"""The published training step, as its paper and code do it; what our speed is compared with.

Written from the description of the method (Yang & Wang, "Diffusion Model as Representation
Learner", ICCV 2023, arXiv:2308.10916): a timestep per image from a policy over all timesteps, the
whole UNet in float32 with a hook on the layer, one optimizer for everything, and losses read by the
host at every step. What the description leaves open is chosen here so that it costs little: the
policy is the student's own architecture with a linear layer over the timesteps, the head is as wide
as the teacher's feature, and images come ready from memory.

Shape letters: N images, C,H,W image, S student width, F teacher width, T timesteps.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from students import build_backbone
from students.backbone import Backbone

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
AVERAGE_WEIGHT = 0.001
ENTROPY_WEIGHT = 0.1


class Network(nn.Module):
    """What the one optimizer trains: student, projection, head on the teacher, policy.

    Args:
        student: Name of the student in our registry; the policy is another one of it.
        shape: (C, H, W) of an image.
        width: F.
        classes: Of the task.
        timesteps: T, or None without a policy.
    """

    def __init__(
        self,
        student: str,
        shape: tuple[int, int, int],
        width: int,
        classes: int,
        timesteps: int | None,
    ) -> None:
        super().__init__()
        channels, side, _ = shape
        self.student = build_backbone(student, in_channels=channels, image_size=side)
        self.projection = nn.Conv2d(self.student.feature_channels, width, kernel_size=1)
        self.head = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width),
            nn.ReLU(inplace=True),
            nn.Linear(width, classes),
        )
        self.policy: Backbone | None = None
        self.policy_logits: nn.Linear | None = None
        if timesteps is not None:
            self.policy = build_backbone(student, in_channels=channels, image_size=side)
            self.policy_logits = nn.Linear(self.student.feature_channels, timesteps)

    def student_map(self, images: Tensor) -> Tensor:
        """The student's last map, projected to the teacher's width, (N, F, h, w)."""
        return self.projection(_last_map(self.student, images))

    def log_probabilities(self, images: Tensor) -> Tensor:
        """Of every timestep, (N, T)."""
        assert self.policy is not None and self.policy_logits is not None
        pooled = _last_map(self.policy, images).mean((2, 3))
        return torch.log_softmax(self.policy_logits(pooled), dim=1)


class PublishedStep:
    """Everything that the published step keeps between two calls.

    Args:
        teacher: diffusers folder of the UNet.
        layer: Module path of the teacher whose output is matched.
        student: Name of the student in our registry.
        shape: (C, H, W) of an image.
        classes: Of the task.
        device: Where it runs.
        policy: False leaves the policy network out and draws timesteps uniformly; then what is
            left is the work of our environment's step with random actions.
        timesteps: T.
    """

    def __init__(
        self,
        teacher: Path,
        layer: str,
        *,
        student: str,
        shape: tuple[int, int, int],
        classes: int,
        device: torch.device,
        policy: bool = True,
        timesteps: int = 1000,
    ) -> None:
        from diffusers import UNet2DModel

        self.timesteps = timesteps
        self.unet: Any = UNet2DModel.from_pretrained(str(teacher), low_cpu_mem_usage=False)
        self.unet.eval().requires_grad_(False).to(device)
        self.feature: Tensor | None = None
        self.unet.get_submodule(layer).register_forward_hook(self._keep)
        width = self.unet.get_submodule(layer).out_channels
        network = Network(student, shape, width, classes, timesteps if policy else None)
        self.network: Network = network.to(device).train()
        self.average: Network = deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY
        )

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """One update.

        Args:
            images: Clean, in [-1, 1], (N, C, H, W).
            labels: (N,) int64.

        Returns:
            The losses, reward and accuracy, read by the host.
        """
        with_policy = self.network.policy is not None
        if with_policy:
            log_probabilities = self.network.log_probabilities(images)
            chosen = torch.multinomial(log_probabilities.detach().exp(), 1)[:, 0]
        else:
            chosen = torch.randint(self.timesteps, (len(images),), device=images.device)
        with torch.no_grad():
            self.unet(images, chosen)
        assert self.feature is not None
        teacher = self.feature.mean((2, 3))  # (N, F)

        student = self.network.student_map(images).mean((2, 3))
        distillation = functional.mse_loss(student, teacher)
        logits = self.network.head(teacher)
        cross_entropy = functional.cross_entropy(logits, labels, reduction="none")
        reward = -cross_entropy.detach()
        loss = distillation + cross_entropy.mean()
        read = {"distillation": distillation, "cross_entropy": cross_entropy.mean()}
        if with_policy:
            entropy = -(log_probabilities.exp() * log_probabilities).sum(1).mean()
            policy = -(log_probabilities.gather(1, chosen[:, None])[:, 0] * reward).mean()
            loss = loss + policy - ENTROPY_WEIGHT * entropy
            read |= {"policy": policy, "entropy": entropy}
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._update_average()
        read |= {"reward": reward.mean(), "accuracy": (logits.argmax(1) == labels).float().mean()}
        return {name: value.item() for name, value in read.items()}

    @torch.no_grad()
    def _update_average(self) -> None:
        pairs = zip(self.average.parameters(), self.network.parameters(), strict=True)
        for mine, new in pairs:
            mine.lerp_(new, AVERAGE_WEIGHT)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.feature = output


def _last_map(backbone: Backbone, images: Tensor) -> Tensor:
    last: Tensor = backbone(images)[backbone.stages[-1]]
    return last
