"""SelfOcc: images and cameras in, a signed-distance volume out, and views rendered from it."""

import math
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

import kernels
from selfocc import InputError, counted
from selfocc.backbone import FPN, Backbone
from selfocc.batch import Batch, Frames, Noise, Scene, View
from selfocc.config import Config, plane_volume
from selfocc.encoder import Encoder
from selfocc.field import FieldDecoder
from selfocc.geometry import pixel_rays, ray_box
from selfocc.lift import FrustumLift, centres
from selfocc.losses import swept_depth_error
from selfocc.sweep import Teacher


class Seen(NamedTuple):
    """What images show."""

    volume: Tensor  # the field [B, 1 + colours + classes, H, W, Z], channel 0 the SDF in metres
    voxels: Tensor  # the same with a lift's SDF for voxels (lift.py); in training, `volume`
    depth: Tensor | None  # z-depth [B, N, h, w] in metres that the lift says, if there is one


class SelfOcc(nn.Module):
    """The whole network (paper section 3); `forward` gives volume and target view, for training."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        cameras = config.encoder.cameras or config.data.cameras
        self.backbone = Backbone(config.backbone)
        self.fpn = FPN(self.backbone.channels, config.encoder.dim)
        transposed = config.quirks.transposed_bev_grid
        planes = plane_volume(config.encoder, config.volume)
        self.encoder = Encoder(config.encoder, planes, cameras, transposed=transposed)
        self.lift = None
        if config.encoder.lift:
            self.lift = FrustumLift(
                self.backbone.channels, config.encoder, config.volume, config.field
            )
            self.teacher = Teacher(self.lift.nearest, self.lift.farthest)
        self.decoder = FieldDecoder(config.field, config.encoder, config.volume)
        render = config.render
        if render.sharpen is None:
            self.variance = nn.Parameter(torch.tensor(render.variance))
        else:
            self.register_buffer("inv_s", torch.tensor(render.sharpen[0]))
        self.anneal = 1.0  # share of the full cosine in NeuS alpha; training raises it from 0

    def set_progress(self, step: int):
        """Follow the schedules of surface sharpness and cosine annealing to this training step."""
        render = self.config.render
        self.anneal = min(1.0, step / render.anneal_steps)
        if render.sharpen is not None:
            first, last = render.sharpen
            share = min(1.0, step / max(1, self.config.optim.steps - 1))
            self.inv_s.fill_(math.exp(math.log(first) * (1 - share) + math.log(last) * share))

    def sharpness(self) -> Tensor:
        """inv_s of the NeuS sigmoid, 1/metre."""
        if self.config.render.sharpen is not None:
            return self.inv_s
        return torch.exp(10 * self.variance).clamp(1e-6, 1e6)

    def opacity(self) -> dict[str, object]:
        """All that makes opacity of the SDF, by the names of `kernels/alpha.py`."""
        anneal = self.anneal if self.training else 1.0
        return dict(inv_s=self.sharpness(), anneal=anneal, alpha=self.config.render.alpha)

    def see(self, batch: Batch) -> Seen:
        """What a batch's images show.

        Raises InputError for another number of cameras than the network has embeddings for.
        """
        device, bf16 = batch.images.device.type, self.config.optim.bf16
        half = partial(torch.autocast, device, torch.bfloat16, enabled=bf16)
        with half():
            cameras, known = batch.images.shape[1], len(self.encoder.camera_embedding)
            if cameras != known:
                raise InputError(
                    f"the network knows a rig of {counted(known, 'camera')}, the data have "
                    f"{cameras}; leave encoder.cameras alone, or choose data of such a rig"
                )
            stages = self.backbone(rearrange(batch.images, "b n c h w -> (b n) c h w"))
            features = self.fpn(stages)
            features = [rearrange(f, "(b n) c h w -> b n c h w", n=cameras) for f in features]
            image_size = seen_size = tuple(batch.images.shape[-2:])
            crop, rate = self.config.data.crop, self.config.quirks.pad_rate
            if rate is not None:
                seen_size = tuple(n * r for n, r in zip(crop, rate, strict=True))
            valid_size = tuple(n * self.config.data.scale for n in crop)
            planes = self.encoder(
                features, batch.intrinsics, batch.camera_to_volume, seen_size, valid_size
            )
        planes = [plane.float() for plane in planes]
        if self.lift is None:
            with half():
                volume = self.decoder(planes)
            return Seen(volume, volume, None)
        stages = [stage.float() for stage in stages]
        sdfs, features, depth = self.lift(
            stages, batch.intrinsics, batch.camera_to_volume, image_size
        )
        lifted = sdfs[..., 0], features
        planes = self.lift.beside(planes)
        with half():
            volume = self.decoder(planes, lifted, self.lift.mix.weight)
        voxels = volume
        if not self.training:
            voxels = volume.clone()
            voxels[:, 0] += sdfs[..., 1] - sdfs[..., 0]
        return Seen(volume, voxels, depth)

    def render(
        self,
        volume: Tensor,
        frames: Frames,
        pixels: Tensor,
        samples: int,
        jitter: Tensor | None = None,
        background: Tensor | None = None,
        keep_samples: bool = False,
        scene: Scene | None = None,
        stop_below: float = 0.0,
    ) -> View:
        """See the volume [B, 1 + colours + any classes, H, W, Z] through the cameras of `frames`.

        pixels [R, 2] of the rays, the same for all cameras; jitter [B, N, R] and background
        [B, N, R, 3] are uniform random numbers, without which samples are centred and the
        background is black. `keep_samples` also returns what some losses need of every sample.
        With a `scene` all samples are compared with the source frames on
        the way. Without one, rays end where no more transmittance than `stop_below` is left.
        """
        origins, directions, stretch = pixel_rays(
            pixels, frames.intrinsics, frames.camera_to_volume
        )
        config, (side, end, floor) = self.config, self.config.render.margin
        x0, y0, z0, x1, y1, z1 = config.volume.box
        seen = (x0 - side, y0 - end, z0 - floor, x1 + side, y1 + end, z1 + config.render.margin_top)
        near, far = ray_box(origins, directions, seen)
        cameras = origins.shape[1]

        def merge(x):
            return None if x is None else x.flatten(1, 2)

        def split(x):
            return None if x is None else x.unflatten(1, (cameras, -1))

        walk = dict(
            volume=volume,
            origins=merge(origins),
            directions=merge(directions),
            near=merge(near),
            far=merge(far),
            jitter=merge(jitter),
            box=config.volume.box,
            samples=samples,
            classes=volume.shape[1] - 1 - config.field.colors,
            backdrop=config.render.backdrop,
            bend=config.render.bend,
            read=config.render.read,
            **self.opacity(),
        )
        compared = None
        if scene is None:
            out = kernels.render_rays(**walk, keep_samples=keep_samples, stop_below=stop_below)
        else:
            out, *compared = kernels.render_photometric(
                **walk,
                **scene._asdict(),
                stretch=merge(stretch),
                pixels=pixels,
                combine=config.loss.photometric == "mvs_combined",
                published_pixels=config.quirks.pixels_over_size,
            )
        distance, opacity, color = split(out.distance), split(out.opacity), split(out.color)
        if background is not None and config.field.colors:
            color = color + background * (1 - opacity[..., None])
        if config.quirks.white_256:
            color = color * (256 / 255)
        return View(
            pixels=pixels,
            depth=distance / stretch,
            color=color,
            opacity=opacity,
            semantics=split(out.semantics),
            eikonal=split(out.eikonal),
            weights=split(out.weights),
            proposals=None if out.mids is None else split(out.mids) / stretch[..., None],
            sdf=split(out.sdf),
            compared=compared,
        )

    def swept_error(self, batch: Batch, depth: Tensor) -> Tensor:
        """How far the lift's depth [B, N, h, w] is from what a plane sweep of the target finds."""
        pixels = centres(depth.shape[2:], tuple(batch.images.shape[-2:]), depth.device)
        return swept_depth_error(depth.flatten(2), *self.teacher(batch, pixels))

    def forward(
        self, batch: Batch, noise: Noise | None = None, scene: Scene | None = None
    ) -> tuple[Tensor, View] | Tensor:
        """Volume and target view of a training step. Without a `scene` all samples are kept.

        Without noise, for the first steps, `swept_error`.
        """
        if noise is None:
            stages = self.backbone(rearrange(batch.images, "b n c h w -> (b n) c h w"))
            cameras = batch.intrinsics, batch.camera_to_volume, tuple(batch.images.shape[-2:])
            return self.swept_error(batch, self.lift.depth(stages, *cameras))
        volume, _, depth = self.see(batch)
        background = noise.background if self.config.render.background == "random" else None
        view = self.render(
            volume,
            batch.target,
            noise.pixels,
            self.config.render.samples,
            noise.jitter,
            background,
            keep_samples=scene is None,
            scene=scene,
        )
        if self.config.loss.weight_sweep:
            view.swept = self.swept_error(batch, depth)
        return volume, view
