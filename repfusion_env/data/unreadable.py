"""What cannot be read is refused, or left out as far as ``data.skip_unreadable`` allows: said."""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repfusion_env.data.bank import ImageBank

MOST_NAMED = 3


def unreadable_images(train: ImageBank, heldout: ImageBank) -> dict[str, list[str]]:
    """What a run's summary says of images that were left out: nothing, or all of the sentences."""
    found = [*train.unreadable, *heldout.unreadable]
    return {"unreadable_images": found} if found else {}


class Unreadable:
    """Collects what is wrong with single images; threads may share one.

    Args:
        total: Images in all, training and held-out together.
        limit: The largest part of them that may be left out, 0 to 1 (``data.skip_unreadable``).
        name: Of the data set, for the report.
    """

    def __init__(self, total: int, limit: float, name: str = "") -> None:
        self.total = total
        self.limit = limit
        self.name = name
        # A part such as 0.07 of 100 is 7, whatever binary fractions make of it.
        self.allowed = int(limit * total + 1e-9)
        self._sentences: dict[int, list[str]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._sentences.values()))

    def add(self, sentence: str, part: int = 0) -> None:
        """One more image is left out.

        Args:
            sentence: What is wrong, with the name of the file; one for each image.
            part: 0 where it is a training image, 1 where it is a held-out one.

        Raises:
            ValueError: None may be left out, or no more than there are already.
        """
        with self._lock:
            self._sentences.setdefault(part, []).append(sentence)
            count = len(self)
        if self.limit == 0:
            raise ValueError(sentence)
        if count > self.allowed:
            raise ValueError(
                f"{sentence}; it is number {count:,} of {self.total:,} images that cannot be read, "
                f"and data.skip_unreadable {self.limit:g} leaves out at most {self.allowed:,}"
            )

    def listed(self, part: int | None = None) -> tuple[str, ...]:
        """The sentences of one part, or of all, sorted: threads end in any order."""
        parts = self._sentences if part is None else (part,)
        return tuple(sorted(line for key in parts for line in self._sentences.get(key, ())))

    def check_rest(self, left: tuple[int, int]) -> None:
        """Refuse a part of which nothing is left.

        Args:
            left: Training and held-out images that could be read.

        Raises:
            ValueError: All images of a part are left out.
        """
        for part, which in enumerate(("training", "held-out")):
            found = self.listed(part)
            if found and left[part] == 0:
                raise ValueError(
                    f"data set '{self.name}': none of the {len(found):,} {which} images can be "
                    f"read: {found[0]}"
                )

    def report(self) -> None:
        """Warn, once, with the number and the first few; nothing where all could be read."""
        found = self.listed()
        if not found:
            return
        more = len(found) - MOST_NAMED
        first = "; ".join(line.removeprefix("data.path: ") for line in found[:MOST_NAMED])
        warnings.warn(
            f"data set '{self.name}': {len(found):,} of {self.total:,} images are left out, since "
            f"they cannot be read (data.skip_unreadable {self.limit:g}): {first}"
            f"{f'; and {more:,} more' if more > 0 else ''}",
            RuntimeWarning,
            stacklevel=3,
        )
