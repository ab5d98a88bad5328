from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from agents.train_bandit import main
from benchmarks.predictions import draw


def test_a_finished_runs_predictions_are_drawn_as_its_metric_says(tiny_teacher, tmp_path, capsys):
    words = {
        **{"--config": "digits_segmentation", "--run.folder": str(tmp_path), "--run.name": "r"},
        **{"--run.decisions": "8", "--env.num_envs": "4", "--optimizer.batch_size": "4"},
        **{"--data.train_limit": "8", "--data.heldout_limit": "6", "--teacher.model": tiny_teacher},
        **{"--teacher.layers": "[mid_block, up_blocks.0]", "--segmentation.head": "linear"},
        **{"--teacher.image_size": "16", "--teacher.standardize_images": "4"},
        **{"--timesteps.values": "[0, 100]"},
    }
    assert main([f"{key}={value}" for key, value in words.items()]) == 0
    draw(str(tmp_path / "r"), tmp_path / "out.png", 3, None)
    assert "mIoU" in capsys.readouterr().out
    picture = np.asarray(Image.open(Path(tmp_path) / "out.png").convert("RGB"))
    # Two rows of three pictures, on paper that is lighter than any scene.
    assert picture.shape[1] > 3 * 240 and 2 * 240 < picture.shape[0] < 3 * 240
