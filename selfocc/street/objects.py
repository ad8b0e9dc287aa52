"""What stands and moves in the street: objects made of boxes, upright cylinders and spheres.

Every function draws one object from a random generator and returns its `Solids` in its own frame:
x forward (along the street), y left (towards the street, for buildings), z up from the ground.
"""

from typing import NamedTuple

import numpy as np

from selfocc.street import world as w
from selfocc.street.world import Solids

WALLS = (
    (0.72, 0.64, 0.52), (0.62, 0.36, 0.27), (0.78, 0.76, 0.72), (0.55, 0.52, 0.50),
    (0.70, 0.55, 0.38), (0.50, 0.30, 0.24), (0.66, 0.68, 0.62), (0.80, 0.70, 0.55),
    (0.45, 0.47, 0.52),
)  # fmt: skip
PAINTS = (
    (0.75, 0.76, 0.78), (0.12, 0.12, 0.14), (0.55, 0.08, 0.08), (0.10, 0.18, 0.42),
    (0.85, 0.85, 0.83), (0.35, 0.37, 0.40), (0.10, 0.30, 0.20), (0.78, 0.62, 0.15),
    (0.45, 0.25, 0.12),
)  # fmt: skip
SIGNS = ((0.75, 0.10, 0.10), (0.10, 0.20, 0.62), (0.85, 0.72, 0.10))
GLASS, RUBBER = np.array((0.12, 0.15, 0.18)), np.array((0.07, 0.07, 0.07))
GROUND_SINK = 0.4  # metres that posts and walls reach below the ground, where it slopes
WALL_SINK = 1.5  # the same for buildings


class Paint(NamedTuple):
    label: int
    style: int
    colour: np.ndarray
    second: np.ndarray | None = None
    pattern: tuple[float, float] = (1.0, 1.0)


def draw_colour(rng, colour, spread=0.12):
    """A variation of a colour, mostly in brightness."""
    bright = rng.uniform(1 - 2 * spread, 1 + 2 * spread)
    return np.clip(np.array(colour) * bright * (1 + rng.normal(0, spread / 3, 3)), 0.03, 0.95)


def box(centre, half, paint, seed):
    return w.BOX, centre, half, paint, seed


def post(x, y, low, high, radius, paint, seed):
    """An upright cylinder from z = low to high."""
    return w.CYLINDER, (x, y, (low + high) / 2), (radius, radius, (high - low) / 2), paint, seed


def ball(centre, radius, paint, seed):
    return w.SPHERE, centre, (radius,) * 3, paint, seed


def solids(*parts):
    """The table of parts, each as `box`, `post` or `ball` gives it."""
    kind, centre, half, paint, seed = zip(*parts, strict=True)
    colours = [(p.colour, p.colour if p.second is None else p.second) for p in paint]
    return Solids(
        kind=np.array(kind),
        centre=np.array(centre, np.float64),
        half=np.array(half, np.float64),
        yaw=np.zeros(len(kind)),
        label=np.array([p.label for p in paint], np.uint8),
        style=np.array([p.style for p in paint]),
        colour=np.array(colours, np.float32),
        pattern=np.array([p.pattern for p in paint], np.float32),
        seed=np.array(seed, np.float32),
        mover=np.full(len(kind), -1),
    )


def _seed(rng):
    return rng.uniform(0, 200)


def building(rng, length, depth, highest=15):
    height, seed = rng.uniform(4.5, highest), _seed(rng)
    windows = (rng.uniform(1.6, 3.4), rng.uniform(2.6, 3.4))
    wall = draw_colour(rng, WALLS[rng.integers(len(WALLS))])
    pane = draw_colour(rng, (0.14, 0.17, 0.22))
    facade = Paint(w.BUILDING, w.FACADE, wall, pane, windows)
    middle, half = (height - WALL_SINK) / 2, (height + WALL_SINK) / 2
    parts = [box((0, 0, middle), (length / 2, depth / 2, half), facade, seed)]
    if rng.random() < 0.6:  # an upper floor that is set back
        attic = Paint(w.BUILDING, w.PLAIN, 0.7 * wall)
        parts.append(box((0, 0, height + 0.8), (0.4 * length, 0.35 * depth, 0.8), attic, seed))
    if rng.random() < 0.5:  # a bay towards the street
        wide, along = rng.uniform(0.8, 1.8), rng.uniform(-0.3, 0.3) * length
        bay = facade._replace(colour=draw_colour(rng, wall))
        where = (along, depth / 2, 0.35 * height)
        parts.append(box(where, (wide, 0.6, 0.35 * height + WALL_SINK), bay, seed + 3))
    return solids(*parts)


