from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler, UNet2DModel

import repfusion_env  # noqa: F401  (registers the environment)
from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import TeacherError, describe_teacher, load_teacher
from repfusion_env.teachers.reading.noise_process import process_of

LAYER = "mid_block.resnets.1.conv2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("edm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DModel(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            num_class_embeds=4,
        ).save_pretrained(made)
    return made


def teacher_of(folder: Path, scheduler: dict[str, Any] | None = None, **options: Any) -> Any:
    path = folder / "scheduler_config.json"
    path.unlink(missing_ok=True)
    if scheduler is not None:
        path.write_text(json.dumps(scheduler))
    config = TeacherConfig(family="edm", model=str(folder), options=options)
    return load_teacher(config, device="cpu")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_it_sees_and_is_told_what_the_scheduler_of_diffusers_says(folder, schedule, prediction):
    settings = {
        "sigma_min": 0.01,
        "sigma_max": 50.0,
        "sigma_data": 0.7,
        "sigma_schedule": schedule,
        "num_train_timesteps": 40,
        "prediction_type": prediction,
    }
    scheduler = EDMEulerScheduler(**settings)
    scheduler.set_timesteps(40)
    teacher = teacher_of(folder, {"_class_name": "EDMEulerScheduler", **settings})
    generator = torch.Generator().manual_seed(0)
    images, noise, output = torch.randn(3, 4, 1, 16, 16, generator=generator)
    timesteps = torch.tensor([0, 5, 20, 39])
    sigmas = scheduler.sigmas[:-1].flip(0)[timesteps][:, None, None, None]
    inputs = teacher.add_noise(teacher.encode(images), noise, timesteps)
    noisy = images + sigmas * noise
    torch.testing.assert_close(
        inputs, scheduler.precondition_inputs(noisy, sigmas), rtol=1e-5, atol=1e-5
    )
    told = scheduler.timesteps.flip(0)[timesteps]
    torch.testing.assert_close(teacher.process.conditions(timesteps), told, rtol=1e-5, atol=1e-6)
    found = teacher.process.estimate_clean(inputs, output, timesteps) * 0.7
    expected = scheduler.precondition_outputs(noisy, output, sigmas)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ratios = (0.7 / sigmas.flatten()) ** 2
    torch.testing.assert_close(teacher.snr(timesteps), ratios, rtol=1e-4, atol=0)
    # The other families read the same folder alike.
    process = process_of({"_class_name": "EDMEulerScheduler", **settings}, "some")
    assert torch.equal(process.spread, teacher.process.spread)
    assert torch.equal(process.condition, teacher.process.condition)
    assert process.prediction == teacher.process.prediction


def test_without_a_scheduler_it_follows_the_formulas_of_the_paper(folder):
    options = {"sigma_min": 0.05, "sigma_max": 20.0, "sigma_data": 0.4, "rho": 5.0}
    teacher = teacher_of(folder, timesteps=11, **options)
    assert (teacher.num_timesteps, len(teacher.process)) == (11, 11)
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 1, 1, 4, 4, generator=generator, dtype=torch.float64)
    for step in (0, 4, 10):
        # Equation 5, counted from the lowest level, and the EDM column of table 1.
        sigma = (0.05**0.2 + step / 10 * (20**0.2 - 0.05**0.2)) ** 5
        c_in = 1 / math.sqrt(sigma**2 + 0.4**2)
        c_skip, c_out = (0.4 * c_in) ** 2, sigma * 0.4 * c_in
        timestep = torch.tensor([step])
        inputs = teacher.add_noise(teacher.encode(image), noise, timestep)
        torch.testing.assert_close(inputs, c_in * (image + sigma * noise), rtol=0, atol=1e-6)
        assert float(teacher.process.conditions(timestep)) == pytest.approx(math.log(sigma) / 4)
        # Equation 8: what the network must give for the clean image.
        target = (image - c_skip * (image + sigma * noise)) / c_out
        clean = teacher.process.estimate_clean(inputs, target, timestep) * 0.4
        torch.testing.assert_close(clean, image, rtol=0, atol=1e-5)


