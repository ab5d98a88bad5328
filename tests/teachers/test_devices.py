"""What can be said of a CUDA device without one: tensors that are there, but hold nothing.

Operations between two devices, and those that would wait for a value, are errors to them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from repfusion_env.config import TeacherConfig
from repfusion_env.teachers import load_teacher
from repfusion_env.teachers.reading.offload import CpuOffload
from repfusion_env.teachers.reading.tracing import plain_map, trace

CASES = ["digits", "dit", "pixart_sized", "sd3_dual", "flux_guided"]


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_a_teacher_computes_on_its_device_and_waits_nowhere(transformer_folder, case, offload):
    model = case if case == "digits" else str(transformer_folder(case))
    config = TeacherConfig(model=model, offload=offload, precision="bf16")
    teacher: Any = load_teacher(config, device="cpu")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for part in (teacher.offload, getattr(teacher.encoder, "offload", None)):
        if part is not None:
            part.home = {
                name: nn.Parameter(mode.from_tensor(value.detach()), requires_grad=False)
                for name, value in part.home.items()
            }
    with mode:
        teacher.to("cuda")
        mode.allow_non_fake_inputs = False  # what has stayed on the CPU is an error from here on
        images = torch.empty(2, 1, 16, 16, device="cuda")
        timesteps = torch.empty(2, dtype=torch.int64, device="cuda")
        clean = teacher.encode(images)
        noised = teacher.add_noise(clean, torch.empty_like(clean), timesteps)
        found = teacher.features(noised, timesteps)
    for layer in teacher.layers:
        assert found[layer].device.type == "cuda"
        assert found[layer].shape[:2] == (2, teacher.feature_shapes[layer][0])
    if offload == "cpu":
        assert {value.device.type for value in teacher.network.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_on_a_real_device_the_features_are_those_of_the_cpu(transformer_folder, case, offload):
    model = case if case == "digits" else str(transformer_folder(case))
    here: Any = load_teacher(TeacherConfig(model=model), device="cpu")
    there: Any = load_teacher(TeacherConfig(model=model, offload=offload), device="cuda")
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    timesteps, moved = torch.tensor([3, 700]), images.to("cuda")
    at = timesteps.to("cuda")
    there.features(there.encode(moved), at)  # the first one selects kernels
    torch.cuda.set_sync_debug_mode("error")  # offloaded weights come from pinned memory
    try:
        found = there.features(there.encode(moved), at)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = here.features(here.encode(images), timesteps)
    for layer in here.layers:
        # TF32 and other kernels round otherwise.
        torch.testing.assert_close(found[layer].cpu(), expected[layer], rtol=0.01, atol=0.01)


class Reaching(nn.Module):
    """Uses a weight of its child without calling it, as attentions do, and hands one on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.scale, self.doubled = nn.Parameter(torch.ones(3, 1, 1)), Double()
        self.register_buffer("shift", torch.ones(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        mixed = torch.einsum("nchw,fc->nfhw", images, self.inner.weight[:, :, 0, 0])
        return self.last(mixed * self.doubled(self.scale) + self.shift)


class Double(nn.Module):
    def forward(self, given: Tensor) -> Tensor:
        return 2 * given


def test_offloaded_weights_are_on_the_device_while_their_users_run():
    with torch.device("meta"):
        empty, nothing = Reaching(), torch.empty(1, 3, 4, 4)
    users = trace(empty, lambda net: net(nothing), plain_map, (3, 4, 4)).users
    assert users == {
        "": {"inner.weight", "scale", "shift"},
        "doubled": {"scale"},
        "last": {"last.weight", "last.bias"},
    }

    network = Reaching().requires_grad_(False)
    offload = CpuOffload(network, users)
    there: list[set[str]] = []

    def look(*_given: Any) -> None:
        there.append({name for name, value in network.named_parameters() if value.is_meta})

    def stop(*_given: Any) -> None:
        raise KeyError("a tap")

    for _ in range(2):  # moving again is as moving once
        offload.to("meta")
        assert network.shift.is_meta
        look()
        handle = network.last.register_forward_pre_hook(look)
        network(nothing)
        look()
        handle.remove()
    running = {"inner.weight", "scale", "last.weight", "last.bias"}
    assert there == 2 * [set(), running, set()]
    network.last.register_forward_hook(stop)
    with pytest.raises(KeyError):
        network(nothing)
    look()
    assert there[-1] == set()
