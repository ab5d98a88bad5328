"""Teacher features that are kept instead of computed again; see ``docs/cache.md``."""

from __future__ import annotations

from repfusion_env.feature_cache.cache import FeatureCache, Keys
from repfusion_env.feature_cache.files import CacheWarning
from repfusion_env.feature_cache.identity import Identity
from repfusion_env.feature_cache.opening import FeatureCaches

__all__ = ["CacheWarning", "FeatureCache", "FeatureCaches", "Identity", "Keys"]