def test_options_stand_over_the_schedulers_settings(folder):
    scheduler = {"_class_name": "EDMEulerScheduler", "sigma_max": 50.0, "sigma_data": 0.7}
    teacher = teacher_of(folder, scheduler, sigma_max=10, timesteps=20)
    ends = teacher.snr(torch.tensor([0, 19]))
    torch.testing.assert_close(ends, (0.7 / torch.tensor([0.002, 10.0])) ** 2)


def test_consistency_models_are_told_a_thousand_times_as_much():
    scheduler = CMStochasticIterativeScheduler()
    scheduler.set_timesteps(40)
    process = process_of({"_class_name": "CMStochasticIterativeScheduler"}, "some")
    told = process.conditions(torch.arange(40))
    torch.testing.assert_close(told, scheduler.timesteps.flip(0).float(), rtol=1e-4, atol=1e-3)
    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for index in (1, 20):
        scaled = scheduler.scale_model_input(
            noise * scheduler.sigmas[-2 - index], scheduler.timesteps[-1 - index]
        )
        mine = process.add_noise(torch.zeros_like(noise), noise, torch.tensor([index]))
        torch.testing.assert_close(mine, scaled, rtol=1e-4, atol=1e-5)
        scheduler._step_index = None


def test_features_are_those_of_diffusers_at_the_same_level(folder):
    teacher = teacher_of(folder)
    unet = UNet2DModel.from_pretrained(folder).eval()
    unet.class_embedding = None
    expected = []
    unet.get_submodule(LAYER).register_forward_hook(lambda *given: expected.append(given[2]))
    timesteps = torch.tensor([0, 500, 999])
    inputs = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        unet(inputs, teacher.process.conditions(timesteps))
    assert teacher.layers == (LAYER,)
    assert torch.equal(teacher.features(inputs, timesteps)[LAYER], expected[0])
    assert teacher.parameters_used < teacher.parameters_all


def test_the_environment_steps_on_it(tiny, folder):
    (folder / "scheduler_config.json").unlink(missing_ok=True)
    teacher = {"family": "edm", "model": str(folder), "standardize_images": 8}
    environment = gym.make_vec("RepFusion-v0", **{**tiny, "teacher": teacher})
    environment.reset(seed=0)
    _, rewards, *_ = environment.step(environment.action_space.sample())
    assert torch.as_tensor(rewards).isfinite().all()
    environment.close()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"sigma_mim": 0.1}, "Did you mean 'sigma_min'?"),
        ({"sigma_min": 0.0}, "sigma_min: 0.0 given; it must be above 0"),
        ({"sigma_max": float("inf")}, "inf given; it must be a number, and finite"),
        ({"sigma_min": 90.0}, "it must be below sigma_max, which is 80.0"),
        ({"timesteps": 2.5}, "timesteps: 2.5 given; it must be a whole number"),
        ({"sigma_schedule": "linear"}, "allowed: 'karras', 'exponential'"),
    ],
)
def test_wrong_options_are_refused(folder, options, part):
    with pytest.raises(TeacherError) as caught:
        teacher_of(folder, **options)
    assert part in str(caught.value)


def test_another_scheduler_is_refused_and_a_card_needs_no_weights(folder, tmp_path):
    with pytest.raises(TeacherError, match="its scheduler is a DDPMScheduler; family 'edm' takes"):
        teacher_of(folder, {"_class_name": "DDPMScheduler"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    config = TeacherConfig(family="edm", model=str(tmp_path), options={"timesteps": 30})
    card = describe_teacher(config)
    assert (card.num_timesteps, card.channels, card.image_size) == (30, 1, 16)
    assert LAYER in card.layers_available
