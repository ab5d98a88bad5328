"""The layout of guided-diffusion checkpoints: which network one holds, and diffusers' names for it.

The network of Dhariwal & Nichol, 2021 (and of Nichol & Dhariwal, 2021, before it) numbers its
blocks through: ``input_blocks.0..``, ``middle_block.0..2``, ``output_blocks.0..``. Everything but
the heads of its attention and its noise can be told from the names and shapes of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from repfusion_env.teachers.base import TeacherError
from repfusion_env.teachers.files.weight_files import WeightFiles

Shapes = Mapping[str, tuple[int, ...]]

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
QKV = "qkv"
_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0", QKV: QKV}


@dataclass(frozen=True)
class Architecture:
    """A UNet of guided diffusion.

    Attributes:
        in_channels: Of the images.
        out_channels: Twice as many where the variance is learned too.
        embedded: Width of the timestep's sinusoidal embedding.
        widths: Of each level, the highest resolution first.
        blocks: Residual blocks per level on the way down.
        attention: Whether a level has self-attention.
        residual_resampling: Residual blocks that resample, not single convolutions.
        scale_shift: The timestep scales and shifts, it is not only added.
        classes: Rows of the class embedding; 0 without one.
    """

    in_channels: int
    out_channels: int
    embedded: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    residual_resampling: bool
    scale_shift: bool
    classes: int


def architecture_of(model: str, shapes: Shapes) -> Architecture:
    """Tell the network from its weights.

    Args:
        model: The teacher's name, for the messages.
        shapes: Of all weights in the file.

    Raises:
        TeacherError: They are no denoiser's of guided diffusion, or of a variant not known here.
    """
    if "input_blocks.0.0.weight" not in shapes or "time_embed.0.weight" not in shapes:
        raise _refusal(model, "it lacks input_blocks.0.0.weight or time_embed.0.weight")
    inputs, outputs = _count(shapes, "input_blocks"), _count(shapes, "output_blocks")
    if not outputs:
        raise _refusal(model, "it has no output_blocks: a classifier is not a denoiser")
    rises = [index for index in range(outputs) if _resampler(shapes, index)]
    blocks = rises[0] if rises else outputs - 1
    levels = len(rises) + 1
    if (
        rises != [blocks + (blocks + 1) * level for level in range(levels - 1)]
        or outputs != levels * (blocks + 1)
        or inputs != levels * (blocks + 1)
        or "middle_block.1.qkv.weight" not in shapes
    ):
        raise _refusal(
            model,
            f"its {inputs} input_blocks and {outputs} output_blocks are not arranged in levels "
            "with learned resampling and an attention in the middle",
        )
    firsts = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    try:
        widths = tuple(shapes[f"{first}.0.out_layers.3.weight"][0] for first in firsts)
        told = shapes[f"{firsts[0]}.0.emb_layers.1.weight"][0]
        in_channels = shapes["input_blocks.0.0.weight"][1]
        out_channels = shapes["out.2.weight"][0]
        embedded = shapes["time_embed.0.weight"][1]
    except (KeyError, IndexError) as error:
        raise _refusal(model, f"it lacks {error}") from error
    if in_channels == 6 and out_channels in (3, 6):
        raise TeacherError(
            f"teacher '{model}' is an upsampler: it takes a second image of low resolution, and "
            "family 'guided_diffusion' has none to give"
        )
    return Architecture(
        in_channels=in_channels,
        out_channels=out_channels,
        embedded=embedded,
        widths=widths,
        blocks=blocks,
        attention=tuple(f"{first}.1.qkv.weight" in shapes for first in firsts),
        residual_resampling=bool(rises) and _resampler(shapes, rises[0]) == "in_layers.2",
        scale_shift=told == 2 * widths[0],
        classes=shapes.get("label_emb.weight", (0,))[0],
    )


def _refusal(model: str, why: str) -> TeacherError:
    return TeacherError(f"teacher '{model}' is no guided-diffusion checkpoint known here: {why}")


def _count(shapes: Shapes, blocks: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{blocks}.")})


def _resampler(shapes: Shapes, index: int) -> str | None:
    """What an output block's last part is called where it doubles the resolution."""
    for part in (1, 2):
        for inner in ("in_layers.2", "conv"):
            if f"output_blocks.{index}.{part}.{inner}.weight" in shapes:
                return inner
    return None


