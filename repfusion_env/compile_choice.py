"""What of a run is compiled, and for how many images.

Shape letters: N lanes of this rank, B samples of an update, G lanes per image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from repfusion_env.compiling import CompiledBackbone
from repfusion_env.config import ExperimentConfig
from repfusion_env.groups import one_look
from repfusion_env.student import inference_maps
from repfusion_env.teachers.reading.network import NetworkTeacher

if TYPE_CHECKING:
    from repfusion_env.trainer import DistillationTrainer

# Floating-point operations of a run from which `auto` compiles. On a CPU compiling half a
# 36 M-parameter UNet and a ResNet-18 took 50 s and saved 3 to 7 % in bf16, so that it pays after
# half an hour: 2e15 operations at the 0.3e12 per second and core that were measured, on 4 cores.
# A GPU is taken to save a fifth, and to do 2e14 in a second.
WORTHWHILE = {"cpu": 2e15, "cuda": 6e16}


def compile_step(trainer: DistillationTrainer) -> None:
    """Compile the trainer's teacher and student as ``speed`` asks for; or nothing.

    Args:
        trainer: With a new student.
    """
    config, teacher = trainer.config, trainer.parts.teacher
    speed, cuda = config.speed, trainer.device.type == "cuda"
    wanted = speed.compile == "on" or (speed.compile == "auto" and _pays(trainer))
    graphs = speed.cuda_graphs and cuda
    # One of another making runs as it is, whatever its own method ``compile`` does.
    if isinstance(teacher, NetworkTeacher):
        lanes = config.env.num_envs // trainer.ranks.count
        size = min(lanes, config.teacher.batch_size or lanes)
        teacher.compile((size,) if wanted else (), cuda_graphs=graphs)
    if wanted:
        trainer.student.compiled = CompiledBackbone(
            trainer.student.backbone, student_sizes(trainer), cuda_graphs=graphs
        )


def student_sizes(trainer: DistillationTrainer) -> set[int]:
    """Images of a training forward, and of the reward's."""
    lanes = trainer.config.env.num_envs // trainer.ranks.count
    group = trainer.config.env.group_size
    if one_look(lanes, group, trainer.recent.size, trainer.ranks.count):
        return {lanes // group}
    return {max(lanes, trainer.recent.size), lanes}


def _pays(trainer: DistillationTrainer) -> bool:
    """Whether the run is long enough; by counting, so that a resumed run decides alike."""
    kind = trainer.device.type
    # In fp32 a CPU's compiled student was 7 % slower, its convolutions being all it does.
    if kind == "cpu" and "fp32" in (trainer.config.teacher.precision, trainer.student.precision):
        return False
    work = decision_flops(trainer) * trainer.config.run.decisions
    return work >= WORTHWHILE.get(kind, float("inf"))


def decision_flops(trainer: DistillationTrainer) -> float:
    """Floating-point operations of one decision: teacher, and student there and back."""
    from torch.utils.flop_counter import FlopCounterMode

    teacher, config = trainer.parts.teacher, trainer.config
    image = torch.zeros(1, *trainer.parts.train.shape, device=trainer.device)
    timestep = torch.zeros(1, dtype=torch.int64, device=trainer.device)
    with FlopCounterMode(display=False) as of_teacher, torch.no_grad():
        teacher.features(teacher.encode(image), timestep)
    with FlopCounterMode(display=False) as of_student, torch.no_grad():
        inference_maps(trainer.student, image)
    # Out of a cache the teacher computes each feature once, which a long run hardly feels.
    looks = _slots(config) if config.cache.store == "off" else 0
    # The backward takes twice the forward.
    passes = 3 * config.optimizer.updates + (config.reward.student == "updated")
    return looks * of_teacher.get_total_flops() + passes * of_student.get_total_flops()


def _slots(config: ExperimentConfig) -> int:
    chosen = config.env.set_size if config.env.action == "timestep_set" else 1
    return chosen + len(config.fusion.timesteps)
