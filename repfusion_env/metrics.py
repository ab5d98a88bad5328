"""Metrics as JSON lines: one object per logging point, whole or not there at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repfusion_env.atomic import atomic_file


class Rows:
    """The whole lines of a metrics file; ``torn`` where a killed process left part of one."""

    def __init__(self, content: bytes) -> None:
        self.lines: list[bytes] = []
        self.rows: list[dict[str, Any]] = []
        for line in content.splitlines(keepends=True):
            try:
                row = json.loads(line)
                if not line.endswith(b"\n") or not {"step", "decisions"} <= row.keys():
                    continue
            except (ValueError, AttributeError):
                continue
            self.lines.append(line)
            self.rows.append(row)
        self.torn = sum(map(len, self.lines)) != len(content)


def read_rows(path: Path) -> Rows:
    """The whole lines of ``path``; none where there is no such file."""
    return Rows(path.read_bytes() if path.exists() else b"")


def write_lines(path: Path, lines: list[bytes]) -> None:
    """Replace ``path`` by ``lines``, atomically."""
    with atomic_file(path) as file:
        file.writelines(lines)


def columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The rows, T of them, as one array per column.

    Returns:
        ``step`` and ``decisions`` as int64 (T,); each tag as float64 (T,), NaN where a row has null
        or lacks it; each list as (T, K), int64 where every row has whole numbers there.
    """
    table: dict[str, np.ndarray] = {
        key: np.array([row[key] for row in rows], dtype=np.int64) for key in ("step", "decisions")
    }
    for tag in dict.fromkeys(tag for row in rows for tag in row if tag not in table):
        values = [row.get(tag) for row in rows]
        length = max((len(value) for value in values if isinstance(value, list)), default=0)
        if not length:
            table[tag] = np.array([_number(value) for value in values], dtype=np.float64)
            continue
        lists = [
            [_number(item) for item in value]
            if isinstance(value, list) and len(value) == length
            else [math.nan] * length
            for value in values
        ]
        whole = all(isinstance(item, int) for items in lists for item in items)
        table[tag] = np.array(lists, dtype=np.int64 if whole else np.float64)
    return table


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: numpy and torch numbers become Python's, NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays, tensors, and the numbers of numpy and torch
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else math.nan
