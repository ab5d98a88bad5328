from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import TeacherError, load_teacher
from repfusion_env.teachers.reading.noise_process import NoiseProcess, noise_levels, process_of

# Of each only what makes it different; all of them are built from their defaults.
PLAIN = [
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
]
SOLVERS = [
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
]
SIGMAS = [
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
]
SILENT = ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "RePaintScheduler"]
FLOWS = [
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
]
OTHERS = [
    "CMStochasticIterativeScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "ScoreSdeVeScheduler",
]
TIMESTEPS = torch.tensor([0, 7, 500, 999])


def process(name: str, **settings: Any) -> NoiseProcess:
    return process_of({"_class_name": name, **settings}, "some")


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 3, 2, 2, generator=generator)
    return clean, noise


def test_every_scheduler_of_diffusers_is_known_here_or_refused_by_name():
    known = {*PLAIN, *SOLVERS, *SIGMAS, *SILENT, *FLOWS, *OTHERS}
    accepted = set()
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
            try:
                process(name)
                accepted.add(name)
            except TeacherError as error:
                assert name in str(error)
                assert "\n" not in str(error)
    # A later release may have more of them; none of these may be lost.
    assert known <= accepted


@pytest.mark.parametrize("name", PLAIN)
def test_noise_is_that_of_the_scheduler(name):
    ours, (clean, noise) = process(name), pair()
    theirs = getattr(diffusers, name)().add_noise(clean, noise, TIMESTEPS)
    torch.testing.assert_close(ours.add_noise(clean, noise, TIMESTEPS), theirs, rtol=0, atol=1e-6)
    assert ours.conditions(TIMESTEPS).equal(TIMESTEPS)
    assert (ours.ratio.diff() < 0).all()  # 0 is the clean end


@pytest.mark.parametrize("name", [*SOLVERS, *SIGMAS])
def test_noise_is_that_of_solvers_set_to_all_timesteps(name):
    kind = getattr(diffusers, name)
    # Most can be told to stop at each timestep; the single-step solver leaves out one or two.
    spacing = {"timestep_spacing": "trailing"} if name != "DPMSolverSinglestepScheduler" else {}
    scheduler = kind(**spacing)
    scheduler.set_timesteps(1000)
    ours, (clean, noise) = process(name), pair()
    for lane, timestep in enumerate(TIMESTEPS):
        one = slice(lane, lane + 1)
        told = scheduler.timesteps[(scheduler.timesteps - timestep).abs().argmin()].reshape(1)
        assert abs(float(told) - float(timestep)) <= (0 if spacing else 1)
        theirs = scheduler.add_noise(clean[one], noise[one], told)
        if name in SIGMAS:
            # Theirs is in units of the clean image; the network sees it brought to unit variance.
            scheduler._step_index = None
            theirs = scheduler.scale_model_input(theirs, told[0])
        mine = ours.add_noise(clean[one], noise[one], told.long())
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SILENT)
def test_schedulers_without_noise_of_their_own_give_their_alphas(name):
    products = getattr(diffusers, name)().alphas_cumprod
    torch.testing.assert_close(process(name).signal, products.sqrt())
    torch.testing.assert_close(process(name).spread, (1 - products).sqrt())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOWS)
def test_flows_count_from_the_clean_end(name, shift):
    scheduler = getattr(diffusers, name)(shift=shift)
    ours, (clean, noise) = process(name, shift=shift), pair()
    told = ours.conditions(TIMESTEPS)
    for lane in range(4):
        one, scheduler._step_index = slice(lane, lane + 1), None
        theirs = scheduler.scale_noise(clean[one], told[one], noise[one])
        mine = ours.add_noise(clean[one], noise[one], TIMESTEPS[one])
        torch.testing.assert_close(mine, theirs)
    assert (told.diff() > 0).all()
    assert float(told[-1]) == 1000.0
    sigmas = (TIMESTEPS + 1) / 1000
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    torch.testing.assert_close(ours.spread[TIMESTEPS], sigmas)


