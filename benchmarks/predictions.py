"""What a finished run's student says of held-out images, drawn without the images themselves.

    python -m benchmarks.predictions runs/RUN --out predictions.png

For data sets whose terms forbid showing their photographs: masks, points and boxes stand on paper,
ground truth above and predictions below. The run's own ``predictions.png`` shows the images too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from agents.reporting import metric_words
from repfusion_env.config_loading import load_config
from repfusion_env.envs import RepFusionVectorEnv
from repfusion_env.figures import save_figure
from repfusion_env.prediction_figure import draw_predictions, prediction_figure
from repfusion_env.stage2.run_folder import check_finished

SUMMARY = "Draw what a finished run's student says of held-out images, without the images."


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=SUMMARY)
    parser.add_argument("run", help="folder of a finished run of any agent")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--count", type=int, default=6, help="held-out images (default: 6)")
    parser.add_argument("--title", help="stands above (default: what the metric says)")
    given = parser.parse_args()
    draw(given.run, given.out, given.count, given.title)


def draw(run: str, out: Path, count: int, title: str | None) -> None:
    """Load the run's student, measure it on all held-out images, and draw ``count`` of them."""
    from safetensors.torch import load_file

    folder = check_finished(run)
    # Nothing is distilled here, so statistics of the teacher's features are wanted of few images.
    config = load_config(folder / "config.yaml", {"teacher.standardize_images": 1})
    trainer = RepFusionVectorEnv(config=config).trainer
    trainer.student.load_state_dict(load_file(folder / "student.safetensors"))
    task, bank = trainer.task, trainer.parts.heldout
    found = trainer.heldout_metrics()
    headline = metric_words(task, {task.headline: found[task.headline]}).partition(",")[0]
    shown = draw_predictions(
        task,
        lambda images: trainer.outputs(images),
        bank,
        count,
        photographs=False,
    )
    words = title or f"{headline} on {len(bank):,} held-out images"
    save_figure(prediction_figure(shown, words), out)
    print(f"wrote '{out}': {words}")


if __name__ == "__main__":
    main()
