"""The looks of the analytic street: solid textures, light and sky.

Colour is a function of the place on the surface, so it is the same from every view. Texture finer
than a pixel is faded out before it can alias: each octave of noise and each pattern by the
footprint of the pixel on the surface.
"""

import numpy as np

from selfocc.street import world as w

# Lattice spacing of the noise octaves in metres and how strong each is.
OCTAVES = (
    (7.0, 0.25), (3.2, 0.4), (1.45, 0.6), (0.66, 0.7),
    (0.30, 0.7), (0.136, 0.65), (0.062, 0.6), (0.028, 0.5),
)  # fmt: skip
# Contrast of the noise per style, in the order of world.PLAIN...CLOTH.
GRAIN = np.array([0.35, 0.42, 0.10, 0.10, 1.1, 0.9, 0.5, 0.15, 0.6], np.float32)
GROUND_GRAIN = np.array([0.55, 0.5, 0.9], np.float32)  # of road, sidewalk and terrain

_SIZE = 256
_LATTICE = np.random.default_rng(7).uniform(-1, 1, (_SIZE, _SIZE)).astype(np.float32)
_WRAPPED = np.pad(_LATTICE, (0, 1), mode="wrap").ravel()
_STRIDE = _SIZE + 1


def value_noise(u, v):
    """Random values of the integer lattice, smoothly interpolated; in [-1, 1], period 256."""
    iu, iv = np.floor(u), np.floor(v)
    fu, fv = u - iu, v - iv
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    i = (iv.astype(np.int32) & (_SIZE - 1)) * _STRIDE + (iu.astype(np.int32) & (_SIZE - 1))
    a, b = _WRAPPED[i], _WRAPPED[i + _STRIDE]
    a = a + fu * (_WRAPPED[i + 1] - a)
    return a + fv * (b + fu * (_WRAPPED[i + _STRIDE + 1] - b) - a)


def grain(u, v, footprint, fine=1.0):
    """Octaves of noise, each faded in where its lattice spacing grows from 1.2 to 2.5 pixels.

    fine: divides their spacings."""
    total = np.zeros_like(u)
    for k, (spacing, strength) in enumerate(OCTAVES):
        wavelength = spacing / fine
        fade = np.float32(0.77 * wavelength) / footprint - np.float32(0.92)
        seen = np.flatnonzero(fade > 0)
        if len(seen):
            # Turned from octave to octave, so that their lattices do not line up.
            c, s = (np.float32(turn(k * 0.9) / wavelength) for turn in (np.cos, np.sin))
            a = u[seen] * c - v[seen] * s + np.float32(17.3 * k)
            b = u[seen] * s + v[seen] * c + np.float32(5.1 * k)
            noise = value_noise(a, b)
            total[seen] += noise * np.minimum(fade[seen], 1) * np.float32(strength)
    return total


def band(x, half, footprint):
    """1 where |x| < half, with an edge as wide as a pixel; its mean is kept as it blurs."""
    soft = np.maximum(footprint, 1e-4)
    return np.clip((half - np.abs(x)) / soft + 0.5, 0, 1) * np.minimum(1, 2 * half / soft)


def stripes(x, period, duty, footprint):
    """Bands that fill the share `duty` of every period; they blur to their mean at a distance."""
    blur = np.clip(2 * footprint / period - 0.5, 0, 1)
    wave = np.abs(x / period - np.round(x / period)) * period
    return band(wave, duty * period / 2, footprint) * (1 - blur) + duty * blur


def shade(street, solids, sight, pixel, sunshine=None, *, texture=1.0, view_dependence=0.0):
    """Light [R, 3] (1: white in the plain world) and labels [R] of what was sighted.

    pixel: width of a pixel at distance t = 1 of a ray; sunshine: a function of points [M, 3] and
    the cosines [M] between normals and sun, the share [M] of the sun that reaches them."""
    origin, directions, t, index = sight.origin, sight.directions, sight.t, sight.index
    colour = np.empty((len(t), 3), np.float32)
    label = np.zeros(len(t), np.uint8)
    length = np.linalg.norm(directions, axis=1)
    view = directions / length[:, None]
    sky = np.flatnonzero(np.isinf(t))
    colour[sky] = _sky(street, view[sky], pixel)

    ground = np.flatnonzero((index < 0) & np.isfinite(t))
    points = origin.astype(np.float32) + t[ground, None] * directions[ground]
    normal = street.ground.normal(points[:, 0], points[:, 1])
    slant = np.maximum(-(normal * view[ground]).sum(1), 0.02)
    footprint = t[ground] * np.float32(pixel)
    albedo, label[ground] = _ground(street, points, footprint, slant, texture)
    colour[ground] = albedo * _light(street, points, normal, sunshine)

    solid = np.flatnonzero(index >= 0)
    which = index[solid]
    points = origin.astype(np.float32) + t[solid, None] * directions[solid]
    normal, local, axis = solids.normal(points, which)
    slant = np.maximum(-(normal * view[solid]).sum(1), 0.05)
    footprint = t[solid] * np.float32(pixel)
    albedo, gloss = _solid(solids, which, local, axis, footprint, slant, street.looks, texture)
    lit = albedo * _light(street, points, normal, sunshine)
    if view_dependence:
        mirror = view[solid] + 2 * slant[:, None] * normal
        glint = np.maximum(mirror @ street.sun.astype(np.float32), 0) ** 24
        fresnel = 0.1 + 0.9 * (1 - np.minimum(slant, 1)) ** 4
        share = (view_dependence * gloss * fresnel)[:, None]
        lit = (
            lit * (1 - share)
            + share * _sky(street, mirror, 1.0)
            + (view_dependence * gloss * glint)[:, None]
        )
    colour[solid] = lit
    label[solid] = solids.label[which]
    if street.looks.haze:
        seen = np.flatnonzero(np.isfinite(t))
        clear = np.exp(np.float32(-street.looks.haze) * t[seen] * length[seen])[:, None]
        air = np.float32(street.looks.sky * street.sky[1])
        colour[seen] = air + clear * (colour[seen] - air)
    return colour, label


