"""What every operation of `kernels` means: short, slow, any device, any floating-point type.

Tests take their truth from here, and `torch.export` what it writes (dispatch.py). Arguments, shapes
and results are those of the public functions of the same name. B items, N cameras, R rays, S
samples, K other time stamps. "SelfOcc" is Huang et al., CVPR 2024.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.alpha import ALPHAS, Knobs
from kernels.decode import activation
from kernels.deformable_triton import displacement
from kernels.ssim import robust


def deformable_sampling(value, level_shapes, reference_points, offsets, logits, seen=None):
    """out[q] = sum_lp softmax(logits)_lp bilinear(value_l, (w, h) reference + offset - 1/2)

    of every head, zero outside a level; with `seen` [B, N, Q] the mean over the cameras that see a
    query, zero if there is none (Zhu et al. 2021, eq. 3). value [B N, V, heads, dh], offsets [B, Q,
    heads, L, P, 2] in pixels, logits [B, Q, heads, L P] -> [B, Q, heads dh].
    """
    batch, queries, heads, levels, points, _ = offsets.shape
    if seen is None:  # a query reads the maps of its own item, from a reference for every level
        seen = torch.ones(batch, 1, queries, dtype=torch.bool, device=value.device)
        reference = reference_points.expand(batch, -1, -1, -1, -1)[:, None]
    else:
        reference = reference_points[:, :, :, None].expand(-1, -1, -1, levels, -1, -1)
    cameras = seen.shape[1]
    weights = logits.softmax(-1).unflatten(-1, (levels, points))
    total = 0.0
    maps = value.split([h * w for h, w in level_shapes], dim=1)
    for level, (h, w) in enumerate(level_shapes):
        pixels = maps[level].unflatten(1, (h, w)).permute(0, 3, 4, 1, 2)  # [B N, heads, dh, h, w]
        moved = displacement(offsets[:, :, :, level]) / offsets.new_tensor([w, h])
        place = reference[:, :, :, None, level] + moved[:, None]  # [B, N, Q, heads, P, 2]
        grid = (2 * place - 1).transpose(2, 3).flatten(0, 2)  # [B N heads, Q, P, 2]
        read = F.grid_sample(pixels.flatten(0, 1), grid, align_corners=False)
        read = read.unflatten(0, (batch, cameras, heads)).movedim(3, -1)  # [B, N, heads, Q, P, dh]
        total = total + (weights[:, None, :, :, level, :, None] * read.transpose(2, 3)).sum(-2)
    mean = (total * seen[..., None, None]).sum(1) / seen.sum(1).clamp_min(1)[..., None, None]
    return mean.flatten(2)


# -----------------------------------------------------------------------------------------------
# Volumes


def _neighbours(field: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """field[i + 1] and field[i - 1] along a dimension, the ends replicated."""
    last = field.shape[dim] - 1
    place = torch.arange(last + 1, device=field.device)
    upper, lower = (place + 1).clamp(max=last), (place - 1).clamp(min=0)
    return field.index_select(dim, upper), field.index_select(dim, lower)


def node_gradients(sdf, spacing):
    """(s[i + 1] - s[i - 1]) / (2 step) along x, y, z: sdf [B, H, W, Z] -> [B, 3, H, W, Z]."""
    along = zip((-2, -3, -1), spacing, strict=True)
    pairs = ((*_neighbours(sdf, dim), step) for dim, step in along)
    return torch.stack([(upper - lower) / (2 * step) for upper, lower, step in pairs], dim=1)


def node_second_differences(sdf, spacing, compact):
    """Gradients of the gradients, [B, 3, 3, H, W, Z]; if `compact`, the diagonal becomes
    (s[i + 1] - 2 s[i] + s[i - 1]) / step^2.
    """
    rows = [node_gradients(g, spacing) for g in node_gradients(sdf, spacing).unbind(1)]
    second = torch.stack(rows, dim=1)
    if compact:
        for axis, (dim, step) in enumerate(zip((-2, -3, -1), spacing, strict=True)):
            upper, lower = _neighbours(sdf, dim)
            second[:, axis, axis] = (upper - 2 * sdf + lower) / step**2
    return second


def node_losses(sdf, spacing, compact):
    """sum (|gradient| - 1)^2 and mean |second difference| over all nodes (SelfOcc, eikonal and
    Hessian losses), 0-d.
    """
    norm = node_gradients(sdf, spacing).norm(dim=1)
    return (norm - 1).square().sum(), node_second_differences(sdf, spacing, compact).abs().mean()


def composite(alpha, values):
    """w_i = alpha_i prod_{j<i} (1 - alpha_j + 1e-4) (Wang et al. 2021, eq. 11).

    alpha [..., S], values [..., S, K] -> w [..., S], what light is left [...], sum_i w_i v_i.
    """
    passed = torch.cumprod(1 - alpha + 1e-4, dim=-1)
    weights = alpha * torch.cat([torch.ones_like(passed[..., :1]), passed[..., :-1]], dim=-1)
    return weights, passed[..., -1], (weights[..., None] * values).sum(-2)


def render(
    volume,
    origins,
    directions,
    near,
    far,
    inv_s,
    *,
    box,
    samples,
    jitter=None,
    alpha="neus",
    classes=0,
    backdrop=False,
    bend=0.0,
    read=0.0,
    **knobs,
) -> dict[str, Tensor]:
    """`render_rays`, with everything that it can keep, by the names of `Rendering`.

    SDF, its gradient and features where an interval is read, trilinear between nodes; an
    opacity from `ALPHAS`; compositing (SelfOcc, SDF-based rendering; Wang et al. 2021, eq. 13).
    volume [B, C, H, W, Z], origins and directions [B, R, 3], near, far and jitter [B, R].
    """
    edges = torch.linspace(0, 1, samples + 1, dtype=near.dtype, device=near.device)
    if jitter is not None:  # one number in [0, 1) a ray moves its edges between the middles
        middle = (edges[1:] + edges[:-1]) / 2
        lower, upper = torch.cat([edges[:1], middle]), torch.cat([middle, edges[-1:]])
        edges = lower + (upper - lower) * jitter[..., None]
    edges = (1 - bend) * edges + bend * edges**2
    t = near[..., None] + (far - near)[..., None] * edges  # [B, R, S + 1]
    deltas, mids = t[..., 1:] - t[..., :-1], (t[..., 1:] + t[..., :-1]) / 2
    places = t[..., :-1] + read * deltas
    points = origins[..., None, :] + directions[..., None, :] * places[..., None]

    low, high = volume.new_tensor(box).view(2, 3)
    height, width, depth = volume.shape[2:]
    spacing = ((high - low) / (low.new_tensor([width, height, depth]) - 1)).tolist()
    table = torch.cat([volume, node_gradients(volume[:, 0], spacing)], dim=1)
    grid = (2 * (points - low) / (high - low) - 1)[..., None, [2, 0, 1]]  # [B, R, S, 1, 3]
    table = F.grid_sample(table, grid, padding_mode="border", align_corners=True)[..., 0]
    colors = volume.shape[1] - 1 - classes
    sdf, color, logits, gradient = table.movedim(1, -1).split([1, colors, classes, 3], dim=-1)
    sdf, norm = sdf[..., 0], (gradient.square().sum(-1) + torch.finfo(t.dtype).tiny).sqrt()

    cosine = (gradient * directions[..., None, :]).sum(-1)
    opacity = ALPHAS[alpha].reference(sdf, cosine, deltas, inv_s, Knobs(**knobs))
    if backdrop:
        opacity = torch.cat([opacity[..., :-1], torch.ones_like(opacity[..., :1])], dim=-1)
    color = F.relu(color * 0.28209479177387814 + 0.5)  # the spherical harmonic of degree 0
    shown = torch.cat([color, logits.softmax(-1)], dim=-1)
    weights, _, sums = composite(opacity, shown)  # [B, R, S], [B, R, colours + classes]
    color, semantics = sums.split([colors, classes], dim=-1)
    opacity = weights.sum(-1)
    out = dict(distance=(weights * mids).sum(-1) / (opacity + 1e-10), opacity=opacity, color=color)
    out |= dict(semantics=semantics) if classes else {}
    out |= dict(eikonal=(norm - 1).square().sum(-1))
    return out | dict(weights=weights, mids=mids, deltas=deltas, sdf=sdf)


def decode(hw, zh, wz, network, lifted=None, mix=None):
    """W2 act(W1 act(x) + b1) + b2, act the softplus, of x = hw + zh + wz + mix lifted at every node
    (SelfOcc, the MLP from TPV features to the field).

    hw [B, H, W, D], zh [B, Z, H, D], wz [B, W, Z, D], network W1 [E, D], b1, W2 [C, E], b2, lifted
    [B, H, W, Z, L], mix [D, L] -> [B, H, W, Z, C].
    """
    w1, b1, w2, b2 = network
    x = hw[:, :, :, None] + zh.transpose(1, 2)[:, :, None] + wz[:, None]
    if lifted is not None:
        x = x + lifted @ mix.T
    return activation(activation(x) @ w1.T + b1) @ w2.T + b2


def sample_maps(maps, place, seen):
    """Trilinear values [M, P, C] of maps [M, C, X, Y, Z] at place [M, P, 3], -1 to 1 from edge to
    edge along X, Y, Z; zero where not `seen` [M, P].
    """
    grid = place.flip(-1)[:, None, None]  # the fastest axis comes first
    values = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return values[:, :, 0, 0].mT * seen[..., None]


# -----------------------------------------------------------------------------------------------
# Photometric losses


def ssim(x, y):
    """clamp((1 - SSIM) / 2, 0, 1) over 3 x 3 windows with reflected borders, [..., C, h, w]
    (Wang et al. 2004, eq. 13, as Godard et al. 2019 use it).
    """

    def mean(image):
        flat = F.pad(image.reshape(-1, *image.shape[-3:]), (1, 1, 1, 1), mode="reflect")
        return F.avg_pool2d(flat, 3, stride=1).view(image.shape)

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    below = (mean_x**2 + mean_y**2 + 1e-4) * (variances + 9e-4)
    return ((1 - above / below) / 2).clamp(0, 1)


def ssim_l1(prediction, target):
    """0.85 SSIM + 0.15 L1, the mean over the channels: [..., C, h, w] -> [..., h, w]
    (Godard et al. 2019, eq. 3).
    """
    return (0.85 * ssim(prediction, target) + 0.15 * robust(prediction - target)).mean(-3)


def epipolar_photometric(
    weights, depths, pixels, target, sources, projections, *, combine=False, published_pixels=False
):
    """l1 = sum_s w_s |target - source at depth s| / sum_s w_s over the s that a source sees, and
    the same of the source's colours (SelfOcc, MVS-embedded depth).

    weights, depths [B, N, R, S], pixels [R, 2], target [B, N, R, 3], sources [B, K, N, 3, h, w],
    projections [B, K, N, 4, 4] -> l1 [B, K, N, R], colour [.., 3], whether anything is seen;
    if `combine`, difference and colour are first averaged over the sources that see a sample.
    """
    height, width = sources.shape[-2:]
    u, v = pixels[:, :1], pixels[:, 1:]
    points = torch.stack([u * depths, v * depths, depths, torch.ones_like(depths)], dim=-1)
    matrices = projections.to(points.dtype)[..., None, None, :, :]
    x, y, z, _ = (matrices @ points[:, None, ..., None])[..., 0].unbind(-1)  # [B, K, N, R, S]
    x, y = x / z.clamp_min(1e-5), y / z.clamp_min(1e-5)
    seen = ((z > 0) & (x > 0) & (x < width) & (y > 0) & (y < height)).to(weights.dtype)
    span = (width, height) if published_pixels else (width - 1, height - 1)
    grid = torch.stack([2 * x / span[0] - 1, 2 * y / span[1] - 1], dim=-1).clamp(-1e3, 1e3)
    color = F.grid_sample(
        sources.flatten(0, 2), grid.flatten(0, 2), padding_mode="border", align_corners=True
    )
    color = color.movedim(1, -1).view(*x.shape, 3)
    error = robust(target[:, None, ..., None, :] - color).mean(-1) * seen
    color, weights = color * seen[..., None], weights[:, None]
    if combine:
        count = seen.sum(1, keepdim=True).clamp_min(1)
        error = error.sum(1, keepdim=True) / count
        color = color.sum(1, keepdim=True) / count[..., None]
        seen = seen.amax(1, keepdim=True)
    weights = weights * seen
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
    return (weights * error).sum(-1), (weights[..., None] * color).sum(-2), seen.bool().any(-1)


def render_photometric(
    volume,
    origins,
    directions,
    near,
    far,
    inv_s,
    stretch,
    pixels,
    target,
    sources,
    projections,
    *,
    combine=False,
    published_pixels=False,
    **options,
):
    """`render`, then `epipolar_photometric` of its samples: their weights, and their middles over
    `stretch` [B, N R] (metres along a ray for one of depth) as depths. Returns the results of both.
    """
    seen = render(volume, origins, directions, near, far, inv_s, **options)
    proposals = (seen["weights"], seen["mids"] / stretch[..., None])
    proposals = (x.unflatten(1, target.shape[1:3]) for x in proposals)
    views = pixels, target, sources, projections
    shown = dict(combine=combine, published_pixels=published_pixels)
    return seen, *epipolar_photometric(*proposals, *views, **shown)


def least_photometric(color, l1, target, rays, *, valid=None, identity=None, unseen=1e3):
    """min over the sources of 0.85 SSIM(colour, target) + 0.15 l1, `unseen` where not valid, and
    over `ssim_l1` of the sources at the target's own pixels (Godard et al. 2019, eqs. 4 and 5).

    color [B, K, N, R, 3], l1 and valid [B, K, N, R], target [B, N, R, 3], rays = rows, columns.
    """
    color, goal = (x.unflatten(-2, rays).movedim(-1, -3) for x in (color, target[:, None]))
    error = 0.85 * ssim(color, goal.expand_as(color)).mean(-3).flatten(-2) + 0.15 * l1
    if valid is not None:
        error = torch.where(valid, error, unseen)
    if identity is not None:
        still = identity.unflatten(-2, rays).movedim(-1, -3)
        error = torch.cat([error, ssim_l1(still, goal.expand_as(still)).flatten(-2)], dim=1)
    return error.amin(1)
