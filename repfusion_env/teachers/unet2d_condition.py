"""Denoisers in diffusers' ``UNet2DConditionModel``: Stable Diffusion 1, 2 and XL and their like.

They work on the latents of a VAE (Rombach et al., 2022), or on pixels where the model's pipeline
has no VAE (DeepFloyd IF, stage I), and are told of the empty prompt alone; XL is told the size of
the image that it sees (Podell et al., 2023). A class-conditional network is read without its class
embedding. What needs an image or a mask beside the noised one is refused. The default layer ends
the mid-block; ``up_blocks.1`` is the one of Tang et al., "Emergent Correspondence from Image
Diffusion", 2023.

Shape letters: N lanes, H,W what the network sees, T text tokens, F width of a text embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers.base import TeacherCard, TeacherError
from repfusion_env.teachers.empty_prompt import check_prompt_files, empty_prompt
from repfusion_env.teachers.files.attention_names import current_names
from repfusion_env.teachers.files.model_files import ModelFiles, find_model
from repfusion_env.teachers.files.weight_files import WeightFiles
from repfusion_env.teachers.reading.family import known_trace, no_options, side_of
from repfusion_env.teachers.reading.latents import load_encoder, vae_factor, vae_settings
from repfusion_env.teachers.reading.level_maps import level_map
from repfusion_env.teachers.reading.network import DTYPES, NetworkTeacher, Plan, load_network
from repfusion_env.teachers.reading.noise_process import NoiseProcess, process_of
from repfusion_env.teachers.reading.prompted_run import Prompt, PromptedRun, check_prompt, digest
from repfusion_env.teachers.reading.tracing import Trace

DEFAULT_LAYERS = ("mid_block.resnets.1", "mid_block.resnets.0", "down_blocks.0.resnets.0")
TIME_IDS = 6  # height and width of the original, of the crop's corner, and of what is seen
# What can be served of each setting; the rest wants images or vectors that a teacher has not.
SERVED: dict[str, tuple[str | None, ...]] = {
    "addition_embed_type": (None, "text", "text_time"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "class_embed_type": (None, "timestep", "identity"),
}


def load(config: TeacherConfig, *, device: torch.device | str) -> NetworkTeacher:
    """Load a ``UNet2DConditionModel``, its VAE's encoder and its scheduler, frozen.

    Text encoders are loaded, asked for the embeddings of the empty prompt, and dropped.

    Raises:
        TeacherError: Files are missing or damaged, they do not fit together, it is another kind of
            model, or it has no such layer.
    """
    return _denoiser(config).load(config).to(device)


def describe(config: TeacherConfig) -> TeacherCard:
    """Read the configuration files and build the network without memory for its weights.

    Raises:
        TeacherError: See :func:`load`.
    """
    return _denoiser(config).card()


@dataclass(frozen=True)
class _Denoiser:
    """A UNet as its files describe it.

    Attributes:
        files: Of the model.
        unet: Configuration of the network.
        vae: Configuration of the VAE; None for a network on pixels.
        process: Its noise process.
    """

    files: ModelFiles
    unet: dict[str, Any]
    vae: dict[str, Any] | None
    process: NoiseProcess

    @property
    def factor(self) -> int:
        """Pixels by which a position of what the network sees is wide and high."""
        return 1 if self.vae is None else vae_factor(self.vae)

    def plan(self, prompt: Prompt | None = None) -> Plan:
        side = side_of(self.files.model, self.unet)
        if prompt is None:
            # With more text than image tokens, no text is taken for an image.
            shapes = self.prompt_shapes(side * side + 1)
            prompt = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        levels = len(self.unet.get("down_block_types", "....")) - 1
        return Plan(
            self.files.model,
            partial(_build, self.unet),
            PromptedRun(partial(_run, factor=self.factor), prompt),
            (int(self.unet.get("in_channels", 4)), side, side),
            partial(level_map, levels=levels),
            condition_dtype=self.process.condition.dtype,
        )

    def prompt_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes (1, ...) of the embeddings that the network is given; none without a prompt."""
        added = self.unet.get("addition_embed_type")
        if not (_attends_to_text(self.unet) or added):
            return {}
        width = self.unet.get("cross_attention_dim", 1280)
        if self.unet.get("encoder_hid_dim_type") == "text_proj":
            width = self.unet.get("encoder_hid_dim")
        if isinstance(width, list | tuple):
            width = width[0]
        shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (1, tokens, int(width or 0))}
        if added == "text_time":
            whole = int(self.unet.get("projection_class_embeddings_input_dim") or 0)
            times = TIME_IDS * int(self.unet.get("addition_time_embed_dim") or 0)
            if whole <= times:
                raise TeacherError(
                    f"teacher '{self.files.model}': its config.json gives "
                    f"projection_class_embeddings_input_dim {whole}, but {TIME_IDS} numbers of the "
                    f"image's size take {times} of it already"
                )
            shapes["text_embeds"] = (1, whole - times)
        return shapes

    def trace(self) -> Trace:
        return known_trace(self.plan(), [self.unet, str(self.process.condition.dtype)])

    def card(self) -> TeacherCard:
        if self.prompt_shapes(0):
            check_prompt_files(self.files)
        channels, side, _ = self.plan().input_shape
        found = self.trace()
        default = next((layer for layer in DEFAULT_LAYERS if layer in found.shapes), "conv_in")
        return TeacherCard(
            channels=channels if self.vae is None else int(self.vae.get("in_channels", 3)),
            image_size=side * self.factor,
            num_timesteps=len(self.process),
            layers_available=tuple(found.shapes),
            # Inside, diffusers' network takes any size: its decoder meets the encoder's odd sides.
            side_divisor=self.factor,
            default_layers=(default,),
            trace=found,
        )

    def load(self, config: TeacherConfig) -> NetworkTeacher:
        card = self.card()
        shapes = self.prompt_shapes(0)
        prompt: Prompt = {}
        if shapes:
            given = empty_prompt(self.files, self.unet, DTYPES[config.precision])
            prompt = {name: value for name, value in given.items() if name in shapes}
            check_prompt(self.files.model, prompt, self.prompt_shapes, network="denoiser")
        plan = self.plan(prompt)
        return load_network(
            plan,
            lambda shapes: WeightFiles(
                self.files.model, self.files.weights("unet"), current_names(shapes)
            ),
            self.process,
            config,
            card,
            self.trace(),
            encoder=None if self.vae is None else load_encoder(config, self.files),
            description=json.dumps([self.unet, self.vae, digest(prompt)], sort_keys=True),
        )


