"""The three commands on a finished run: what they write, what they refuse, and loading it back."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from repfusion_env import export, finetune, load_config, probe
from repfusion_env.stage2 import embed, load_banks, load_student
from repfusion_env.stage2.model_card import model_card
from students import load_backbone


def test_the_loaded_student_gives_the_runs_features(finished_run, student, banks):
    saved = load_student(finished_run)
    assert (saved.in_channels, saved.image_size, saved.name) == (1, 16, "small_cnn")
    images = banks[1].pixels(torch.arange(60))
    with torch.no_grad():
        expected = saved.backbone(images)["stage3"].mean((2, 3))
    assert not saved.backbone.training
    assert torch.allclose(embed(saved.backbone, banks[1], batch_size=7), expected, atol=1e-6)
    for name, value in student.state_dict().items():
        assert torch.equal(saved.backbone.state_dict()[name], value)


def test_an_exported_student_is_the_same_backbone(finished_run, tmp_path, banks):
    out = tmp_path / "exported"
    assert probe.main([str(finished_run), "--labels", "50%", "--repeats", "1"]) == 0
    assert export.main([str(finished_run), "--out", str(out)]) == 0
    backbone = load_backbone(out)
    images = banks[1].pixels(torch.arange(5))
    with torch.no_grad():
        found, expected = backbone(images), load_student(finished_run).backbone(images)
    assert all(torch.equal(found[stage], expected[stage]) for stage in expected)
    card = (out / "README.md").read_text()
    measured = json.loads((finished_run / "probe.json").read_text())["rows"][0]["linear"]
    for fact in ("load_backbone", "digits", "6,400", "87.5 %", "hint"):
        assert fact in card
    assert f"{100 * measured['accuracy']:.1f}" in card


def test_students_alone_load_an_exported_backbone(finished_run, tmp_path):
    out = tmp_path / "exported"
    assert export.main([str(finished_run), "--out", str(out)]) == 0
    # Imported afresh while the other package cannot be; a new interpreter would take seconds.
    with patch.dict(sys.modules):
        for name in list(sys.modules):
            if name.partition(".")[0] == "students":
                del sys.modules[name]
            elif name.partition(".")[0] == "repfusion_env":
                sys.modules[name] = None
        sys.modules["repfusion_env"] = None
        alone = importlib.import_module("students")
        assert alone.load_backbone is not load_backbone
        maps = alone.load_backbone(out)(torch.zeros(2, 1, 16, 16))
    assert maps["stage3"].shape == (2, 128, 4, 4)


def test_an_export_overwrites_nothing_and_foreign_weights_are_refused(
    finished_run, tmp_path, capsys
):
    out = tmp_path / "exported"
    assert export.main([str(finished_run), "--out", str(out)]) == 0
    assert export.main([str(finished_run), "--out", str(out)]) == 2
    assert "holds something already" in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"in_channels": 3}))
    with pytest.raises(ValueError, match="does not hold the weights of 'small_cnn'"):
        load_backbone(out)
    (out / "config.json").write_text(json.dumps(config | {"student": "antigravity_of_mine:build"}))
    with pytest.raises(ValueError, match="takes own_code=True, if you trust the folder"):
        load_backbone(out)
    with pytest.raises(ValueError, match="cannot be imported"):
        load_backbone(out, own_code=True)
    with pytest.raises(ValueError, match=r"no exported student: it has no config\.json"):
        load_backbone(tmp_path)


def test_finetuning_leaves_what_its_docstring_says(finished_run, capsys):
    words = [str(finished_run), "--labels", "50%", "--steps", "6", "--evaluations", "2"]
    (finished_run / "finetune-50pct").mkdir()  # what a kill before the first file leaves
    assert finetune.main(words) == 0
    folder = finished_run / "finetune-50pct"
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert summary["labelled_images"] == 48
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[-1]["accuracy"] == summary["accuracy"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert finetune.main(words) == 2
    assert "exists already; go on with it by --resume" in capsys.readouterr().err
    assert finetune.main([*words, "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert finetune.main([*words[:3], "--resume", "--steps", "7"]) == 2
    assert "steps was 6, now 7" in capsys.readouterr().err


def test_the_control_starts_from_other_weights(finished_run, student):
    words = [str(finished_run), "--labels", "48", "--steps", "1", "--frozen", "--from-scratch"]
    assert finetune.main(words) == 0
    from safetensors.torch import load_file

    found = load_file(finished_run / "finetune-48-scratch" / "model.safetensors")
    own = student.state_dict()["stage1.0.weight"]
    assert found["backbone.stage1.0.weight"].shape == own.shape
    assert not torch.equal(found["backbone.stage1.0.weight"], own)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("summary.json", "is not finished: it has no summary.json"),
        ("config.yaml", "is no run folder: it has no config.yaml"),
    ],
)
def test_unfinished_and_foreign_folders_are_refused(finished_run, capsys, change, sentence):
    (finished_run / change).unlink()
    for command in (probe.main, finetune.main):
        assert command([str(finished_run)]) == 2
        assert sentence in capsys.readouterr().err


def test_a_misspelt_folder_or_option_is_told_the_closest(finished_run, capsys):
    assert probe.main([str(finished_run).replace("reinforce", "reinfroce")]) == 2
    assert "Did you mean 'digits-reinforce'?" in capsys.readouterr().err
    assert finetune.main([str(finished_run), "--lables", "10%"]) == 2
    assert "Did you mean '--labels'?" in capsys.readouterr().err


def test_a_run_on_pseudo_labels_is_probed_on_the_labels_that_the_images_have(finished_run, banks):
    text = (finished_run / "config.yaml").read_text()
    assert "labels: given" in text
    (finished_run / "config.yaml").write_text(text.replace("labels: given", "labels: clusters"))
    train, _ = load_banks(load_student(finished_run).config)
    assert torch.equal(train.labels, banks[0].labels)
    assert train.classes == banks[0].classes


def test_images_without_labels_are_refused(tmp_path):
    for index in range(3):
        Image.new("L", (16, 16), index).save(tmp_path / f"{index}.png")
    config = load_config("own_images", {"data.path": str(tmp_path)})
    with pytest.raises(ValueError, match="has no labels, so there is nothing to probe"):
        load_banks(config)


def test_numbers_that_are_none_are_refused(finished_run, capsys):
    for words in (["--epochs", "nan"], ["--learning-rate", "inf"]):
        assert finetune.main([str(finished_run), *words]) == 2
        assert "given; it must be a number, and finite" in capsys.readouterr().err
    assert probe.main([str(finished_run), "--labels", "1%"]) == 2
    assert "1% of 96 training images is 1; a probe needs 2 or more" in capsys.readouterr().err


def test_the_card_names_no_folder_of_this_machine(finished_run, tmp_path):
    text = (finished_run / "config.yaml").read_text()
    teacher = tmp_path / "private" / "ddpm"
    (finished_run / "config.yaml").write_text(text.replace("model: digits", f"model: {teacher}"))
    saved = load_student(finished_run)
    assert saved.config.teacher.model == str(teacher)
    card = model_card(saved)
    assert "`ddpm`" in card
    assert "private" not in card


def test_weights_of_another_student_are_refused(finished_run):
    text = (finished_run / "config.yaml").read_text().replace("small_cnn", "wideresnet28_2")
    (finished_run / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="does not hold the weights of 'wideresnet28_2'"):
        load_student(finished_run)


def test_nothing_heavy_loads_for_a_refusal(tmp_path):
    program = (
        "import sys\nfrom repfusion_env import export, finetune, probe\n"
        f"assert finetune.main([{str(tmp_path / 'none')!r}]) == 2\n"
        f"assert probe.main([{str(tmp_path / 'none')!r}, '--labels', '0%']) == 2\n"
        f"assert export.main([{str(tmp_path / 'none')!r}, '--out', 'x']) == 2\n"
        "assert not {'torch', 'sklearn', 'matplotlib', 'diffusers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