def tree(rng):
    stem, crown = rng.uniform(2.2, 3.6), rng.uniform(1.0, 1.9)
    bark = Paint(w.TRUNK, w.BARK, draw_colour(rng, (0.32, 0.24, 0.17)))
    autumn = rng.random() < 0.25
    green = draw_colour(rng, (0.45, 0.36, 0.12) if autumn else (0.22, 0.36, 0.12), 0.15)
    parts = [post(0, 0, -GROUND_SINK, stem + 0.2, rng.uniform(0.12, 0.25), bark, _seed(rng))]
    for k in range(rng.integers(2, 5)):
        x, y, z = rng.normal(0, 0.45 * crown, 3) * (k > 0)
        colour = green * rng.uniform(0.85, 1.15)
        leaves = Paint(w.VEGETATION, w.FOLIAGE, colour, 0.4 * green)
        where = (x, y, stem + 0.6 * crown + abs(z))
        parts.append(ball(where, crown * rng.uniform(0.6, 1.0), leaves, _seed(rng)))
    return solids(*parts)


def broad_tree(rng):
    """A tree with a wide, ragged crown that may hang over the road."""
    stem, wide, high = rng.uniform(1.8, 3.2), rng.uniform(1.6, 3.6), rng.uniform(1.4, 3.2)
    bark = Paint(w.TRUNK, w.BARK, draw_colour(rng, (0.30, 0.26, 0.21), 0.2))
    green = draw_colour(rng, (0.24, 0.31, 0.13), 0.2)
    top, girth = stem + high, rng.uniform(0.1, 0.3)
    parts = [post(0, 0, -GROUND_SINK, top, girth, bark, _seed(rng))]
    for _ in range(rng.integers(6, 14)):
        x, y, z = rng.normal(size=3)
        scale = rng.uniform(0.3, 0.75) / np.sqrt(x * x + y * y + z * z)
        where = (scale * wide * x, scale * wide * y, stem + high * (0.6 + 0.8 * scale * z))
        leaves = Paint(w.VEGETATION, w.FOLIAGE, green * rng.uniform(0.7, 1.25), 0.4 * green)
        parts.append(ball(where, rng.uniform(0.25, 0.6) * wide, leaves, _seed(rng)))
    return solids(*parts)


def thicket(rng, length, height):
    """A wall of leaves, as the edge of a wood."""
    green, parts = draw_colour(rng, (0.20, 0.28, 0.11), 0.2), []
    for x in np.arange(-length / 2, length / 2, 0.4 * height):
        for z in (0.25 * height, 0.65 * height):
            leaves = Paint(w.VEGETATION, w.FOLIAGE, green * rng.uniform(0.7, 1.25), 0.4 * green)
            where = (x + rng.normal(0, 0.2), rng.normal(0, 0.15 * height), z)
            parts.append(ball(where, height * rng.uniform(0.28, 0.42), leaves, _seed(rng)))
    return solids(*parts)


def garden_wall(rng, length):
    """A wall of stone or concrete along the street."""
    stone, high = draw_colour(rng, WALLS[rng.integers(len(WALLS))]), rng.uniform(0.5, 2.6)
    paint = Paint(w.FENCE, w.PLAIN, stone)
    middle, half = (high - GROUND_SINK) / 2, (high + GROUND_SINK) / 2
    return solids(box((0, 0, middle), (length / 2, 0.12, half), paint, _seed(rng)))


def bush(rng):
    green = draw_colour(rng, (0.20, 0.33, 0.12), 0.15)
    leaves = Paint(w.VEGETATION, w.FOLIAGE, green, 0.4 * green)
    parts = []
    for _ in range(rng.integers(1, 4)):
        radius = rng.uniform(0.4, 0.9)
        x, y = rng.normal(0, 0.5, 2)
        parts.append(ball((x, y, 0.4 * radius), radius, leaves, _seed(rng)))
    return solids(*parts)


def barrier(rng, length):
    """A hedge or a fence along the street."""
    if rng.random() < 0.5:
        green = draw_colour(rng, (0.18, 0.31, 0.11))
        thick, high = 0.35, rng.uniform(0.8, 2.0)
        paint = Paint(w.VEGETATION, w.FOLIAGE, green, 0.45 * green)
    else:
        wood = draw_colour(rng, WALLS[rng.integers(len(WALLS))])
        thick, high = 0.06, rng.uniform(0.9, 1.9)
        paint = Paint(w.FENCE, w.SLATS, wood, 0.5 * wood, (rng.uniform(0.15, 0.5), 1.0))
    middle, half = (high - GROUND_SINK) / 2, (high + GROUND_SINK) / 2
    return solids(box((0, 0, middle), (length / 2, thick, half), paint, _seed(rng)))


