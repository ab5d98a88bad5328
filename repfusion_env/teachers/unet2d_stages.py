"""The forward of diffusers' ``UNet2DModel`` in stages, so that it can stop after any of them.

Shape letters: N lanes, C channels, H height, W width of the image.
"""

from __future__ import annotations

from diffusers import UNet2DModel
from torch import Tensor


def run_stages(unet: UNet2DModel, images: Tensor, timesteps: Tensor, depth: int) -> None:
    """The forward of ``UNet2DModel`` up to its stage ``depth``; hooks take what they want.

    It does what diffusers' own forward does, operation by operation, but for the class embedding:
    labels never reach a teacher.

    Args:
        unet: The network; stages behind ``depth`` may be missing.
        images: (N, C, H, W), in the network's dtype.
        timesteps: int64, (N,).
        depth: Index into :func:`stages`.
    """
    if unet.config.center_input_sample:
        images = 2 * images - 1.0
    embedding = unet.time_embedding(unet.time_proj(timesteps).to(unet.conv_in.weight.dtype))
    skip_image = images
    sample = unet.conv_in(images)
    residuals = (sample,)
    stage = 1
    for block in unet.down_blocks:
        if stage > depth:
            return
        if hasattr(block, "skip_conv"):
            sample, kept, skip_image = block(
                hidden_states=sample, temb=embedding, skip_sample=skip_image
            )
        else:
            sample, kept = block(hidden_states=sample, temb=embedding)
        residuals += kept
        stage += 1
    if stage > depth:
        return
    if unet.mid_block is not None:
        sample = unet.mid_block(sample, embedding)
    stage += 1
    skip_sample = None
    for block in unet.up_blocks:
        if stage > depth:
            return
        count = len(block.resnets)
        kept, residuals = residuals[-count:], residuals[:-count]
        if hasattr(block, "skip_conv"):
            sample, skip_sample = block(sample, kept, embedding, skip_sample)
        else:
            sample = block(sample, kept, embedding)
        stage += 1
    if stage > depth:
        return
    unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))


def stages(unet: UNet2DModel) -> list[tuple[str, ...]]:
    """Module paths of each stage of the forward, in its order."""
    return [
        ("time_proj", "time_embedding", "conv_in"),
        *((f"down_blocks.{index}",) for index in range(len(unet.down_blocks))),
        ("mid_block",),
        *((f"up_blocks.{index}",) for index in range(len(unet.up_blocks))),
        ("conv_norm_out", "conv_act", "conv_out"),
    ]


def stage_of(layer: str, unet: UNet2DModel) -> int:
    """Index of the stage that holds ``layer``."""
    for index, paths in enumerate(stages(unet)):
        if any(layer == path or layer.startswith(f"{path}.") for path in paths):
            return index
    raise ValueError(f"'{layer}' is in no stage of the forward")


def drop_behind(unet: UNet2DModel, depth: int) -> None:
    """Free the parts of the network that the cut forward never reaches."""
    count, last = len(unet.down_blocks), len(stages(unet)) - 1
    del unet.down_blocks[depth:]
    if depth < count + 1:
        unet.mid_block = None
    del unet.up_blocks[max(0, depth - count - 1) :]
    unet.class_embedding = None
    if depth < last:
        unet.conv_norm_out = unet.conv_act = unet.conv_out = None
