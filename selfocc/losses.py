"""Every loss, a small function each, and `objective`, the sum that is minimised.

Rays lie on a grid of rows x cols, row by row, so that 3 x 3 windows over neighbouring rays make
sense. B samples, N cameras, K source frames, R = rows * cols rays, S samples a ray.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from selfocc import InputError
from selfocc.batch import Batch, Scene, View
from selfocc.config import Config, LossConfig, QuirkConfig
from selfocc.field import shifted_grid_sdf
from selfocc.geometry import image_to_image, node_spacing

UNSEEN = 1e3  # error of a ray that no source sees, larger than any other


def white_level(quirks: QuirkConfig) -> float:
    """What white is in the colours that supervise."""
    return 255 / 256 if quirks.white_256 else 1.0


def photometric_scene(batch: Batch, pixels: Tensor, quirks: QuirkConfig) -> Scene:
    """What depths of the target's rays, through pixels [R, 2], are held against."""
    target, sources = batch.target, batch.sources
    projections = image_to_image(
        target.intrinsics[:, None],
        target.camera_to_volume[:, None],
        sources.intrinsics,
        sources.camera_to_volume,
    )
    white = white_level(quirks)
    colors = white * ray_colors(target.images, pixels, quirks.pixels_over_size)
    return Scene(colors, sources.images if white == 1 else white * sources.images, projections)


def needs_samples(loss: LossConfig) -> bool:
    """Whether a loss reads single samples, so that rendering has to keep them.

    The photometric loss over all depth proposals does not: rendering finds it on the way.
    """
    adaptive = loss.weight_sparsity > 0 and loss.sparsity == "adaptive"
    return adaptive or loss.weight_photometric == 0 or loss.photometric == "reprojection"


def objective(
    config: Config, batch: Batch, volume: Tensor, view: View, scene: Scene, shift: Tensor
) -> dict[str, Tensor]:
    """The weighted losses of a training step by name, 0-d. A loss of weight 0 is left out.

    shift: uniform random numbers that move the grid on which sparsity is measured, as in
    `shifted_grid_sdf`.
    Raises InputError where the data lacks what a loss needs.
    """
    weights, quirks, rays = config.loss, config.quirks, config.render.rays
    losses = {}
    if weights.weight_photometric:
        if weights.photometric == "reprojection":
            error = reprojection_error(
                view.depth, view.pixels, *scene, rays=rays, automask=weights.automask
            )
        else:
            shown = dict(
                combine=weights.photometric == "mvs_combined",
                published_pixels=quirks.pixels_over_size,
            )
            compared = view.compared or kernels.epipolar_photometric(
                view.weights, view.proposals, view.pixels, *scene, **shown
            )
            error = photometric_error(
                compared, view.pixels, *scene[:2], rays=rays, automask=weights.automask, **shown
            )
        losses["photometric"] = weights.weight_photometric * error.mean()
    if weights.weight_color:
        error = color_loss(white_level(quirks) * view.color, scene.target, rays)
        losses["color"] = weights.weight_color * error
    if weights.weight_eikonal or weights.weight_hessian:
        spacing = node_spacing(config.volume.box, config.volume.nodes)
        sdf = volume[:, 0]
        nodes, hessian = kernels.node_losses(sdf, spacing, weights.compact_hessian)
        count = sdf.numel() + view.eikonal.numel() * config.render.samples
        losses["eikonal"] = weights.weight_eikonal * (nodes + view.eikonal.sum()) / count
        losses["hessian"] = weights.weight_hessian * hessian
    if weights.weight_sparsity:
        losses["sparsity"] = weights.weight_sparsity * _sparsity(config, volume, view, shift)
    if weights.weight_sweep:
        losses["sweep"] = weights.weight_sweep * view.swept
    if weights.weight_edge:
        losses["edge"] = weights.weight_edge * edge_loss(view.depth, scene.target, rays)
    if weights.weight_semantic:
        if batch.semantics is None or view.semantics is None:
            raise InputError(
                "the semantic loss needs 2-D labels and field.classes; set loss.weight_semantic=0"
            )
        labels = ray_labels(batch.semantics, view.pixels)
        semantic = {"ce": semantic_ce, "bce": semantic_bce}[weights.semantic]
        losses["semantic"] = weights.weight_semantic * semantic(view.semantics, labels)
    return losses