@dataclass(frozen=True)
class Module:
    """One module under both names.

    Attributes:
        theirs: Path in the checkpoint.
        ours: Path in diffusers' network; of ``qkv`` that of the attention that holds its three.
        weights: Whether weights are saved under this path itself.
    """

    theirs: str
    ours: str
    weights: bool = False


def modules(architecture: Architecture) -> Iterator[Module]:
    """Every module that has a counterpart in diffusers' network, some under several names."""
    yield Module("time_embed.0", "time_embedding.linear_1", True)
    yield Module("time_embed.2", "time_embedding.linear_2", True)
    yield Module("input_blocks.0", "conv_in")
    yield Module("input_blocks.0.0", "conv_in", True)
    levels = len(architecture.widths)
    for level in range(levels):
        yield from _down(architecture, level, level == levels - 1)
    yield from _residual("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _residual("middle_block.2", "mid_block.resnets.1")
    yield Module("middle_block", "mid_block")
    for level in range(levels):
        yield from _up(architecture, level, level == levels - 1)
    yield Module("out.0", "conv_norm_out", True)
    yield Module("out.1", "conv_act")
    yield Module("out.2", "conv_out", True)
    yield Module("out", "conv_out")


def _down(architecture: Architecture, level: int, last: bool) -> Iterator[Module]:
    start, block = 1 + level * (architecture.blocks + 1), f"down_blocks.{level}"
    attends = architecture.attention[level]
    for index in range(architecture.blocks):
        yield from _stage(f"input_blocks.{start + index}", block, index, attends)
    if not last:
        theirs, ours = f"input_blocks.{start + architecture.blocks}", f"{block}.downsamplers.0"
        yield Module(theirs, ours)
        if architecture.residual_resampling:
            yield from _residual(f"{theirs}.0", ours)
        else:
            yield Module(f"{theirs}.0", ours)
            yield Module(f"{theirs}.0.op", f"{ours}.conv", True)


def _up(architecture: Architecture, level: int, last: bool) -> Iterator[Module]:
    start, block = level * (architecture.blocks + 1), f"up_blocks.{level}"
    attends = architecture.attention[-1 - level]
    for index in range(architecture.blocks + 1):
        resampled = not last and index == architecture.blocks
        yield from _stage(f"output_blocks.{start + index}", block, index, attends, not resampled)
    if not last:
        theirs, ours = f"output_blocks.{start + architecture.blocks}", f"{block}.upsamplers.0"
        part = f"{theirs}.{2 if attends else 1}"
        yield Module(theirs, ours)
        if architecture.residual_resampling:
            yield from _residual(part, ours)
        else:
            yield Module(part, ours)
            yield Module(f"{part}.conv", f"{ours}.conv", True)


def _stage(
    theirs: str, block: str, index: int, attends: bool, whole: bool = True
) -> Iterator[Module]:
    """A residual block and its attention; the ``whole`` is what its last part gives."""
    yield from _residual(f"{theirs}.0", f"{block}.resnets.{index}")
    if attends:
        yield from _attention(f"{theirs}.1", f"{block}.attentions.{index}")
    if whole:
        yield Module(theirs, f"{block}.{'attentions' if attends else 'resnets'}.{index}")


def _residual(theirs: str, ours: str) -> Iterator[Module]:
    for inner, name in _RESIDUAL.items():
        yield Module(f"{theirs}.{inner}", f"{ours}.{name}", True)
    yield Module(f"{theirs}.in_layers", f"{ours}.conv1")
    yield Module(f"{theirs}.out_layers", f"{ours}.conv2")
    yield Module(theirs, ours)


def _attention(theirs: str, ours: str) -> Iterator[Module]:
    for inner, name in _ATTENTION.items():
        yield Module(f"{theirs}.{inner}", f"{ours}.{name}", True)
    yield Module(theirs, ours)


class GuidedWeights(WeightFiles):
    """A guided-diffusion checkpoint under diffusers' names.

    Args:
        model: The teacher's name, for the messages.
        path: Of the checkpoint, read with ``weights_only``.

    Attributes:
        architecture: Told from its weights.
        wide_qkv: Attention convolves over two axes, as in OpenAI's EDM and consistency models.

    Raises:
        TeacherError: The file is damaged, or holds no denoiser of guided diffusion.
    """

    misfit = "so it is of a variant that family 'guided_diffusion' does not know"

    def __init__(self, model: str, path: Path) -> None:
        # Labels reach no teacher: the class embedding is not even read.
        super().__init__(model, [path])
        self.architecture = architecture_of(model, self.shapes)
        self.wide_qkv = len(self.shapes["middle_block.1.qkv.weight"]) == 4
        self.shapes.pop("label_emb.weight", None)
        self._originals = self._readers

    def convert(self, network: Shapes, heads: Callable[[int], int], order: str) -> None:
        """Rename and split the weights, after checking that they are all there and no others.

        Args:
            network: Shapes of diffusers' network by name.
            heads: Of an attention by its width.
            order: How ``qkv`` is laid out: "legacy" (heads, 3, channels) or "new" (3, heads,
                channels).

        Raises:
            TeacherError: Naming what is missing, unexpected or of another shape.
        """
        expected: dict[str, tuple[int, ...]] = {}
        readers: dict[str, Callable[[], Tensor]] = {}
        for module in modules(self.architecture):
            for leaf in ("weight", "bias"):
                name = f"{module.theirs}.{leaf}"
                if module.weights and module.ours.endswith(QKV):
                    attention = module.ours.removesuffix(f".{QKV}")
                    wide, *rest = network[f"{attention}.to_q.{leaf}"]
                    expected[name] = self._as_saved(name, (3 * wide, *rest))
                    for part, letter in enumerate("qkv"):
                        readers[f"{attention}.to_{letter}.{leaf}"] = partial(
                            self._split, name, (heads(wide) if order == "legacy" else 1, 3), part
                        )
                elif module.weights and f"{module.ours}.{leaf}" in network:
                    like = network[f"{module.ours}.{leaf}"]
                    expected[name] = self._as_saved(name, like)
                    readers[f"{module.ours}.{leaf}"] = partial(self._shaped, name, like)
        self.check(expected)
        self._readers = readers
        self.shapes = {name: tuple(network[name]) for name in readers}

    def _as_saved(self, name: str, like: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file: a matrix may be saved as a convolution of one position."""
        saved = self.shapes.get(name, like)
        return saved if len(like) == 2 and saved in ((*like, 1), (*like, 1, 1)) else like

    def _shaped(self, name: str, like: tuple[int, ...]) -> Tensor:
        return self._originals[name]().reshape(like)

    def _split(self, name: str, layout: tuple[int, int], part: int) -> Tensor:
        saved = self._originals[name]()
        rows = saved.flatten(1) if saved.ndim > 1 else saved
        # With one head both layouts are (3, channels); "new" keeps its heads inside each third.
        return rows.unflatten(0, (*layout, -1))[:, part].flatten(0, 1)


def unet_config(architecture: Architecture, image_size: int, head_width: int) -> dict[str, Any]:
    """The ``config.json`` of diffusers' ``UNet2DModel``, without a class embedding."""
    resampling = "resnet" if architecture.residual_resampling else "conv"
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    if not architecture.residual_resampling:
        plain = ("DownBlock2D", "UpBlock2D")
    return {
        "_class_name": "UNet2DModel",
        "sample_size": image_size,
        "in_channels": architecture.in_channels,
        "out_channels": architecture.out_channels,
        "block_out_channels": list(architecture.widths),
        "layers_per_block": architecture.blocks,
        "down_block_types": [
            "AttnDownBlock2D" if attends else plain[0] for attends in architecture.attention
        ],
        "up_block_types": [
            "AttnUpBlock2D" if attends else plain[1] for attends in architecture.attention[::-1]
        ],
        "downsample_type": resampling,
        "upsample_type": resampling,
        "resnet_time_scale_shift": "scale_shift" if architecture.scale_shift else "default",
        "attention_head_dim": head_width,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "time_embedding_dim": 4 * architecture.embedded,
        # Cosines before sines, frequencies down to 1 / 10000 exclusive.
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
