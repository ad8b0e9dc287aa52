"""The operations that decide how fast SelfOcc is; nothing here knows the rest of the repository.

`backend("auto" | "torch" | "triton")` chooses how they are computed; from the shell,
SELFOCC_KERNELS=... does.
"""

from kernels.alpha import ALPHAS
from kernels.composite import composite
from kernels.decode import decode
from kernels.deformable import deformable_attention, deformable_sampling
from kernels.dispatch import backend
from kernels.node_losses import node_losses
from kernels.proposals import epipolar_photometric, sample_image
from kernels.render import Rendering, render_photometric, render_rays
from kernels.ssim import least_photometric, ssim, ssim_l1
from kernels.trilinear import sample_maps

__all__ = [
    "ALPHAS",
    "Rendering",
    "backend",
    "composite",
    "decode",
    "deformable_attention",
    "deformable_sampling",
    "epipolar_photometric",
    "least_photometric",
    "node_losses",
    "render_photometric",
    "render_rays",
    "sample_image",
    "sample_maps",
    "ssim",
    "ssim_l1",
]