def _sparsity(config: Config, volume: Tensor, view: View, shift: Tensor) -> Tensor:
    if config.loss.sparsity == "adaptive":
        return adaptive_sparsity(view.sdf, view.proposals, view.depth)
    box, pitch = config.volume.box, config.loss.sparsity_pitch
    shape = tuple(n - 1 for n in config.volume.nodes)
    if pitch is not None:
        shape = tuple(int((box[a + 3] - box[a]) / pitch + 1e-6) for a in (1, 0, 2))
    sdf = shifted_grid_sdf(volume, box, shape, shift)
    kinds = {"soft": soft_sparsity, "smooth": smooth_sparsity, "hard": hard_sparsity}
    return kinds[config.loss.sparsity](sdf)


# Photometric


def ray_colors(images: Tensor, pixels: Tensor, published_pixels: bool = False) -> Tensor:
    """Colours [..., R, C] of images [..., C, h, w] at pixels [R, 2]."""
    flat = kernels.sample_image(images.flatten(0, -4), pixels[None], published_pixels)
    return flat.unflatten(0, images.shape[:-3])


def ray_grid(values: Tensor, rays: tuple[int, int]) -> Tensor:
    """[..., R, C] of rays as images [..., C, rows, cols]."""
    return values.unflatten(-2, rays).movedim(-1, -3)


def photometric_error(
    compared: tuple[Tensor, Tensor, Tensor],
    pixels: Tensor,
    target: Tensor,
    sources: Tensor,
    *,
    rays: tuple[int, int],
    automask: bool = True,
    combine: bool = False,
    published_pixels: bool = False,
) -> Tensor:
    """Error [B, N, R] of all depth proposals, the least over sources and identity (paper, 3.3).

    Args: compared is what `kernels.epipolar_photometric` returns of the proposals; pixels [R, 2],
    target and sources as in `Scene`; automask compares with the sources at the same
    pixel, so that what does not move teaches nothing; combine says that the sources were averaged
    proposal by proposal.
    """
    l1, color, valid = compared
    # the published combined form has no override of unseen rays without masking
    return kernels.least_photometric(
        color,
        l1,
        target,
        rays,
        valid=valid if automask or not combine else None,
        identity=ray_colors(sources, pixels, published_pixels) if automask else None,
        unseen=UNSEEN,
    )


def reprojection_error(
    depth: Tensor,
    pixels: Tensor,
    target: Tensor,
    sources: Tensor,
    projections: Tensor,
    *,
    rays: tuple[int, int],
    automask: bool = True,
) -> Tensor:
    """Error [B, N, R] of one expected depth [B, N, R], warped into the sources (Monodepth2).

    The arm without depth proposals: the gradient flows through the place where the source is read.
    Other arguments as in `Scene` and `photometric_error`.
    """
    height, width = sources.shape[-2:]
    homogeneous = F.pad(pixels, (0, 1), value=1.0).to(projections.dtype)
    ray = (homogeneous @ projections[..., :3, :3].mT).to(depth.dtype)
    points = ray * depth[:, None, ..., None] + projections[..., None, :3, 3].to(depth.dtype)
    place = points[..., :2] / points[..., 2:].clamp_min(1e-5)
    x, y = place.unbind(-1)
    valid = (points[..., 2] > 0) & (x > 0) & (x < width) & (y > 0) & (y < height)
    color = kernels.sample_image(sources.flatten(0, 2), place.flatten(0, 2))
    color = ray_grid(color.unflatten(0, sources.shape[:3]), rays)
    error = kernels.ssim_l1(color, ray_grid(target, rays)[:, None].expand_as(color)).flatten(-2)
    error = torch.where(valid, error, UNSEEN)
    if automask:  # what not moving would cost
        still = ray_grid(ray_colors(sources, pixels), rays)
        still = kernels.ssim_l1(still, ray_grid(target, rays)[:, None].expand_as(still))
        error = torch.cat([error, still.flatten(-2)], dim=1)
    return error.min(dim=1).values


