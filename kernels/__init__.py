"""The operations that decide how fast SelfOcc is; nothing here knows the rest of the repository.

`backend("auto" | "torch")` chooses how they are computed, SELFOCC_KERNELS=... does from the shell.
"""

import os

from torch import Tensor

from kernels.compositing import (
    ALPHAS,
    Rendering,
    composite,
)
from kernels.compositing import render_rays as _render_rays
from kernels.deformable import deformable_sampling
from kernels.differences import node_gradients, node_losses, node_second_differences
from kernels.photometric import epipolar_photometric as _epipolar_photometric
from kernels.photometric import sample_image, ssim, ssim_l1

__all__ = [
    "ALPHAS",
    "Rendering",
    "backend",
    "composite",
    "deformable_sampling",
    "epipolar_photometric",
    "node_gradients",
    "node_losses",
    "node_second_differences",
    "render_rays",
    "sample_image",
    "ssim",
    "ssim_l1",
]


def backend(name: str | None = None) -> str:
    """Choose the implementation of the kernels, or only ask; returns the one in use, "torch".

    Raises ValueError for an unknown name and RuntimeError for "triton", which does not exist yet.
    """
    if name == "triton":
        raise RuntimeError('the Triton kernels are not there yet; use "auto" or "torch"')
    if name not in (None, "auto", "torch"):
        raise ValueError(f'backend must be "auto" or "torch", got {name!r}')
    return "torch"


backend(os.environ.get("SELFOCC_KERNELS", "auto"))


def render_rays(
    volume: Tensor,
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    inv_s: Tensor,
    *,
    box: tuple[float, float, float, float, float, float],
    samples: int,
    jitter: Tensor | None = None,
    anneal: float = 1.0,
    alpha: str = "neus",
    classes: int = 0,
    backdrop: bool = False,
    keep_samples: bool = False,
    normals: bool = False,
) -> Rendering:
    """Composite a volume along rays (spec sections 6, 8 and 9). Differentiable in volume and inv_s.

    Args:
        volume: [B, 1 + colours + classes, H, W, Z] at the nodes of `box`, two or more an axis:
            SDF in metres, colour features, semantic logits.
        origins, directions: [B, R, 3] in the volume frame, metres; directions are unit.
        near, far: [B, R] distances between which `samples` intervals lie.
        inv_s: 0-d, sharpness of the surface in 1/metre.
        box: x0, y0, z0, x1, y1, z1 in metres.
        jitter: [B, R] in [0, 1), moves all samples of a ray; None leaves the intervals equal.
        anneal: share of the full cosine in NeuS alpha, 0 to 1.
        alpha: a name in `ALPHAS`.
        backdrop: the last interval is opaque: what nothing stops is seen at the far end.
        keep_samples: also return weights, mids, deltas, sdf and the eikonal sums.
        normals: also return composited normals.

    Raises ValueError naming the argument at fault.
    """
    rays = near.shape
    nodes = volume.shape[2:]
    if volume.ndim != 5 or min(nodes) < 2:
        raise ValueError(
            f"volume must be [B, C, H, W, Z], two nodes or more an axis, got {[*volume.shape]}"
        )
    if not 0 <= classes < volume.shape[1]:
        raise ValueError(f"classes is {classes}, but the volume has {volume.shape[1]} channels")
    if near.ndim != 2 or near.shape[0] != volume.shape[0]:
        raise ValueError(f"near must be [{volume.shape[0]}, R], got {[*rays]}")
    expected = {
        "origins": (origins, (*rays, 3)),
        "directions": (directions, (*rays, 3)),
        "far": (far, rays),
    }
    if jitter is not None:
        expected["jitter"] = (jitter, rays)
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {[*shape]}, got {[*tensor.shape]}")
    if inv_s.numel() != 1:
        raise ValueError(f"inv_s must hold one number, got {[*inv_s.shape]}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if alpha not in ALPHAS:
        raise ValueError(f"alpha must be one of {', '.join(ALPHAS)}, got {alpha!r}")
    return _render_rays(
        volume,
        origins,
        directions,
        near,
        far,
        inv_s.reshape(()),
        box=box,
        samples=samples,
        jitter=jitter,
        anneal=anneal,
        alpha=alpha,
        classes=classes,
        backdrop=backdrop,
        keep_samples=keep_samples,
        normals=normals,
    )


def epipolar_photometric(
    weights: Tensor,
    depths: Tensor,
    pixels: Tensor,
    target: Tensor,
    sources: Tensor,
    projections: Tensor,
    *,
    combine: bool = False,
    published_pixels: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Photometric difference over all depth proposals of rays (spec section 11).

    Differentiable in the weights only.

    Args:
        weights: [B, N, R, S] of the proposals.
        depths: [B, N, R, S] their z-depths in metres.
        pixels: [R, 2] (u, v) of the rays in the target images.
        target: [B, N, R, 3] target colours there.
        sources: [B, K, N, 3, h, w] images of K other time stamps.
        projections: [B, K, N, 4, 4], target (u d, v d, d, 1) to source (u d, v d, d, 1).
        combine: average over the sources proposal by proposal instead of returning one result a
        source. published_pixels: read pixel u at index u (w - 1) / w, as the published code does.

    Returns, with one entry in place of K if `combine`: expected absolute difference [B, K, N, R],
    composited source colour [B, K, N, R, 3], and whether any proposal projects into the image [B,
    K, N, R].
    Raises ValueError naming the argument at fault.
    """
    if weights.ndim != 4:
        raise ValueError(f"weights must be [B, N, R, S], got {[*weights.shape]}")
    batch, cameras, rays, _ = weights.shape
    count = sources.shape[1] if sources.ndim == 6 else 0
    expected = {
        "depths": (depths, weights.shape),
        "pixels": (pixels, (rays, 2)),
        "target": (target, (batch, cameras, rays, 3)),
        "sources": (sources, (batch, count, cameras, 3, *sources.shape[-2:])),
        "projections": (projections, (batch, count, cameras, 4, 4)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {[*shape]}, got {[*tensor.shape]}")
    return _epipolar_photometric(
        weights,
        depths,
        pixels,
        target,
        sources,
        projections,
        combine=combine,
        published_pixels=published_pixels,
    )
