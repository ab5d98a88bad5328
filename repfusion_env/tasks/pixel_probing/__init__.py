"""Few-shot segmentation on a teacher's features: every pixel classified by itself.

Baranchuk et al., "Label-Efficient Semantic Segmentation with Diffusion Models", ICLR 2022
(arXiv:2112.03126): a teacher's maps at several timesteps and layers, enlarged to the image, are one
long vector for each pixel; an ensemble of small classifiers, trained on the pixels of a few
labelled images, votes. See ``docs/pixel_probe.md``.
"""

from repfusion_env.tasks.pixel_probing.measuring import PixelProbeResult, measure
from repfusion_env.tasks.pixel_probing.settings import PixelProbeSettings

__all__ = ["PixelProbeResult", "PixelProbeSettings", "measure"]
