"""The metric by which a comparison's students are compared, and in which sense it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from repfusion_env.metric_names import metric_name

if TYPE_CHECKING:
    from repfusion_env.tasks import Task


@dataclass(frozen=True)
class Headline:
    """A task's headline metric.

    Attributes:
        name: As in results: ``accuracy``, ``miou``, ``nme``, ``map``.
        higher_is_better: Otherwise it is an error.
        percent: Whether it is a part of 1, to be read in %.
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    percent: bool = True

    @property
    def sign(self) -> float:
        """Times which a higher value is a better one."""
        return 1.0 if self.higher_is_better else -1.0

    @property
    def scale(self) -> float:
        """From the value to what is shown."""
        return 100.0 if self.percent else 1.0

    @property
    def text(self) -> str:
        """``accuracy``, ``mIoU``, ``NME``."""
        return metric_name(self.name)

    @property
    def points(self) -> str:
        """In what a difference is read: points of the percentage, or the metric's own unit."""
        return f"points of {self.text}" if self.percent else f"units of {self.text}"

    @property
    def legend(self) -> str:
        """``mIoU in %``, ``NME in %, lower is better``."""
        unit = " in %" if self.percent else ""
        return f"{self.text}{unit}" + ("" if self.higher_is_better else ", lower is better")

    def as_dict(self) -> dict[str, Any]:
        """For a result's file; :func:`headline_of_result` reads it back."""
        return asdict(self)


def headline_of_task(task: Task) -> Headline:
    """Of a task."""
    return Headline(task.headline, task.higher_is_better, task.percent)


def headline_of_result(result: Mapping[str, Any]) -> Headline:
    """Of a result's file; those of classification once named none."""
    return Headline(**result["metric"]) if "metric" in result else Headline()
