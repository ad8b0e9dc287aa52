"""What one street looks like beside another: light, weather, camera and paint, drawn from its seed.

Light is a sun and a sky over Lambertian surfaces, so that neighbouring frames agree; what a real
camera does to it (exposure, tone curve, blur, noise) is `develop`. Real streets are to lie within
the spread: parts of their images are saturated, others nearly black.
"""

from dataclasses import dataclass, replace

import numpy as np

from selfocc.street import world as w

GREY = np.float32([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Looks:
    """Of one street, and of the camera that drives through it."""

    sun_light: np.ndarray  # [3] colour of what the sun adds
    sky_light: np.ndarray  # [3] colour of the light in the shadow
    grain: np.ndarray  # [9] strength of texture by style, in the order of world.PLAIN...CLOTH
    ground_grain: np.ndarray  # [3] of road, sidewalk and terrain
    balance: np.ndarray  # [3] gain of the camera's red, green and blue
    sunny: bool = True
    shadows: bool = False
    sky: float = 1.0  # brightness of the sky as seen, beside what it lights
    clouds: float = 1.0  # their contrast
    glow: float = 0.0  # of the sky around the sun
    haze: float = 0.0  # density of the air, 1 / metres
    fine: float = 1.0  # how many times finer texture is
    marks: float = 1.0  # how white lane marks are
    patches: float = 0.0  # contrast of repaired pieces of road and of the tracks of wheels
    brightness: float | None = None  # mean below the sky that the camera exposes for; None: gain 1
    drift: tuple[float, float, float] = (0.0, 1.0, 0.0)  # of exposure: share, frames, phase
    gamma: float = 1.0  # image = light ^ gamma
    saturation: float = 1.0
    vignette: float = 0.0  # share of light lost in the corners
    blur: float = 0.0  # share of a pixel that spreads to each neighbour in a row, and in a column
    noise: float = 0.0  # std at full brightness


# One soft light and a perfect camera.
PLAIN = Looks(*(np.ones(n, np.float32) for n in (3, 3, 9, 3, 3)))


def random_looks(rng, spread) -> Looks:
    """`spread` 1: about what real streets and cameras span; 0: the plain world.

    The ranges bring brightness, contrast, saturated and black shares, colourfulness and gradients
    of 96x320 images near those of KITTI's, with a wider spread.
    """
    if not spread:
        return PLAIN

    def pick(plain, low, high, geometric=False):
        share = np.log([low, high]) if geometric else (low, high)
        value = rng.uniform(*share)
        return plain + min(spread, 1) * ((np.exp(value) if geometric else value) - plain)

    def tint(strength):
        return 1 + strength * np.float32([1, 0.3, -0.7])

    sunny = rng.random() < 0.65
    sun, shade = (pick(1, 1.5, 4.5), pick(1, 0.2, 0.6)) if sunny else (pick(1, 0.1, 0.8), 1.0)
    grey = rng.random() < 0.12
    grain = np.full(9, pick(1, 0.5, 1.7, geometric=True), np.float32)
    grain[w.FOLIAGE] = pick(1, 0.9, 1.6)
    return Looks(
        sun_light=np.float32(sun * tint(pick(0, 0, 0.15))),
        sky_light=np.float32(shade * tint(pick(0, -0.15, 0.02))),
        sunny=sunny,
        shadows=True,
        sky=pick(1, 0.35, 1.8, geometric=True) if sunny else pick(1, 1.0, 2.6),
        clouds=pick(1, 0, 1),
        glow=pick(0, 0, 2.0) if sunny else 0.0,
        haze=pick(0, 1 / 3000, 1 / 250, geometric=True),
        grain=grain,
        ground_grain=np.float32([pick(1, 0.15, 1.1, geometric=True) for _ in range(3)]),
        fine=pick(1, 1, 4, geometric=True),
        marks=float(np.clip(pick(1, -0.5, 1.3), 0, 1)),
        patches=pick(0, 0, 0.35),
        brightness=pick(0.3, 0.16, 0.37),
        drift=(pick(0, 0, 0.03), rng.uniform(10, 40), rng.uniform(0, 2 * np.pi)),
        gamma=pick(1, 0.85, 1.5),
        balance=np.float32([pick(1, 0.93, 1.07), 1, pick(1, 0.93, 1.1)]),
        saturation=0.0 if grey else pick(1, 0.4, 1.4),
        vignette=pick(0, 0, 0.2),
        blur=pick(0, 0.0, 0.12),
        noise=pick(0, 0.002, 0.012, geometric=True),
    )


def repainted(solids, rng, spread):
    """Facades and cars in the colours of real streets: most are grey, white or black."""
    if not spread:
        return solids
    colour = solids.colour.copy()
    pale = rng.uniform(0, 0.8)  # of this street's walls

    def chance(salt):  # the same for all parts of a thing, which share their seed up to 3
        return (np.floor(solids.seed / 3.0001) * salt % 1).astype(np.float32)

    wall, car = solids.style == w.FACADE, np.isin(solids.style, (w.PAINT, w.CABIN))
    grey = (colour[:, 0] @ GREY)[:, None]
    plain = np.where(chance(0.754)[:, None] < pale, 0.75 + 0.25 * grey, grey)
    share = spread * np.where(wall, 0.9 * chance(0.618), 0)[:, None]
    colour[:, 0] += share * (plain - colour[:, 0])
    level = (0.04 + 0.9 * chance(0.913) ** 1.5)[:, None]
    share = spread * (car & (chance(0.618) < 0.7))[:, None]
    colour[:, 0] += share * (level - colour[:, 0])
    return replace(solids, colour=colour.astype(np.float32))


def exposure_for(light, looks) -> float:
    """The gain at which `light` [M, 3] becomes as bright as the camera wants it."""
    if looks.brightness is None:
        return 1.0
    low, high = 1e-2, 1e2
    for _ in range(24):
        gain = np.sqrt(low * high)
        dark = _tone(light * np.float32(gain), looks).mean() < looks.brightness
        low, high = (gain, high) if dark else (low, gain)
    return gain


def drifted(gain, looks, frame) -> float:
    """What automatic exposure makes of a gain from frame to frame."""
    share, period, phase = looks.drift
    return gain * (1 + share * np.sin(2 * np.pi * frame / period + phase))


def develop(light, gain, looks, rng) -> np.ndarray:
    """uint8 [h, w, 3]: what the camera makes of light [h, w, 3], with noise from `rng`."""
    height, width, _ = light.shape
    if looks.vignette:
        v, u = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        fall = 1 - looks.vignette * (u * u + v * v).astype(np.float32) / 2
        light = light * fall[..., None]
    if looks.brightness is None:
        light = np.clip(light, 0, 1)
    image = _tone(light * gain, looks)
    if looks.saturation != 1:
        grey = (image @ GREY)[..., None]
        image = grey + np.float32(looks.saturation) * (image - grey)
    if looks.blur:
        image = _blurred(image, np.float32(looks.blur))
    if looks.noise:
        noise = rng.standard_normal(image.shape, np.float32)
        image = image + np.float32(looks.noise) * noise * np.sqrt(0.1 + 0.9 * np.abs(image))
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _tone(light, looks):
    if (looks.balance != 1).any():
        light = light * looks.balance
    image = np.clip(light, 0, 1)
    return image if looks.gamma == 1 else image ** np.float32(looks.gamma)


def _blurred(image, share):
    for axis in (0, 1):
        image = np.moveaxis(image, axis, 0)
        mixed = (1 - 2 * share) * image
        mixed[1:] += share * image[:-1]
        mixed[:-1] += share * image[1:]
        mixed[[0, -1]] += share * image[[0, -1]]
        image = np.moveaxis(mixed, 0, axis)
    return image
