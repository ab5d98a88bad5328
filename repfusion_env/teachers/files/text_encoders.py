"""Tokenizers and text encoders of a diffusers folder, loaded whole or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from repfusion_env.registry import did_you_mean
from repfusion_env.teachers.base import TeacherError
from repfusion_env.teachers.files.model_files import ModelFiles
from repfusion_env.teachers.files.quiet import first_line

PREFIXES = ("tokenizer", "text_encoder")
# CLIP is small enough for float32; T5 has billions of weights.
LARGE = ("T5", "UMT5")


def check_text_parts(files: ModelFiles, index: Mapping[str, Any]) -> list[str]:
    """Refuse a model whose text parts are not all there, before any is loaded.

    Args:
        files: Of the model.
        index: Content of its ``model_index.json``.

    Returns:
        Names in the index of all tokenizers and text encoders, those saved as none included.

    Raises:
        TeacherError: One is missing, or transformers is not installed.
    """
    if find_spec("transformers") is None:
        raise TeacherError(_needs_transformers(files.model))
    names = [name for name in index if name.startswith(PREFIXES)]
    for name in names:
        entry = index[name]
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise TeacherError(
                f"teacher '{files.model}': its model_index.json gives {name} as {entry!r}; "
                "a library and a class are needed"
            )
        present = "tokenizer_config.json" if name.startswith("tokenizer") else "config.json"
        if entry[1] is not None and not (files.folder / name / present).is_file():
            raise TeacherError(
                f"teacher '{files.model}' has no {name}: the embeddings of its empty prompt need "
                f"'{name}/{present}', or an empty_prompt.safetensors that holds them"
            )
    return names


def load_text_parts(
    files: ModelFiles, index: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Load every tokenizer and text encoder that a ``model_index.json`` lists.

    Args:
        files: Of the model; from the hub only the text encoders' weights are fetched.
        index: Content of its ``model_index.json``.
        dtype: Of the network; large text encoders compute in bfloat16 where it is a half precision
            (they overflow in float16), and everything else in float32.

    Returns:
        By the names of the index; None where the index says that the model was saved without.

    Raises:
        TeacherError: One is missing, damaged, incomplete, or no part of transformers; or that is
            not installed.
    """
    names = check_text_parts(files, index)
    library = _transformers(files.model)
    return {
        name: None if index[name][1] is None else _load(library, files, name, index[name], dtype)
        for name in names
    }


def _transformers(model: str) -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise TeacherError(_needs_transformers(model)) from error
    return transformers


def _needs_transformers(model: str) -> str:
    return (
        f"teacher '{model}' is told of an empty prompt, which its text encoder makes; that "
        "needs transformers: pip install 'repfusion-env[text]'"
    )


def _load(library: Any, files: ModelFiles, name: str, entry: Any, dtype: torch.dtype) -> Any:
    source, class_name = map(str, entry)
    is_tokenizer = name.startswith("tokenizer")
    base = library.PreTrainedTokenizerBase if is_tokenizer else library.PreTrainedModel
    kind = getattr(library, class_name, None)
    # Code of the model's own is never run, so a class must be one of the library's.
    if source != "transformers" or not (isinstance(kind, type) and issubclass(kind, base)):
        near = did_you_mean(class_name, (known for known in dir(library) if "T" in known))
        raise TeacherError(
            f"teacher '{files.model}': its model_index.json gives {name} as "
            f"{source}.{class_name}, which is no {'tokenizer' if is_tokenizer else 'text encoder'} "
            f"of transformers.{near}"
        )
    try:
        with quiet_transformers(library), torch.random.fork_rng(devices=[]):
            if is_tokenizer:
                return _load_tokenizer(kind, files, name)
            return _load_encoder(kind, files, name, dtype)
    except TeacherError:
        raise
    except Exception as error:
        # safetensors, tokenizers, pickle and transformers each raise kinds of their own.
        raise TeacherError(
            f"teacher '{files.model}': transformers cannot load its {name} ({first_line(error)})"
        ) from error


def _load_tokenizer(kind: Any, files: ModelFiles, name: str) -> Any:
    return kind.from_pretrained(files.folder / name, local_files_only=True)


def _load_encoder(kind: Any, files: ModelFiles, name: str, dtype: torch.dtype) -> Any:
    weights = files.weights(name)
    half = dtype != torch.float32 and kind.__name__.startswith(LARGE)
    encoder, said = kind.from_pretrained(
        files.folder / name,
        torch_dtype=torch.bfloat16 if half else torch.float32,
        variant="fp16" if ".fp16" in weights[0].name else None,
        use_safetensors=weights[0].suffix == ".safetensors",
        local_files_only=True,
        output_loading_info=True,
    )
    # transformers draws what a file lacks at random and only warns.
    lacking = sorted(map(str, said["missing_keys"]))
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise TeacherError(
            f"teacher '{files.model}': {name}/{weights[0].name} lacks weights "
            f"{', '.join(lacking[:3])}{more}, so it belongs to another config.json"
        )
    for key, value in encoder.named_parameters():
        if not value.isfinite().all():
            raise TeacherError(
                f"teacher '{files.model}': {name}/{weights[0].name} holds values that are not "
                f"finite in {key}"
            )
    return encoder.eval().requires_grad_(False)


@contextmanager
def quiet_transformers(library: Any) -> Iterator[None]:
    """Silence transformers' warnings and progress bars; the user's settings come back."""
    logging = library.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
