"""The embeddings of the empty prompt, for denoisers that are conditioned on text.

They are made by the model's own text encoders and its own diffusers pipeline, or read from an
``empty_prompt.safetensors`` in the model's folder, which this writes, so that no text encoder is
needed any more::

    python -m repfusion_env.teachers.empty_prompt MODEL [--out FILE]

No other prompt has a way in.

Shape letters: T text tokens, F width of a token, P width of the pooled embedding.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repfusion_env.atomic import atomic_file
from repfusion_env.registry import did_you_mean
from repfusion_env.teachers.base import TeacherError
from repfusion_env.teachers.files.model_files import ModelFiles, find_model
from repfusion_env.teachers.files.quiet import first_line, quiet_diffusers
from repfusion_env.teachers.files.text_encoders import check_text_parts, load_text_parts

FILE = "empty_prompt.safetensors"
SEQUENCE, MASK = "encoder_hidden_states", "encoder_attention_mask"
# What each pipeline's encode_prompt returns, by place, under the network's names.
PIPELINES: dict[str, dict[int, str]] = {
    "StableDiffusionPipeline": {0: SEQUENCE},
    "LatentConsistencyModelPipeline": {0: SEQUENCE},
    "IFPipeline": {0: SEQUENCE},
    "StableDiffusionXLPipeline": {0: SEQUENCE, 2: "text_embeds"},
    "PixArtAlphaPipeline": {0: SEQUENCE, 1: MASK},
    "PixArtSigmaPipeline": {0: SEQUENCE, 1: MASK},
    "StableDiffusion3Pipeline": {0: SEQUENCE, 2: "pooled_projections"},
    "FluxPipeline": {0: SEQUENCE, 1: "pooled_projections"},
}


def empty_prompt(
    files: ModelFiles, settings: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The embeddings of the empty prompt.

    Args:
        files: Of the model. An ``empty_prompt.safetensors`` in its folder is used where it is.
        settings: Configuration of the denoising network.
        dtype: That the network computes in.

    Returns:
        By the names that the network's forward has for them, on the CPU, each of batch size 1 and
        of ``dtype`` (a mask keeps its own): ``encoder_hidden_states`` (1, T, F) always; where the
        pipeline gives them ``encoder_attention_mask`` (1, T), ``pooled_projections`` (1, P) or
        ``text_embeds`` (1, P). The text encoders are gone.

    Raises:
        TeacherError: A tokenizer or text encoder is missing, damaged or incomplete, or the pipeline
            is none of those known here.
    """
    stored = files.folder / FILE
    found = _stored(files, stored) if stored.is_file() else _encoded(files, settings, dtype)
    for name, value in found.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise TeacherError(f"teacher '{files.model}': its empty prompt is not finite in {name}")
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in found.items()
    }


def check_prompt_files(files: ModelFiles) -> None:
    """Refuse a model without what its empty prompt is made of; no weights are read.

    Raises:
        TeacherError: A tokenizer or text encoder is missing, or the pipeline is none of those
            known here.
    """
    if not (files.folder / FILE).is_file():
        check_text_parts(files, _index(files))


def _stored(files: ModelFiles, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TeacherError(
            f"teacher '{files.model}': {FILE} is damaged or not what its name says"
        ) from error
    if SEQUENCE not in found:
        raise TeacherError(
            f"teacher '{files.model}': {FILE} has no {SEQUENCE}; it has "
            f"{', '.join(sorted(found)) or 'nothing'}"
        )
    return found


def _encoded(
    files: ModelFiles, settings: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    import diffusers

    index = _index(files)
    name = str(index["_class_name"])
    parts = load_text_parts(files, index, dtype)
    try:
        with quiet_diffusers(), torch.random.fork_rng(devices=[]), torch.inference_mode():
            pipeline = _pipeline(getattr(diffusers, name), parts, index, settings)
            returned = _encode(pipeline)
        return {key: returned[place].detach().clone() for place, key in PIPELINES[name].items()}
    except Exception as error:
        # Text parts that do not fit each other make a pipeline raise whatever it meets first.
        raise TeacherError(
            f"teacher '{files.model}': its {name} cannot encode the empty prompt "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _index(files: ModelFiles) -> dict[str, Any]:
    """Content of the ``model_index.json``, of a pipeline known here."""
    if not (files.folder / "model_index.json").is_file():
        raise TeacherError(
            f"teacher '{files.model}' is conditioned on text, but its folder holds neither a "
            f"model_index.json, which names its pipeline and text encoders, nor an {FILE}"
        )
    index = files.config(name="model_index.json")
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        raise TeacherError(
            f"teacher '{files.model}': its model_index.json names the pipeline '{name}', whose "
            f"empty prompt is not known here; known: {', '.join(PIPELINES)}, or an {FILE} in its "
            f"folder.{did_you_mean(name, PIPELINES)}"
        )
    return index


def _pipeline(
    kind: Any, parts: Mapping[str, Any], index: Mapping[str, Any], settings: Mapping[str, Any]
) -> Any:
    """The pipeline with its text parts alone."""
    given = {}
    for name in list(inspect.signature(kind.__init__).parameters)[1:]:
        value = index.get(name)
        if name in parts:
            given[name] = parts[name]
        elif name == "transformer" and parts.get("text_encoder_3", ...) is None:
            # Stable Diffusion 3 without T5 puts zeros of the network's width in its place.
            given[name] = _Configured(settings)
        elif name == "requires_safety_checker":
            given[name] = False
        else:
            given[name] = None if isinstance(value, list | dict) else value
    return kind(**given)


class _Configured(torch.nn.Module):
    """Stands where a pipeline reads a network's configuration and nothing else of it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from diffusers.configuration_utils import FrozenDict

        super().__init__()
        defaults = {"sample_size": 128, "patch_size": 2, "joint_attention_dim": 4096}
        self.config = FrozenDict({**defaults, **settings})
        self.dtype = torch.float32


def _encode(pipeline: Any) -> Any:
    known: dict[str, Any] = {
        "prompt": "",
        "prompt_2": None,
        "prompt_3": None,
        "device": torch.device("cpu"),
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    return pipeline.encode_prompt(**{key: known[key] for key in known if key in accepted})


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the embeddings of a model's empty prompt to a file; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m repfusion_env.teachers.empty_prompt",
        description="Write a model's empty prompt to a file, so that it needs no text encoders.",
    )
    parser.add_argument("model", help="local folder or hub id")
    parser.add_argument("--revision", help="commit, tag or branch on the hub")
    parser.add_argument("--out", type=Path, help=f"default: {FILE} in the model's folder")
    chosen = parser.parse_args(arguments)
    try:
        files = find_model(chosen.model, chosen.revision)
        network = "transformer" if files.has("transformer") else "unet"
        embeddings = _encoded(files, files.config(network), torch.float32)
        path = chosen.out or files.folder / FILE
        _write(path, embeddings)
    except (TeacherError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shapes = (f"{name} {'x'.join(map(str, value.shape))}" for name, value in embeddings.items())
    print(f"{path}: {', '.join(shapes)}")
    return 0


def _write(path: Path, embeddings: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save

    content = save({name: value.contiguous() for name, value in embeddings.items()})
    with atomic_file(path) as file:
        file.write(content)


if __name__ == "__main__":
    sys.exit(main())