def _denoiser(config: TeacherConfig) -> _Denoiser:
    no_options(config, "unet2d_condition")
    files = find_model(config.model, config.revision)
    unet = files.config("unet")
    kind = unet.get("_class_name")
    if kind != "UNet2DConditionModel":
        raise TeacherError(
            f"teacher '{files.model}' is a {kind or 'model of unknown class'}; "
            "family 'unet2d_condition' takes a UNet2DConditionModel"
        )
    _refuse_unserved(files.model, unet)
    vae = None if _sees_pixels(files, unet) else vae_settings(files)
    taken = int(unet.get("in_channels", 4))
    given = taken if vae is None else int(vae.get("latent_channels", 4))
    if taken != given:
        raise TeacherError(
            f"teacher '{files.model}': its denoiser takes {taken} channels, but its VAE gives "
            f"latents of {given}; models that inpaint, upscale or edit take an image or a mask "
            "beside the noised one and cannot be read"
        )
    return _Denoiser(files, unet, vae, process_of(files.scheduler(), config.model))


def _sees_pixels(files: ModelFiles, unet: Mapping[str, Any]) -> bool:
    """Whether the model's own pipeline has no VAE and the network takes an image's channels."""
    if files.has("vae") or not (files.folder / "model_index.json").is_file():
        return False
    parts = files.config(name="model_index.json")
    return not parts.keys() & {"vae", "vqvae", "movq"} and unet.get("in_channels", 4) in (1, 3)


def _refuse_unserved(model: str, unet: Mapping[str, Any]) -> None:
    for name, served in SERVED.items():
        value = unet.get(name)
        if value not in served:
            allowed = ", ".join("none" if one is None else f"'{one}'" for one in served)
            raise TeacherError(
                f"teacher '{model}': its config.json gives {name} {value!r}, which wants more than "
                f"an image and the empty prompt; allowed: {allowed}"
            )
    if unet.get("class_embeddings_concat"):
        raise TeacherError(
            f"teacher '{model}': its config.json gives class_embeddings_concat, so its class "
            "embedding cannot be switched off, and a label never reaches a teacher"
        )


def _attends_to_text(unet: Mapping[str, Any]) -> bool:
    blocks = [
        *unet.get("down_block_types", ("CrossAttnDownBlock2D",)),
        unet.get("mid_block_type", "UNetMidBlock2DCrossAttn"),
        *unet.get("up_block_types", ("CrossAttnUpBlock2D",)),
    ]
    return any("CrossAttn" in str(block) for block in blocks)


def _build(unet: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(unet)


def _run(network: Any, inputs: Tensor, conditions: Tensor, prompt: Prompt, *, factor: int) -> Any:
    # Labels never reach a teacher: the forward asks for none where there is no such embedding.
    network.class_embedding = None
    added = None
    if "text_embeds" in prompt:
        sizes = _time_ids(inputs, factor)
        added = {"text_embeds": prompt["text_embeds"], "time_ids": sizes}
    return network(
        inputs,
        conditions,
        encoder_hidden_states=prompt.get("encoder_hidden_states"),
        added_cond_kwargs=added,
        return_dict=False,
    )


def _time_ids(inputs: Tensor, factor: int) -> Tensor:
    """Original size, upper left corner of the crop, size: in pixels, float32, (N, 6)."""
    height, width = (factor * side for side in inputs.shape[2:])
    # Filled on the device itself: copying numbers to it would wait for it.
    columns = [
        torch.full((len(inputs), 1), float(number), device=inputs.device)
        for number in (height, width, 0, 0, height, width)
    ]
    return torch.cat(columns, 1)