def color_loss(color: Tensor, target: Tensor, rays: tuple[int, int]) -> Tensor:
    """SSIM + L1 between rendered and true colours [..., R, 3] (RGBLossMS)."""
    return kernels.ssim_l1(ray_grid(color, rays), ray_grid(target, rays)).mean()


def edge_loss(depth: Tensor, target: Tensor, rays: tuple[int, int]) -> Tensor:
    """Steps of depth [..., R] over its mean where colours [..., R, 3] are smooth (EdgeLoss3DMS)."""
    depth = depth.unflatten(-1, rays)
    depth = depth / (depth.mean((-2, -1), keepdim=True) + 1e-6)
    image = ray_grid(target, rays)
    loss = 0.0
    for dim in (-1, -2):
        edges = image.diff(dim=dim).abs().mean(-3)
        loss = loss + (depth.diff(dim=dim).abs() * torch.exp(-edges)).mean()
    return loss


# Geometry


def soft_sparsity(sdf: Tensor) -> Tensor:
    """Mean depth below the surface: what is not needed becomes free (SoftSparsityLoss)."""
    return F.relu(-sdf).mean()


def smooth_sparsity(sdf: Tensor, scale: float = 1.0) -> Tensor:
    """Mean sech^2(sdf / (2 scale)): surfaces are rare (SparsityLoss)."""
    return 4 * (torch.sigmoid(sdf / scale) * torch.sigmoid(-sdf / scale)).mean()


def hard_sparsity(sdf: Tensor, scale: float = 1.0, threshold: float = 0.2) -> Tensor:
    """What the mean occupancy, sigmoid(-scale sdf), exceeds the threshold by (HardSparsityLoss)."""
    return F.relu(torch.sigmoid(-scale * sdf).mean() - threshold)


def adaptive_sparsity(sdf: Tensor, depths: Tensor, depth: Tensor, slack: float = 4.0) -> Tensor:
    """Mean of relu(-sdf) over samples more than `slack` metres behind the surface, 0 without any.

    sdf, depths: [..., S] of the samples, z-depth in metres; depth: [...] of the surface, without
    gradient (AdaptiveSparsityLoss).
    """
    behind = depths > depth.detach()[..., None] + slack
    return (F.relu(-sdf) * behind).sum() / behind.sum().clamp_min(1)


def swept_depth_error(depth: Tensor, swept: Tensor, sure: Tensor) -> Tensor:
    """Mean of the difference of the logarithms of depths [...] times its weight `sure` [...]."""
    return ((depth / swept).log().abs() * sure).mean()


# Semantics


def ray_labels(labels: Tensor, pixels: Tensor) -> Tensor:
    """Class ids [..., R] of label images [..., h, w] at pixels [R, 2], truncated to integers."""
    u, v = pixels.long().unbind(-1)
    return labels[..., v, u].long()


def semantic_ce(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean -log of the composited probability [..., classes] of the label [...] (SemCELossMS)."""
    chosen = probabilities.gather(-1, labels[..., None])
    return -chosen.clamp(1e-6, 1.0).log().mean()


def semantic_bce(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of every class against the one-hot label (SemLossMS)."""
    onehot = F.one_hot(labels, probabilities.shape[-1]).to(probabilities.dtype)
    return F.binary_cross_entropy(probabilities.clamp(0, 1), onehot)
