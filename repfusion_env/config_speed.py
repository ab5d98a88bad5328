"""How fast a run is, and what it may take for it; see :mod:`repfusion_env.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import StrictBool, StrictStr

from repfusion_env.config_fields import OffAutoOn, Positive, Store, option


@dataclass(frozen=True)
class SpeedConfig:
    """How the networks are run."""

    shorthand: ClassVar[str] = "compile"
    compile: OffAutoOn = option(
        "off",
        "torch.compile of teacher and student at the step's batch size; auto: where the run is "
        "long enough to pay for it",
    )
    cuda_graphs: StrictBool = option(
        False, "replay what is compiled as CUDA graphs, which saves their launches; CUDA alone"
    )


@dataclass(frozen=True)
class CacheConfig:
    """Teacher features that are kept instead of computed again."""

    shorthand: ClassVar[str] = "store"
    store: Store = option(
        "off",
        "memory: on the device; disk: memory-mapped files under cache.folder, and on the device "
        "too where it fits; auto: memory where it fits, else disk",
    )
    folder: StrictStr = option("cache", "where the files of caches are; processes may share it")
    memory_gib: Positive = option(1.0, "most memory of the device that one cache may take, in GiB")
    disk_gib: Positive = option(20.0, "most that the files of one cache may hold, in GiB")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "how cached features are kept")