def lamp_post(rng):
    height = rng.uniform(4.5, 7.5)
    metal = Paint(w.POLE, w.PLAIN, draw_colour(rng, (0.50, 0.51, 0.50)))
    return solids(
        post(0, 0, -GROUND_SINK, height, rng.uniform(0.07, 0.12), metal, _seed(rng)),
        box((0, 0, height), (0.15, 0.6, 0.08), metal, _seed(rng)),
    )


def traffic_sign(rng):
    height, size = rng.uniform(2.2, 3.0), rng.uniform(0.30, 0.42)
    metal = Paint(w.POLE, w.PLAIN, draw_colour(rng, (0.50, 0.51, 0.50)))
    white = np.array((0.9, 0.9, 0.9))
    plate = Paint(w.TRAFFIC_SIGN, w.SIGN, np.array(SIGNS[rng.integers(len(SIGNS))]), white)
    return solids(
        post(0, 0, -GROUND_SINK, height, 0.05, metal, _seed(rng)),
        box((0, 0, height), (0.04, size, size), plate, _seed(rng)),
    )


def vehicle(rng, trucks=0.12):
    """A car, or with the given probability a truck."""
    colour, seed = draw_colour(rng, PAINTS[rng.integers(len(PAINTS))], 0.1), _seed(rng)
    return _truck(rng, colour, seed) if rng.random() < trucks else _car(rng, colour, seed)


def _car(rng, colour, seed):
    length, width = rng.uniform(3.7, 4.8), rng.uniform(1.65, 1.85)
    body, roof = rng.uniform(0.5, 0.65), rng.uniform(0.45, 0.85)
    shell = Paint(w.CAR, w.PAINT, colour, RUBBER)
    cabin = Paint(w.CAR, w.CABIN, colour, GLASS)
    back, floor = rng.uniform(-0.5, 0.1), 0.28
    above = (back, 0, floor + body + roof / 2)
    return solids(
        box((0, 0, floor + body / 2), (length / 2, width / 2, body / 2), shell, seed),
        box(above, (0.28 * length, width / 2 - 0.1, roof / 2), cabin, seed),
        *_wheels(length / 2 - 0.75, width / 2, 0.32, w.CAR),
    )


def _truck(rng, colour, seed):
    length, width, height = rng.uniform(5.5, 8), 2.3, rng.uniform(2.6, 3.2)
    load = Paint(w.TRUCK, w.PAINT, colour, draw_colour(rng, (0.8, 0.8, 0.8)))
    cabin = Paint(w.TRUCK, w.CABIN, 0.9 * colour, GLASS)
    return solids(
        box((-0.9, 0, 0.5 + height / 2), (length / 2 - 0.9, width / 2, height / 2), load, seed),
        box((length / 2 - 0.85, 0, 1.35), (0.85, width / 2 - 0.05, 0.95), cabin, seed),
        *_wheels(length / 2 - 1.1, width / 2, 0.45, w.TRUCK),
    )


def _wheels(axle, side, radius, label):
    """Spheres that stand out of the sides by 4 cm."""
    tyre = Paint(label, w.PLAIN, RUBBER)
    return [
        ball((sx * axle, sy * (side - radius + 0.04), radius), radius, tyre, 0)
        for sx in (-1, 1)
        for sy in (-1, 1)
    ]


def person(rng):
    height = rng.uniform(1.5, 1.9)
    clothes = Paint(w.PERSON, w.CLOTH, rng.uniform(0.1, 0.8, 3), rng.uniform(0.05, 0.4, 3))
    skin = Paint(w.PERSON, w.PLAIN, draw_colour(rng, (0.65, 0.48, 0.38)))
    return solids(
        post(0, 0, 0, height - 0.25, 0.24, clothes, _seed(rng)),
        ball((0, 0, height - 0.13), 0.13, skin, 0),
    )


def cyclist(rng):
    coat = rng.uniform(0.1, 0.85, 3)
    clothes = Paint(w.BICYCLIST, w.CLOTH, coat, 0.6 * coat)
    frame = Paint(w.BICYCLIST, w.PLAIN, rng.uniform(0.1, 0.6, 3))
    tyre = Paint(w.BICYCLIST, w.PLAIN, RUBBER)
    helmet = Paint(w.BICYCLIST, w.PLAIN, rng.uniform(0.1, 0.9, 3))
    return solids(
        box((0, 0, 0.55), (0.75, 0.05, 0.28), frame, _seed(rng)),
        box((0.55, 0, 0.33), (0.23, 0.03, 0.33), tyre, 0),
        box((-0.55, 0, 0.33), (0.23, 0.03, 0.33), tyre, 0),
        post(-0.1, 0, 0.77, 1.53, 0.22, clothes, _seed(rng)),
        ball((0.05, 0, 1.66), 0.14, helmet, 0),
    )
