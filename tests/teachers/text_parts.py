"""Small random text encoders and tokenizers, saved as a diffusers pipeline saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]


def save_index(folder: Path, name: str, parts: dict[str, Any], **settings: Any) -> None:
    """Writes ``model_index.json`` and each part into its subfolder; None: no such part."""
    index: dict[str, Any] = {"_class_name": name, **settings}
    for key, part in parts.items():
        library = "transformers" if key.startswith(("text", "token")) else "diffusers"
        index[key] = [None, None] if part is None else [library, type(part).__name__]
        if part is not None:
            part.save_pretrained(folder / key)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def clip_encoder(width: int = 16, *, projection: int | None = None, seed: int = 0) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=projection or width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
        encoder = kind(config).eval()
        # transformers starts biases at zero and embeddings near it, which would hide mistakes.
        for value in encoder.parameters():
            value.data += 0.3 * torch.randn_like(value)
    return encoder


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("a", -2.0)],
        extra_ids=0,
        model_max_length=8,
    )


def t5_encoder(width: int = 16, *, seed: int = 0) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=8, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = T5EncoderModel(config).eval()
        for value in encoder.parameters():
            value.data += 0.3 * torch.randn_like(value)
    return encoder
