"""A forward that is given the embeddings of the empty prompt.

They are made once, when the teacher loads; :class:`PromptedRun` holds them, moves them with the
teacher (``NetworkTeacher.to`` of :mod:`repfusion_env.teachers.reading.network` calls ``run.to``)
and spreads them over the batch. A prompt of anyone's own has no way in.

Shape letters: N lanes, T text tokens, F width of a text embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.teachers.base import TeacherError

Prompt = dict[str, Tensor]


class PromptedRun:
    """One forward of a network that asks for a prompt, as :class:`Plan.run` is called.

    Args:
        forward: Network, inputs (N, C, H, W), conditions (N,), and the prompt's tensors, each of
            batch size N.
        prompt: Tensors of batch size 1, of the dtype that the network computes in.
    """

    def __init__(
        self, forward: Callable[[nn.Module, Tensor, Tensor, Prompt], Any], prompt: Prompt
    ) -> None:
        self.forward = forward
        self.prompt = prompt

    def __call__(self, network: nn.Module, inputs: Tensor, conditions: Tensor) -> Any:
        """Run the network on inputs (N, C, H, W) at conditions (N,)."""
        spread = {
            name: value.expand(len(inputs), *value.shape[1:]) for name, value in self.prompt.items()
        }
        return self.forward(network, inputs, conditions, spread)

    def to(self, device: torch.device | str) -> PromptedRun:
        """Move the prompt's tensors to ``device``."""
        self.prompt = {name: value.to(device) for name, value in self.prompt.items()}
        return self


def check_prompt(
    model: str,
    prompt: Prompt,
    expected: Callable[[int], dict[str, tuple[int, ...]]],
    *,
    network: str = "transformer",
) -> None:
    """Refuse embeddings that a network cannot take.

    Args:
        model: The teacher's name, for the message.
        prompt: The embeddings.
        expected: Shape of each by its name, for a number of text tokens.
        network: What it is, for the message.

    Raises:
        TeacherError: One is missing, unexpected, or of another width.
    """
    for name, shape in expected(0).items():
        if name not in prompt:
            raise TeacherError(
                f"teacher '{model}': its empty prompt has no {name}, which its {network} needs; "
                f"it has {', '.join(sorted(prompt)) or 'nothing'}"
            )
        given = tuple(prompt[name].shape)
        # Of the text tokens there may be any number: their size is 0 in what is expected.
        if len(given) != len(shape) or any(b and a != b for a, b in zip(given, shape, strict=True)):
            wanted = "x".join(str(size or "T") for size in shape)
            raise TeacherError(
                f"teacher '{model}': its empty prompt gives {name} as "
                f"{'x'.join(map(str, given))}, but its {network} takes {wanted}; "
                "the text encoders belong to another model"
            )


def digest(prompt: Prompt) -> str:
    """SHA-256 (hex) of the prompt's tensors."""
    found = hashlib.sha256()
    for name, value in sorted(prompt.items()):
        found.update(f"{name}{tuple(value.shape)}".encode())
        found.update(value.detach().cpu().float().contiguous().numpy().data)
    return found.hexdigest()
