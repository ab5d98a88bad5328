"""Lists and annotations that are plain text."""

from __future__ import annotations

from pathlib import Path


def text_of(path: Path, purpose: str = "") -> str:
    """The whole file as text.

    Args:
        path: Of a UTF-8 file.
        purpose: What it is for, behind a comma in the message where it is missing.

    Raises:
        ValueError: There is no such file, or it is no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(
            f"data.path: there is no file '{path}'{f', {purpose}' if purpose else ''}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.path: '{path}' cannot be read as text ({error})") from error


def class_names(path: Path) -> tuple[str, ...]:
    """Names of classes, one in each line, in the order of their ids.

    Raises:
        ValueError: The file cannot be read, is empty, or has an empty or a repeated line.
    """
    names = [line.strip() for line in text_of(path).rstrip().splitlines()]
    if not names:
        raise ValueError(f"data.path: '{path}' is empty; expected is a class in each line")
    for number, name in enumerate(names, 1):
        if not name or name in names[: number - 1]:
            what = f"repeats the class '{name}'" if name else "is empty"
            raise ValueError(
                f"data.path: line {number} of '{path}' {what}; expected is a class in each line"
            )
    return tuple(names)
