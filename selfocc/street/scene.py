"""A random street as a function of its seed: ground, what lines it, traffic, the path driven."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from selfocc.street import objects
from selfocc.street.looks import Looks, random_looks, repainted
from selfocc.street.world import Ground, Solids, Waves

BEHIND, AHEAD = 90.0, 150.0  # metres of street before the first position and after the last frame
BEYOND = 60.0  # metres that the path goes on after the last frame
LANE = 1.65  # metres from the centre line to the middle of the ego lane


@dataclass(frozen=True)
class Mover:
    """What moves along the street: at frame f at y[f], `lateral` metres right of the middle."""

    y: np.ndarray  # [path]
    lateral: float
    oncoming: bool


@dataclass(frozen=True)
class Street:
    """All there is to see, and the path through it."""

    ground: Ground
    solids: Solids  # those of movers in the frame of the mover
    movers: list[Mover]
    path: np.ndarray  # [path] y of the ego vehicle: the frames of the scene, and BEYOND metres more
    lateral: np.ndarray  # [path] metres right of the centre line
    wobble: np.ndarray  # [path, 2] pitch and roll beside those of the ground, radians
    sun: np.ndarray  # [3] unit vector towards the sun
    sky: np.ndarray  # [2, 3] colours of zenith and horizon
    tones: np.ndarray  # [4, 3] colours of road, sidewalk, grass, lane marks
    looks: Looks
    seed: int

    def at(self, frame: int) -> Solids:
        """The solids at the time of a frame."""
        mover = self.solids.mover
        pose = np.zeros((len(mover), 4))
        if self.movers:
            moving = mover >= 0
            now = [_pose(self.ground, m.y[frame], m.lateral, m.oncoming) for m in self.movers]
            pose[moving] = np.stack(now)[mover[moving]]
        return self.solids.moved(pose)

    def signed_distance(self, frame: int, points: np.ndarray) -> np.ndarray:
        """Metres [M] from world points [M, 3] to the nearest surface, negative inside.

        Exact for solids, to first order in the curvature for the ground.
        """
        solids, distance = self.at(frame), self.ground.signed_distance(points)
        for i in range(len(solids)):
            distance = np.minimum(distance, solids.signed_distance(points, i))
        return distance

    def ego(self, frame: int) -> np.ndarray:
        """[4, 4] ego to world: x forward, y left, z up, on the ground and tilted with it."""
        y = self.path[frame]
        along = y + np.array([-1.4, 0, 1.4])  # the axles
        x = self.ground.place(along, np.interp(along, self.path, self.lateral))[0]
        rear, middle, front = np.stack([x, along], -1)
        forward = (front - rear) / np.linalg.norm(front - rear)
        left = np.array([-forward[1], forward[0]])

        def rise(step, length):
            ends = [self.ground.height(*(middle + sign * step * length / 2)) for sign in (-1, 1)]
            return np.arctan2(ends[1] - ends[0], length)

        pitch, roll = self.wobble[frame] + (rise(forward, 2.8), rise(left, 1.6))
        x_axis = np.array([*(np.cos(pitch) * forward), np.sin(pitch)])
        y_axis = np.array([*(np.cos(roll) * left), np.sin(roll)])
        y_axis -= x_axis * (x_axis @ y_axis)
        y_axis /= np.linalg.norm(y_axis)
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([x_axis, y_axis, np.cross(x_axis, y_axis)], 1)
        matrix[:3, 3] = *middle, self.ground.height(*middle)
        return matrix


def random_street(
    seed, frames, *, relief=1.0, movers=1.0, mover_speed=1.0, occluders=1.0, looks=1.0
):
    """The `Street` of a seed for a number of frames; the knobs are those of `SyntheticConfig`."""
    rng = np.random.default_rng([20231121, seed])
    more = np.random.default_rng([20261127, seed])  # what differs in looks: a stream of its own
    grade, tilt = relief * rng.uniform(0.012, 0.055), relief * rng.uniform(0.005, 0.035)
    ground = Ground(
        centre=Waves.random(rng, [(110, 260), (60, 110)], slope=rng.choice([0.05, 0.25, 0.45])),
        profile=Waves.random(rng, [(90, 160), (45, 80), (25, 40)], slope=grade),
        crossfall=Waves.random(rng, [(60, 140), (25, 50)], height=tilt),
        road=float(rng.choice([3.5, 5.5, 5.7])),
        sidewalk=(sidewalk := rng.uniform(1.6, 3.2)),
        paved=sidewalk,
    )
    if more.random() < 0.6 * looks:
        ground = replace(ground, road=more.uniform(2.9, 8.0))
    if more.random() < 0.3 * looks:
        ground = replace(ground, paved=more.choice([0, 0.5]) * sidewalk)
    path, lateral, wobble = _drive(rng, ground, frames)
    span = path[0] - BEHIND, path[frames - 1] + AHEAD
    standing = []
    for side in (-1, 1):
        if more.random() < 0.45 * looks:
            standing += _green_side(more, ground, side, *span, occluders)
        else:
            highest = more.choice([7, 10, 15, 22]) if looks else 15
            standing += _buildings_and_gardens(rng, ground, side, *span, occluders, highest)
    kerb = {"tree": objects.tree}
    if more.random() < 0.7 * looks:
        kerb = {"tree": objects.broad_tree, "parked": more.choice([0.1, 0.5, 0.9])}
    standing += _kerbside(rng, ground, *span, occluders, **kerb)
    moving, driven = _traffic(rng, ground, path, movers, mover_speed)

    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.1)
    overcast = rng.uniform(0, 1)
    blue, grey = np.array([[0.30, 0.50, 0.85], [0.75, 0.84, 0.95]]), np.array([[0.75], [0.88]])
    tones = [(0.34, 0.34, 0.36), (0.58, 0.55, 0.52), (0.30, 0.42, 0.18)]
    tones = np.stack([*(objects.draw_colour(rng, t) for t in tones), (0.88, 0.88, 0.84)])
    drawn = random_looks(more, looks)
    if looks:
        tones[:3] *= np.exp(looks * more.uniform((-0.9, -0.6, -0.5), (0.75, 0.3, 0.3)))[:, None]
        # Lower suns along some streets; where the sky is grey, light falls from above.
        height = more.uniform(0.45, 1.15) if drawn.sunny else 1.35
        azimuth = more.choice([azimuth, np.pi * more.choice([0.5, 1.5]) + more.normal(0, 0.3)])
        overcast = more.uniform(0, 0.5) if drawn.sunny else more.uniform(0.7, 1)
    flat = np.cos(height)
    return Street(
        ground=ground,
        solids=repainted(Solids.join(standing + moving), more, looks),
        movers=driven,
        path=path,
        lateral=lateral,
        wobble=wobble,
        sun=np.array([np.cos(azimuth) * flat, np.sin(azimuth) * flat, np.sin(height)]),
        sky=blue + overcast * (grey - blue),
        tones=tones,
        looks=drawn,
        seed=seed,
    )


def _pose(ground, y, lateral, backwards=False):
    """(x, y, z, heading) of something upright on the ground."""
    x, heading = ground.place(y, lateral)
    return np.array([x, y, ground.height(x, y), heading + np.pi * backwards])


def _put(ground, thing, y, lateral, turn=0.0):
    """What stands beside the road, facing it."""
    return thing.moved(_pose(ground, y, lateral, lateral < 0)[None] + (0, 0, 0, turn))


def _drive(rng, ground, frames):
    """The ego path: about a metre a frame with varying speed, weaving a little in its lane."""
    f = np.arange(frames + int(BEYOND / 0.5))

    def wave(shortest, longest):
        return np.sin(2 * np.pi * f / rng.uniform(shortest, longest) + rng.uniform(0, 2 * np.pi))

    speed = 1.1 + rng.uniform(0.1, 0.3) * wave(15, 60) + rng.uniform(0.1, 0.3) * wave(15, 60)
    path = np.zeros(len(f))
    for i, step in enumerate(np.clip(speed, 0.6, 1.6)[1:], 1):
        path[i] = path[i - 1] + step / np.hypot(1, ground.centre.slope(path[i - 1]))
    kept = np.searchsorted(path, path[frames - 1] + BEYOND)
    lateral = LANE + 0.15 * wave(30, 60)
    wobble = np.deg2rad(np.stack([0.25 * wave(5, 14), 0.15 * wave(5, 14)], -1))
    return path[:kept], lateral[:kept], wobble[:kept]


def _buildings_and_gardens(rng, ground, side, start, end, occluders, highest):
    """Beyond a sidewalk: a row of buildings, here and there a green plot before one."""
    edge, put = ground.road + ground.sidewalk, partial(_put, ground)
    y, green = start, rng.uniform(0.1, 0.45)
    while y < end:
        length, depth = rng.uniform(8, 20), rng.uniform(8, 13)
        middle = y + length / 2
        front = rng.choice([0.1, 0.1, 2.5, 5.0]) * rng.uniform(0.5, 1.2)
        plot = rng.random() < green
        if plot:
            front = rng.uniform(18, 26)
            yield put(objects.barrier(rng, length), middle, side * (edge + rng.uniform(0.2, 1)))
            for plant, number, beyond in (
                (objects.tree, 4, (2.5, 16)),
                (objects.bush, 3, (1.5, 8)),
            ):
                for _ in range(rng.poisson(number * occluders)):
                    where = y + rng.uniform(0, length), side * (edge + rng.uniform(*beyond))
                    yield put(plant(rng), *where)
        elif front > 1.5 and rng.random() < 0.7:
            fence = objects.barrier(rng, length * rng.uniform(0.4, 0.9))
            yield put(fence, middle, side * (edge + 0.3))
        house = objects.building(rng, length, depth, highest)
        yield put(house, middle, side * (edge + front + depth / 2))
        y += length + rng.choice([0.0, 0.6, 3.0]) * rng.uniform(0.3, 1)


def _green_side(rng, ground, side, start, end, occluders):
    """Beyond a sidewalk without a row of buildings: walls, hedges, trees; fields, woods, houses."""
    edge, put = ground.road + ground.sidewalk, partial(_put, ground)
    lined, backed, trees = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.3, 2.5)
    beyond = rng.uniform(0, 1) * (rng.random() < 0.7)  # metres from the sidewalk to what lines it
    y = start
    while y < end:
        length = rng.uniform(6, 18)
        middle = y + length / 2
        if rng.random() < lined:
            line = objects.garden_wall if rng.random() < 0.35 else objects.barrier
            yield put(line(rng, length), middle, side * (edge + beyond + 0.2))
        far = rng.uniform(6, 30)
        if rng.random() < backed:
            wood = objects.thicket(rng, length, rng.uniform(3, 9))
            yield put(wood, middle, side * (edge + far))
        elif rng.random() < 0.4:
            depth = rng.uniform(7, 11)
            house = objects.building(rng, min(length, 12), depth, 9)
            yield put(house, middle, side * (edge + far + depth / 2))
        for plant, number in ((objects.broad_tree, trees), (objects.bush, 1.0)):
            for _ in range(rng.poisson(number * occluders)):
                where = rng.uniform(y, y + length), side * (edge + rng.uniform(0.8, 14))
                yield put(plant(rng), *where)
        y += length + rng.choice([0.0, 0.0, 6.0])


def _kerbside(rng, ground, start, end, occluders, tree, parked=None):
    """Along the kerbs: trees, poles, signs, standing people, parked vehicles.

    tree: draws one; parked: share of the places with a vehicle, None: drawn for each side."""
    edge, put = ground.road + ground.sidewalk, partial(_put, ground)
    for side in (-1, 1):
        y, avenue = start + rng.uniform(0, 10), rng.random() < 0.5
        while y < end and occluders:
            kind = rng.random()
            if kind < 0.35 and avenue:
                yield put(tree(rng), y, side * (ground.road + rng.uniform(0.5, 0.9)))
            elif kind < 0.8:
                thing = objects.traffic_sign if rng.random() < 0.5 else objects.lamp_post
                where = side * (ground.road + rng.uniform(0.35, 0.6))
                yield put(thing(rng), y, where, rng.normal(0, 0.15))
            elif ground.sidewalk > 2.2:
                yield put(objects.bush(rng), y, side * (edge - 0.4))
            y += rng.uniform(4, 14) / occluders

        share = rng.uniform(0.2, 0.8) if parked is None else parked
        y, share = start, share * occluders * (ground.road > 5)
        while y < end:
            if rng.random() < share:
                where = side * (ground.road - 1.1 + rng.normal(0, 0.06))
                yield put(objects.vehicle(rng, trucks=0.07), y, where, rng.normal(0, 0.03))
            y += rng.uniform(5.3, 7.5)

        for _ in range(rng.poisson(occluders * (end - start) / 35)):
            where = ground.road + rng.uniform(0.5, ground.sidewalk - 0.3)
            yield put(objects.person(rng), rng.uniform(start, end), side * where)


def _traffic(rng, ground, path, movers, speed):
    """Moving objects, in their own frames and tagged with their number, and how they move."""
    frames = np.arange(len(path))
    things, driven = [], []

    def add(thing, y, lateral, oncoming=False):
        things.append(replace(thing, mover=np.full(len(thing), len(driven))))
        driven.append(Mover(y, lateral, oncoming))

    if rng.random() < 0.5 * movers:  # a vehicle ahead in our lane
        gap = rng.uniform(9, 28) + 2 * np.sin(frames / rng.uniform(9, 20))
        ahead = path + gap if speed else np.full(len(path), path[-1] + 20)
        add(objects.vehicle(rng), ahead, LANE + rng.normal(0, 0.1))
    for _ in range(rng.poisson(2.5 * movers)):
        y = rng.uniform(20, 190) - speed * rng.uniform(0.6, 1.3) * frames
        add(objects.vehicle(rng), y, -LANE + rng.normal(0, 0.1), oncoming=True)
    for _ in range(rng.poisson(2.0 * movers)):
        oncoming, side = bool(rng.random() < 0.5), rng.choice([-1, 1])
        step = speed * rng.uniform(0.08, 0.16) * (-1 if oncoming else 1)
        where = side * (ground.road + rng.uniform(0.5, ground.sidewalk - 0.3))
        add(objects.person(rng), rng.uniform(5, 90) + step * frames, where, oncoming)
    for _ in range(rng.poisson(0.8 * movers)):
        side = rng.choice([-1, 1])
        step = speed * rng.uniform(0.25, 0.5) * side
        where = side * (min(ground.road, 3.5) - 0.45)
        add(objects.cyclist(rng), rng.uniform(15, 80) + step * frames, where, oncoming=side < 0)
    return things, driven