def _light(street, points, normal, sunshine):
    """[R, 3]: a sun with soft edges and light from the sky."""
    facing = np.maximum(normal @ street.sun.astype(np.float32), 0)
    if sunshine:
        facing = facing * sunshine(points, facing)
    sky = (0.62 + 0.13 * normal[:, 2])[:, None] * street.looks.sky_light
    return sky + (0.30 * facing)[:, None] * street.looks.sun_light


def _sky(street, view, pixel):
    up = np.clip(view[:, 2:3], 0, 1)
    zenith, horizon = street.sky.astype(np.float32)
    colour = horizon + (zenith - horizon) * np.minimum(up * 2.2, 1)
    # Clouds lie in a plane high above, so they stay where they are when the camera moves.
    plane = view[:, :2] / (view[:, 2:3] + 0.15) * 6 + street.seed % 97
    cloud = np.clip(
        grain(plane[:, 0], plane[:, 1], np.full(len(view), 12 * pixel, np.float32)), -0.3, 1
    )[:, None]
    colour = colour + (0.10 * street.looks.clouds * cloud * (1 - 0.5 * up)).astype(np.float32)
    glow = np.maximum(view @ street.sun.astype(np.float32), 0) ** 6
    return np.float32(street.looks.sky) * colour + (np.float32(street.looks.glow) * glow)[:, None]


def _ground(street, points, footprint, slant, texture):
    x, y, _ = points.T
    lateral = street.ground.lateral(x, y)
    label = street.ground.label(x, y)
    road, walk, grass, paint = street.tones.astype(np.float32)
    kinds = label == w.ROAD, label == w.SIDEWALK
    tone = np.select([kind[:, None] for kind in kinds], [road, walk], grass)
    # A pixel is long along the line of sight: between its width and its length lies the size that
    # keeps most of the texture and does not flicker.
    wide = footprint / slant ** np.float32(0.75)
    strength = (GROUND_GRAIN * street.looks.ground_grain)[np.select(kinds, (0, 1), 2)]
    tone = (
        tone * (1 + np.float32(texture) * strength * grain(x, y, wide, street.looks.fine))[:, None]
    )
    if street.looks.patches:
        tone *= (1 + np.float32(texture * street.looks.patches) * _mended(lateral, y, kinds[0]))[
            :, None
        ]
    along = footprint / slant
    offset = np.abs(lateral)
    slabs = np.maximum(stripes(y, 0.8, 0.06, along), stripes(lateral, 0.8, 0.06, footprint))
    kerb = band(offset - street.ground.road - 0.08, 0.08, footprint)
    dashes = band(lateral, 0.07, footprint) * stripes(y, 7.0, 0.5, along)
    edge = band(offset - street.ground.road + 0.35, 0.06, footprint)
    worn = (0.75 + 0.25 * value_noise(x * 3, y * 3)) * np.float32(min(1, texture))
    tone = tone * (1 - 0.35 * (slabs * kinds[1]) * texture)[:, None]
    tone = tone + ((walk * 1.25 - tone) * (kerb * worn)[:, None])
    marks = np.minimum(dashes + edge, 1) * worn * kinds[0] * np.float32(street.looks.marks)
    return tone + (paint - tone) * marks[:, None], label


def _mended(lateral, y, road):
    """In [-1, 1]: tracks of wheels along the road, and rectangles of newer asphalt."""
    change = np.zeros_like(y)
    u, v = lateral[road], y[road]
    piece = value_noise(np.floor(u * np.float32(0.45)), np.floor(v * np.float32(0.11)))
    change[road] = 0.5 * value_noise(u * np.float32(1.1), v * np.float32(0.04)) + 0.5 * piece * (
        np.abs(piece) > 0.6
    )
    return change