def test_variance_explodes_as_its_scheduler_says_and_images_lie_in_0_to_1():
    ours, (clean, noise) = process("ScoreSdeVeScheduler"), pair()
    timesteps = torch.tensor([0, 7, 1000, 1999])
    theirs = diffusers.ScoreSdeVeScheduler().add_noise(clean, noise, timesteps)
    torch.testing.assert_close(ours.add_noise(clean, noise, timesteps), theirs, rtol=1e-5, atol=0)
    levels = 0.01 * 134800 ** (timesteps / 1999)
    torch.testing.assert_close(ours.conditions(timesteps), levels, rtol=1e-5, atol=0)
    # Score is the gradient of log N(x; clean, sigma^2) with respect to x.
    inputs = ours.add_noise(clean, noise, timesteps).double().requires_grad_()
    sigma = ours.spread[timesteps].double()[:, None, None, None]
    density = -((inputs - clean) ** 2 / (2 * sigma**2)).sum()
    (score,) = torch.autograd.grad(density, inputs)
    found = ours.estimate_clean(inputs.detach(), score, timesteps)
    torch.testing.assert_close(found, clean.double(), rtol=0, atol=1e-6)
    assert (ours.scale, ours.offset) == (0.5, 0.5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_exact_target_gives_the_clean_image_back(prediction):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False)
    ours = process("DDPMScheduler", prediction_type=prediction)
    (clean, noise), timesteps = pair(), torch.tensor([0, 7, 500, 900])
    inputs = ours.add_noise(clean, noise, timesteps)
    target = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(clean, noise, timesteps),
        "sample": clean,
    }[prediction]
    found = ours.estimate_clean(inputs, target, timesteps)
    torch.testing.assert_close(found, clean, rtol=0, atol=2e-5)
    for lane, timestep in enumerate(timesteps):
        one = slice(lane, lane + 1)
        theirs = scheduler.step(target[one], int(timestep), inputs[one]).pred_original_sample
        torch.testing.assert_close(found[one], theirs, rtol=0, atol=1e-5)


def test_the_velocity_of_a_flow_gives_the_clean_image_back():
    ours, (clean, noise) = process("FlowMatchEulerDiscreteScheduler", shift=3.0), pair()
    inputs = ours.add_noise(clean, noise, TIMESTEPS)
    found = ours.estimate_clean(inputs, noise - clean, TIMESTEPS)
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-6)


def test_the_levels_of_networks_without_noise_are_those_of_ddpm():
    torch.testing.assert_close(
        noise_levels().ratio, process("DDPMScheduler").ratio, rtol=1e-3, atol=0
    )
    assert len(noise_levels()) == 1000
    assert (noise_levels().ratio.diff() < 0).all()


@pytest.mark.parametrize(
    ("name", "settings", "part"),
    [
        ("DDPMScheduler", {"prediction_type": "epsilom"}, "Did you mean 'epsilon'?"),
        ("DDPMScheduler", {"prediction_type": "edm"}, "allowed: epsilon, v_prediction, sample"),
        ("EDMEulerScheduler", {"prediction_type": "sample"}, "allowed: epsilon, v_prediction"),
        ("DDPMSchedular", {}, "Did you mean 'DDPMScheduler'?"),
        ("UNet2DModel", {}, "is no scheduler of diffusers"),
        ("DDPMScheduler", {"beta_schedule": "none"}, "diffusers cannot build a DDPMScheduler"),
        ("IPNDMScheduler", {}, "has no alphas_cumprod"),
    ],
)
def test_unknown_noise_is_refused_in_one_sentence(name, settings, part):
    with pytest.raises(TeacherError) as caught:
        process(name, **settings)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


FOURIER = {
    "time_embedding_type": "fourier",
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "block_out_channels": (32, 32),
    "norm_num_groups": None,
}
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, changes in (("plain", {}), ("fourier", FOURIER)):
        folders[name] = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            UNet2DModel(**{**SMALL, **changes}).save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize(
    ("network", "scheduler", "settings"),
    [
        ("plain", "DDPMScheduler", {"prediction_type": "v_prediction"}),
        ("plain", "DDIMScheduler", {"prediction_type": "sample"}),
        ("plain", "DPMSolverMultistepScheduler", {}),
        ("plain", "EulerDiscreteScheduler", {}),
        ("plain", "FlowMatchEulerDiscreteScheduler", {"shift": 2.0}),
        ("plain", "EDMEulerScheduler", {}),
        ("fourier", "ScoreSdeVeScheduler", {}),
    ],
)
def test_networks_of_every_noise_are_read_as_the_library_reads_them(
    networks, network, scheduler, settings
):
    folder = networks[network]
    written = {"_class_name": scheduler, **settings}
    (folder / "scheduler_config.json").write_text(json.dumps(written))
    unet = UNet2DModel.from_pretrained(folder).eval()
    layers = ("mid_block.resnets.1.conv2", "up_blocks.0.resnets.0")
    expected: dict[str, Tensor] = {}
    for layer in layers:
        unet.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: expected.__setitem__(layer, output)
        )
    teacher: Any = load_teacher(TeacherConfig(model=str(folder), layers=layers), device="cpu")
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    timesteps = torch.tensor([0, 400, 999])
    inputs = teacher.add_noise(teacher.encode(images), torch.ones_like(images), timesteps)
    with torch.no_grad():
        unet(inputs, process_of(written, "some").conditions(timesteps))
    features = teacher.features(inputs, timesteps)
    for layer in layers:
        assert features[layer].isfinite().all()
        assert torch.equal(features[layer], expected[layer])
    if network == "fourier":
        assert torch.equal(teacher.encode(images), images / 2 + 0.5)
