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
from agents.reporting import metric_words, predictions_of, predictions_title
from agents.session import BaseSession
from repfusion_env import plot_style as style
from repfusion_env.config import ExperimentConfig
from repfusion_env.data.unreadable import unreadable_images
from repfusion_env.figures import save_figure
from repfusion_env.progress import Progress
from repfusion_env.runs import Run, writing
from repfusion_env.weights import save_weights

METRICS = "evaluation/"
PROBE = "evaluation/linear_probe_accuracy"
LOSSES = {"student/task_loss": "task loss", "student/contrastive_loss": "NT-Xent"}


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

    def close(self) -> None:
        """See :class:`BaseSession`: images of steps that will not come."""
        self.trainer.parts.train.close()

    def log(self, step: int, progress: Progress) -> None:
        """Read the device's metrics and write one row."""
        metrics = self.trainer.drain_metrics() | self.speed(step)
        self.run.log(step, self.decisions(step), metrics)
        shown = {"loss": sum(metrics.get(tag, 0.0) for tag in LOSSES)}
        if self.trainer.task is not None:
            score = self.trainer.task.score
            shown[score] = metrics[f"student/{score}"]
        progress.update(self.decisions(step), **shown)

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure the student on held-out images and log the outcome, by tag.

        A linear probe where the images have labels, the task's metric where the student has a head;
        empty where there is neither.
        """
        trainer, found, figures = self.trainer, {}, {}
        if trainer.parts.train.labelled:
            found[PROBE] = linear_probe_accuracy(trainer, self.config.evaluation.probe_images)
        if trainer.task is not None:
            metrics = trainer.heldout_metrics()
            found |= {f"{METRICS}{name}": value for name, value in metrics.items()}
            title = f"after {self.decisions(step):,} images"
            figures["evaluation/predictions"] = predictions_of(trainer, trainer.task, title)
        logged = self.run.metrics()
        before = [logged[tag][logged["step"] == step] for tag in found if tag in logged]
        if found and not any(np.isfinite(values).any() for values in before):
            self.run.log(step, self.decisions(step), found, figures=figures)
        return found

    def finish(self, step: int) -> None:
        """Evaluate, write weights, figure and summary, and print where they are.

        The summary is written last: where there is one, the run is complete.
        """
        seconds, decisions = self.seconds, self.decisions(step)
        found = self.evaluate(step)
        task = self.trainer.task
        student: dict[str, Any] = {"linear_probe_accuracy": found.pop(PROBE, None)}
        if task is not None:
            metrics = {tag.removeprefix(METRICS): value for tag, value in found.items()}
            student |= {"headline": task.headline, "metrics": metrics}
            if "accuracy" in metrics:
                student["accuracy"] = metrics["accuracy"]
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
            **unreadable_images(self.trainer.parts.train, self.trainer.parts.heldout),
        }
        folder = self.run.folder
        with writing(folder):
            kept = self.trainer.evaluation_student.backbone
            save_weights(nn.ModuleDict({"backbone": kept}), folder / "student.safetensors")
            save_figure(self._figure(student["linear_probe_accuracy"]), self.run.figure_path)
            if task is not None:
                heldout = len(self.trainer.parts.heldout)
                title = predictions_title(self.run, task, student["metrics"], heldout)
                save_figure(predictions_of(self.trainer, task, title), folder / "predictions.png")
        self.run.write_summary(summary)
        self._print(summary)

    def _figure(self, probed: float | None) -> Figure:
        """The loss over the run, and where there are labels the linear probe's accuracy."""
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
        style.label_axes(axes, "Training loss", "images shown", "loss")
        if probed is not None:
            style.right_title(axes, f"linear probe {probed:.1%}", style.MUTED)
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
        student, task, words = summary["student"], self.trainer.task, []
        if student["linear_probe_accuracy"] is not None:
            words.append(f"linear probe accuracy {student['linear_probe_accuracy']:.1%}")
        if task is not None:
            own = metric_words(task, student["metrics"])
            words.append(f"its own head: {own}" if words else own)
        left = ["summary.json", "summary.png", *(["predictions.png"] if task is not None else [])]
        left += ["student.safetensors", "metrics.jsonl"]
        lines = {
            "student": "; ".join(words) or "no labels to probe it with",
            "speed": f"{summary['decisions_per_second']:,.0f} images/s, {summary['seconds']:.0f} s",
            "run": f"{folder}  ({', '.join(left)})",
            "curves": f"tensorboard --logdir {shlex.quote(str(folder.parent))}",
            "again": again,
        }
        for name, text in lines.items():
            print(f"{name + ':':9}{text}")
