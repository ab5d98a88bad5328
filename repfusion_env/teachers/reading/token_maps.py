"""What the transformer denoisers of latents share: maps of their image tokens, and their VAE.

Shape letters: N lanes, c,H,W latents, T tokens, F token width, h,w the grid of patches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError
from repfusion_env.teachers.empty_prompt import check_prompt_files, empty_prompt
from repfusion_env.teachers.files.model_files import ModelFiles
from repfusion_env.teachers.files.weight_files import WeightFiles
from repfusion_env.teachers.reading.family import known_trace
from repfusion_env.teachers.reading.latents import load_encoder, vae_factor, vae_settings
from repfusion_env.teachers.reading.network import DTYPES, NetworkTeacher, Plan, load_network
from repfusion_env.teachers.reading.noise_process import NoiseProcess
from repfusion_env.teachers.reading.prompted_run import Prompt, PromptedRun, check_prompt, digest
from repfusion_env.teachers.reading.tracing import Trace


def token_map(output: Any, latents: tuple[int, ...], *, patch: int) -> Tensor | None:
    """The image tokens of a module's output as a map (N, F, h, w), or None where it has none.

    The blocks of two streams return (text tokens, image tokens); everything else that returns the
    image tokens returns them alone or, as joint attention does, in the first place, where they are
    left out: which of two sequences is the image's must never be a guess.

    Args:
        output: Of a module.
        latents: Shape (c, H, W) of what the network sees.
        patch: Side of a token's patch in latents.
    """
    tokens = output[1] if isinstance(output, tuple) and len(output) == 2 else output
    height, width = latents[1] // patch, latents[2] // patch
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] != height * width:
        return None
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def transformer_settings(
    files: ModelFiles, family: str, kinds: Sequence[str], norm: str | None = None
) -> dict[str, Any]:
    """The configuration of a model's transformer.

    Args:
        files: Of the model.
        family: For the message.
        kinds: Names of the classes that the family takes.
        norm: The ``norm_type`` that it takes, where one class serves several families.

    Raises:
        TeacherError: There is none, or it is of another class or norm.
    """
    settings = files.config("transformer")
    kind: Any = settings.get("_class_name")
    if kind not in kinds:
        raise TeacherError(
            f"teacher '{files.model}' is a {kind or 'model of unknown class'}; "
            f"family '{family}' takes a {' or '.join(kinds)}"
        )
    found = settings.get("norm_type", norm)
    if norm is not None and found != norm:
        raise TeacherError(
            f"teacher '{files.model}': its transformer has norm_type {found!r}; "
            f"family '{family}' takes '{norm}'"
        )
    return settings


def positive(files: ModelFiles, settings: dict[str, Any], name: str, default: int) -> int:
    """A setting of the transformer that must be a positive whole number.

    Raises:
        TeacherError: It is none.
    """
    value = settings.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TeacherError(
            f"teacher '{files.model}': its config.json gives {name} {value!r}; "
            "a positive whole number is needed"
        )
    return value


def middle_of(*stacks: tuple[str, int]) -> str:
    """Module path of the middle one of all blocks.

    Args:
        *stacks: Name and number of blocks of each stack, in the order of the forward; at least one
            block in all.
    """
    blocks = [f"{name}.{index}" for name, count in stacks for index in range(count)]
    return blocks[(len(blocks) - 1) // 2]


@dataclass(frozen=True)
class LatentTransformer:
    """A transformer denoiser of latents, as its files describe it.

    Attributes:
        files: Of the model.
        settings: Configuration of the transformer.
        process: Its noise process.
        build: Makes the transformer, by its settings.
        run: One forward: network, latents, conditions, and the embeddings of the empty prompt.
        channels: c of the latents.
        side: H = W of the latents that it was trained on.
        patch: Side of a token's patch in latents.
        middle: The layer that is read where none is named.
        prompt_shapes: For a number of text tokens, shapes (1, ...) of the empty prompt's
            embeddings by name; default: there is no prompt.
    """

    files: ModelFiles
    settings: dict[str, Any]
    process: NoiseProcess
    build: Callable[[dict[str, Any]], nn.Module]
    run: Callable[[nn.Module, Tensor, Tensor, Prompt], Any]
    channels: int
    side: int
    patch: int
    middle: str
    prompt_shapes: Callable[[int], dict[str, tuple[int, ...]]] = lambda _tokens: {}

    def plan(self) -> Plan:
        """How it is built, run and traced.

        Raises:
            TeacherError: Its configuration makes no sense.
        """
        if self.side % self.patch:
            raise TeacherError(
                f"teacher '{self.files.model}': its config.json gives latents of side {self.side}, "
                f"which patches of {self.patch} do not divide"
            )
        # With more text than image tokens, no text stream is taken for the image's.
        shapes = self.prompt_shapes((self.side // self.patch) ** 2 + 1)
        without_data = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return Plan(
            self.files.model,
            partial(self.build, self.settings),
            PromptedRun(self.run, without_data),
            (self.channels, self.side, self.side),
            partial(token_map, patch=self.patch),
            condition_dtype=self.process.condition.dtype,
        )

    def card(self) -> TeacherCard:
        """What can be known of it without its weights.

        Raises:
            TeacherError: It has no VAE, or one of other latents; or it cannot be built.
        """
        vae = vae_settings(self.files)
        latents = int(vae.get("latent_channels", 4))
        if latents != self.channels:
            raise TeacherError(
                f"teacher '{self.files.model}': its VAE gives latents of {latents} channels, "
                f"but its transformer takes {self.channels}"
            )
        if self.prompt_shapes(1):
            check_prompt_files(self.files)
        found = self._trace(self.plan())
        return TeacherCard(
            channels=int(vae.get("in_channels", 3)),
            image_size=self.side * vae_factor(vae),
            num_timesteps=len(self.process),
            layers_available=tuple(found.shapes),
            side_divisor=vae_factor(vae) * self.patch,
            default_layers=(self.middle,),
            trace=found,
        )

    def load(self, config: TeacherConfig) -> NetworkTeacher:
        """Load it with its VAE as far as the layers need it.

        Text encoders are loaded before it, asked for the empty prompt, and dropped.

        Args:
            config: Layers, precision, memory.

        Raises:
            TeacherError: A part is missing or damaged, or does not fit the others.
        """
        card, plan = self.card(), self.plan()
        found = self._trace(plan)
        embeddings: Prompt = {}
        if self.prompt_shapes(1):
            embeddings = empty_prompt(self.files, self.settings, DTYPES[config.precision])
            check_prompt(self.files.model, embeddings, self.prompt_shapes)
        described = [self.settings, vae_settings(self.files), digest(embeddings)]
        return load_network(
            replace(plan, run=PromptedRun(self.run, embeddings)),
            lambda _shapes: WeightFiles(self.files.model, self.files.weights("transformer")),
            self.process,
            config,
            card,
            found,
            encoder=load_encoder(config, self.files),
            description=json.dumps(described, sort_keys=True),
        )

    def _trace(self, plan: Plan) -> Trace:
        return known_trace(plan, [self.settings, str(self.process.condition.dtype)])
