"""Banks over listings of files whose training images stay on disk (``data.storage: stream``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from repfusion_env.config import DataConfig
from repfusion_env.data.bank import ImageBank
from repfusion_env.data.decode import decode_outlined, outline
from repfusion_env.data.decoding_ahead import Readable
from repfusion_env.data.streamed import StreamedImages
from repfusion_env.data.streaming_sources import FileSource, Source
from repfusion_env.data.unreadable import Unreadable


def streamed_banks(
    name: str,
    listings: tuple[Sequence[tuple[Path, int]], Sequence[tuple[Path, int]]],
    classes: tuple[str, ...],
    config: DataConfig,
) -> tuple[ImageBank, ImageBank]:
    """A streamed training bank and a resident held-out one of (path, label) listings.

    Raises:
        ValueError: More files than may be left out have no header that can be read, sizes are
            mixed without ``data.image_size``, or the held-out images do not fit into memory.
    """
    train, heldout = listings
    unreadable = Unreadable(len(train) + len(heldout), config.skip_unreadable, name)
    paths = ([path for path, _ in train], [path for path, _ in heldout])
    found = outline(paths, config, unreadable)
    places, heldout_places = found.looked_at
    unreadable.check_rest((len(places), len(heldout_places)))
    _, part = decode_outlined(
        name, ([], paths[1]), replace(found, looked_at=([], heldout_places)), config, unreadable
    )
    labels = [torch.tensor([label for _, label in listing]) for listing in listings]
    source = FileSource.of([paths[0][place] for place in places], config.image_size, found.shape[0])
    kept = labels[0][torch.tensor(places, dtype=torch.int64)]
    first = streamed_bank(name, source, found.shape, kept, classes, config, unreadable)
    second = ImageBank(
        name, part.tensors[0], labels[1][part.kept], classes, skipped=unreadable.listed(1)
    )
    unreadable.report()
    return first, second


def streamed_bank(
    name: str,
    source: Source,
    shape: tuple[int, int, int],
    labels: torch.Tensor,
    classes: tuple[str, ...],
    config: DataConfig,
    unreadable: Unreadable,
) -> ImageBank:
    """A bank whose images are read from ``source`` as they are needed.

    Args:
        name: Of the data set.
        source: M images.
        shape: (C, H, W) of each.
        labels: (M,) int64.
        classes: Their names.
        config: How far ahead, and by how many threads.
        unreadable: Counts and refuses images that cannot be read, now and later.
    """
    readable = Readable(source, shape, labels.numpy().copy(), unreadable)
    images = StreamedImages(readable, ahead=config.prefetch, threads=config.decode_threads)
    return ImageBank(name, images, labels, classes, skipped=unreadable.listed(0))
