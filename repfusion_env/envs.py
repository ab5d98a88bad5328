"""The environments: torch-native ``RepFusionVectorEnv`` and its one-lane numpy ``RepFusionEnv``."""

from repfusion_env.single_env import RepFusionEnv
from repfusion_env.vector_env import RepFusionVectorEnv

__all__ = ["RepFusionEnv", "RepFusionVectorEnv"]
