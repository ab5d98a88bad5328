"""What the package's commands share: exit codes, one sentence for bad input, a graceful stop."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from repfusion_env.ranks import refuse_several, say
from repfusion_env.registry import did_you_mean

WRONG_USE = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Raises a ValueError of one sentence, with the closest option, where argparse would exit."""

    def __init__(self, prog: str, usage: str, description: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}",
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(
                prog, max_help_position=34, width=100
            ),
        )

    def error(self, message: str) -> NoReturn:
        """See the class."""
        raise ValueError(message.removeprefix("argument "))

    def read(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """The options given, by their names.

        Raises:
            ValueError: An option is unknown, or its value is not what it takes.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        refuse_several(self.prog)
        found, unknown = self.parse_known_args(words)
        if unknown:
            word = unknown[0].partition("=")[0]
            if not word.startswith("--"):
                raise ValueError(f"'{word}' given where nothing more is expected")
            known = [name for action in self._actions for name in action.option_strings]
            raise ValueError(f"{word}: there is no such option.{did_you_mean(word, known)}")
        return vars(found)


def number(
    kind: type[int] | type[float], low: float, below: float = float("inf")
) -> Callable[[str], Any]:
    """An argparse type: a number of ``low`` or more, and less than ``below``."""
    limit = f" and below {below:g}" if below < float("inf") else ""
    wanted = "a whole number" if kind is int else "a number"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' given; it must be {wanted}") from None
        if value in (float("inf"), float("-inf")) or value != value:
            raise argparse.ArgumentTypeError(f"{text} given; it must be {wanted}, and finite")
        if not low <= value < below:
            raise argparse.ArgumentTypeError(f"{text} given; it must be {low:g} or more{limit}")
        return value

    return convert


def device(text: str) -> str:
    """An argparse type: the name of a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"'{text}' given; allowed: auto, cpu, cuda, cuda:<index>")
    return text


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this project and so is a sentence for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return module.split(".")[0] in ("repfusion_env", "agents", "students", "__main__")


def guarded(command: Callable[[], int]) -> int:
    """Run a command: its exit code, or 2 after a sentence on stderr, or 130 after Ctrl-C."""
    try:
        return command()
    except (ValueError, TypeError, OSError) as error:
        say(f"error: {error}")
        return WRONG_USE
    except KeyboardInterrupt:
        say("stopped; what was not saved is lost")
        return INTERRUPTED


def guarded_ours(command: Callable[[], int], stopped: str) -> int:
    """Run a command as :func:`guarded` does; a defect in another library keeps its traceback.

    Args:
        command: Returns its exit code.
        stopped: The sentence after Ctrl-C: what is kept.
    """
    try:
        refuse_several("this command")
        return command()
    except (ValueError, TypeError, OSError) as error:
        problems = getattr(error, "problems", None)  # of a ConfigError, a sentence each
        if problems is None and not isinstance(error, OSError) and not is_ours(error):
            raise
        for problem in [error] if problems is None else problems:
            say(f"error: {problem}")
        return WRONG_USE
    except KeyboardInterrupt:
        say(stopped)
        return INTERRUPTED


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or a termination came; the second one stops at once.

    An exception could strike in the middle of an update, and what is saved then would belong to no
    step.
    """
    caught: list[int] = []

    def note(signal_number: int, _frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signal_number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(item, note) for item in numbers]
    try:
        yield lambda: bool(caught)
    finally:
        for item, handler in zip(numbers, before, strict=True):
            signal.signal(item, handler)
