"""The session of a control: logging, checkpoints, summary, as of the agents."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from agents.command_line import script_of
from agents.controls import ControlTrainer
from agents.evaluation import linear_probe_accuracy
from agents.session import BaseSession
from repfusion_env import plot_style as style
from repfusion_env.config import ExperimentConfig
from repfusion_env.figures import save_figure
from repfusion_env.progress import Progress
from repfusion_env.runs import Run, writing
from repfusion_env.weights import save_weights

PROBE = "evaluation/linear_probe_accuracy"
LOSSES = {"student/task_loss": "cross-entropy", "student/contrastive_loss": "NT-Xent"}


class ControlSession(BaseSession):
    """What the training of a control needs around it.

    Attributes:
        trainer: The student and all that trains it.
    """

    @staticmethod
    def build(config: ExperimentConfig, settings: Mapping[str, str]) -> ControlTrainer:
        """The trainer, as the command's own options ask for it."""
        return ControlTrainer(
            config,
            settings["method"],
            labels=settings["labels"],
            augment=settings["augment"] == "true",
        )

    def __init__(
        self, run: Run, built: ControlTrainer, restored: tuple[int, dict[str, Any]] | None
    ) -> None:
        """See :class:`BaseSession`."""
        super().__init__(run, built, restored)
        self.trainer = built
        if restored is not None:
            built.load_state_dict(restored[1]["trainer"])

    def log(self, step: int, progress: Progress) -> None:
        """Read the device's metrics and write one row."""
        metrics = self.trainer.drain_metrics() | self.speed(step)
        self.run.log(step, self.decisions(step), metrics)
        shown = {"loss": sum(metrics.get(tag, 0.0) for tag in LOSSES)}
        if "student/accuracy" in metrics:
            shown["accuracy"] = metrics["student/accuracy"]
        progress.update(self.decisions(step), **shown)

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure the student on held-out images and log the outcome, by tag.

        Empty where the images have no labels.
        """
        if not self.trainer.parts.train.labelled:
            return {}
        found = {PROBE: linear_probe_accuracy(self.trainer, self.config.evaluation.probe_images)}
        accuracy = self.trainer.heldout_accuracy()
        if accuracy is not None:
            found["evaluation/accuracy"] = accuracy
        logged = self.run.metrics()
        before = logged.get(PROBE)
        if before is None or not np.isfinite(before[logged["step"] == step]).any():
            self.run.log(step, self.decisions(step), found)
        return found

    def finish(self, step: int) -> None:
        """Evaluate, write weights, figure and summary, and print where they are.

        The summary is written last: where there is one, the run is complete.
        """
        seconds, decisions = self.seconds, self.decisions(step)
        found = self.evaluate(step)
        student = {"linear_probe_accuracy": found.get(PROBE)}
        if "evaluation/accuracy" in found:
            student["accuracy"] = found["evaluation/accuracy"]
        summary = {
            "agent": self.run.agent,
            "reward": None,
            "student": student,
            "labels": self.trainer.labels,
            "heldout_images": len(self.trainer.parts.heldout),
            "decisions": decisions,
            "decisions_per_second": decisions / seconds,
            "seconds": seconds,
            "teacher_evaluations": {"setup": 0, "training": 0},
        }
        folder = self.run.folder
        with writing(folder):
            kept = self.trainer.evaluation_student.backbone
            save_weights(nn.ModuleDict({"backbone": kept}), folder / "student.safetensors")
            save_figure(self._figure(found), self.run.figure_path)
        self.run.write_summary(summary)
        self._print(summary)

    def _figure(self, found: Mapping[str, float]) -> Figure:
        """The loss over the run, and where there are labels the accuracy."""
        columns = self.run.metrics()
        drawn = [(tag, name) for tag, name in LOSSES.items() if tag in columns]
        figure = Figure(figsize=(7.2, 3.6), dpi=150, facecolor=style.PAPER)
        axes = figure.add_axes((0.09, 0.15, 0.87, 0.67))
        style.style_axes(axes)
        for (tag, name), color in zip(drawn, (style.BLUE, style.ORANGE), strict=False):
            known = np.isfinite(columns[tag])
            axes.plot(
                columns["decisions"][known], columns[tag][known], color=color, label=name, lw=1.6
            )
        axes.set_xlim(0, columns["decisions"][-1])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        style.label_axes(axes, "Training loss", "images shown", "nats")
        if PROBE in found:
            style.right_title(axes, f"linear probe {found[PROBE]:.1%}", style.MUTED)
        axes.legend(frameon=False, fontsize=8, labelcolor=style.INK)
        heading = figure.text(
            0.09, 0.94, self.run.folder.name, fontsize=11, color=style.INK, fontweight="bold"
        )
        heading.set_parse_math(False)
        return figure

    def _print(self, summary: Mapping[str, Any]) -> None:
        settings = " ".join(f"--{name} {value}" for name, value in self.run.settings.items())
        folder = self.run.folder
        again = f"python -m agents.{script_of(self.run.agent)} {settings} --config "
        again += shlex.quote(str(folder / "config.yaml"))
        if self.config.run.name is not None:
            again += " --run.name null"  # that name is taken
        student, words = summary["student"], "no labels to probe it with"
        if student["linear_probe_accuracy"] is not None:
            words = f"linear probe accuracy {student['linear_probe_accuracy']:.1%}"
        if "accuracy" in student:
            words += f", accuracy of its own head {student['accuracy']:.1%}"
        lines = {
            "student": words,
            "speed": f"{summary['decisions_per_second']:,.0f} images/s, {summary['seconds']:.0f} s",
            "run": f"{folder}  (summary.json, summary.png, student.safetensors, metrics.jsonl)",
            "curves": f"tensorboard --logdir {shlex.quote(str(folder.parent))}",
            "again": again,
        }
        for name, text in lines.items():
            print(f"{name + ':':9}{text}")