def _solid(solids, which, local, axis, footprint, slant, looks, texture):
    """Albedo [R, 3] and glossiness [R] of points on solids, from their local coordinates."""
    style = solids.style[which]
    main, second = solids.colour[which, 0], solids.colour[which, 1]
    half = solids.half.astype(np.float32)[which]
    kind, seed = solids.kind[which], solids.seed[which]
    # Coordinates on the surface: along and up on upright faces, x and y on level ones, round and up
    # on cylinders; spheres count as cubes.
    u = np.where(axis == 0, local[:, 1], local[:, 0])
    v = np.where(axis == 2, local[:, 1], local[:, 2])
    turn = np.arctan2(local[:, 1], local[:, 0]) * half[:, 0]
    u = np.where((kind == w.CYLINDER) & (axis != 2), turn, u)
    wide = footprint / slant ** np.float32(0.75)
    fine = np.where(style == w.FOLIAGE, np.float32(2), np.float32(1))
    stretch = np.where(style == w.BARK, np.float32(0.25), fine)
    amount = (np.float32(texture) * GRAIN * looks.grain)[style]
    rough = amount * grain(u + seed, v * stretch + seed * np.float32(1.7), wide, looks.fine)
    mix = np.zeros(len(which), np.float32)
    gloss = np.select([style == w.PAINT, style == w.CABIN], [0.5, 0.8], 0.03).astype(np.float32)

    f = np.flatnonzero((style == w.FACADE) & (axis != 2))
    mix[f], rough[f], glass = _facade(
        u[f], v[f], solids.pattern[which[f]], seed[f], half[f], wide[f], rough[f], texture
    )
    gloss[f] = 0.6 * glass
    f = np.flatnonzero(style == w.CABIN)  # windows all round below the roof
    frame = np.abs(u[f]) / np.where(axis[f] == 0, half[f, 1], half[f, 0])
    pane = (frame < 0.92) * (np.abs(frame - 0.05) > 0.06) * (axis[f] != 2)
    mix[f] = band(v[f] / half[f, 2] + 0.1, 0.72, wide[f]) * pane
    f = np.flatnonzero(style == w.PAINT)  # a dark sill, lamps and a plate at the ends
    ends = axis[f] == 0
    mix[f] = (v[f] < -0.6 * half[f, 2]) & (axis[f] != 2)
    lamp = ends & (np.abs(np.abs(u[f]) - 0.75 * half[f, 1]) < 0.16) & (v[f] > 0.1 * half[f, 2])
    plate = ends & (np.abs(u[f]) < 0.26) & (np.abs(v[f]) < 0.07)
    lamps = np.where(local[f, :1] > 0, np.float32([0.9, 0.9, 0.8]), np.float32([0.7, 0.08, 0.05]))
    main[f[plate]] = 0.85
    main[f[lamp]] = lamps[lamp]
    f = np.flatnonzero(style == w.FOLIAGE)
    mix[f] = np.clip(0.4 - 0.6 * rough[f], 0, 1) * min(1, texture)
    f = np.flatnonzero(style == w.SLATS)
    mix[f] = texture * stripes(u[f], solids.pattern[which[f], 0], 0.35, wide[f])
    f = np.flatnonzero(style == w.SIGN)
    rim = np.maximum(np.abs(u[f]), np.abs(v[f])) / np.maximum(half[f, 1], 1e-3)
    mix[f] = ((rim > 0.85) | ((np.abs(v[f]) < 0.2 * half[f, 2]) & (rim < 0.6))) * (axis[f] == 0)
    f = np.flatnonzero(style == w.CLOTH)
    mix[f] = local[f, 2] < 0
    albedo = main + (second - main) * mix[:, None]
    return albedo * np.maximum(1 + rough, 0.15)[:, None], gloss


def _facade(u, v, pattern, seed, half, footprint, rough, texture):
    """Rows of framed windows in many shades, larger on the ground floor, ledges between floors.

    Returns the share of the second colour, the change of brightness, and the share of glass."""
    period_u, period_v = pattern.T
    v = v + half[:, 2] - 1.5  # the wall reaches 1.5 m below the ground
    floor = np.floor(v / period_v)
    cell = np.floor(u / period_u + 0.5)
    du = u - cell * period_u
    dv = v - (floor + 0.55) * period_v
    tall = np.where(floor == 0, 0.33, 0.27) * period_v
    broad = np.where(floor == 0, 0.40, 0.24 + 0.08 * np.sin(seed)) * period_u
    blur = np.clip(2 * footprint / np.minimum(period_u, period_v) - 0.5, 0, 1)
    glass = band(du, broad, footprint) * band(dv, tall, footprint)
    frame = band(du, broad + 0.1, footprint) * band(dv, tall + 0.1, footprint) - glass
    bars = glass * band(du, 0.035, footprint)
    tint = value_noise(
        cell + np.floor(seed) + 0.0, floor + np.floor(seed * 3)
    )  # lattice values: one a window
    ledge = band(dv - 0.45 * period_v, 0.09, footprint)
    contrast = np.float32(min(1, texture))
    mean = 0.22 * contrast
    mix = contrast * np.clip(glass * (0.75 + 0.35 * tint) - bars, 0, 1)
    mix = mix * (1 - blur) + mean * blur
    rough = rough * (1 - glass) + texture * (
        0.30 * (frame + bars + ledge) * (1 - blur) + glass * 0.35 * tint * (1 - blur)
    )
    return mix, rough, glass * (1 - blur)
