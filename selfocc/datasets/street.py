"""A random street as a function of its seed: ground, buildings, plants, furniture, traffic and the path driven."""

from dataclasses import dataclass, field

import numpy as np

from selfocc.datasets import world as w
from selfocc.datasets.world import Ground, Solids, Waves

BEHIND, AHEAD = 90.0, 150.0  # metres of street before the first and beyond the last position
LANE = 1.65  # metres from the centre line to the middle of the ego lane


@dataclass(frozen=True)
class Mover:
    """Something that moves along the street: at frame f it is at y(f), `lateral` metres from the centre line."""

    y: np.ndarray  # [frames + extra] position along the street
    lateral: float
    oncoming: bool


@dataclass
class Table:
    """Collects primitives for a `Solids` table."""

    rows: list = field(default_factory=list)

    def add(self, kind, centre, half, label, style, colour, second=None, yaw=0.0, pattern=(1, 1), seed=0.0, mover=-1):
        second = colour if second is None else second
        self.rows.append((kind, centre, half, yaw, label, style, (colour, second), pattern, seed, mover))

    def solids(self):
        kind, centre, half, yaw, label, style, colour, pattern, seed, mover = zip(*self.rows, strict=True)
        as_float = lambda v: np.array(v, np.float64)  # noqa: E731
        return Solids(np.array(kind), as_float(centre), as_float(half), as_float(yaw), np.array(label, np.uint8),
                      np.array(style), np.array(colour, np.float32), np.array(pattern, np.float32),
                      np.array(seed, np.float32), np.array(mover))


@dataclass(frozen=True)
class Street:
    """All there is to see, and the path: positions for `frames` frames and as many more as reach 60 m further."""

    ground: Ground
    solids: Solids
    movers: list
    path: np.ndarray  # [frames + extra] y of the ego vehicle
    path_lateral: np.ndarray
    wobble: np.ndarray  # [frames + extra, 2] pitch and roll noise, radians
    sun: np.ndarray  # [3] unit vector towards the sun
    sky: np.ndarray  # [2, 3] colours at the zenith and at the horizon
    tones: np.ndarray  # [4, 3] colours of road, sidewalk, grass, lane marks
    seed: int

    def at(self, frame):
        """The solids at the time of a frame."""
        movers = self.solids.mover
        pose = np.zeros((len(movers), 4))
        if self.movers:
            moving = movers >= 0
            pose[moving] = np.stack([self.pose(m, frame) for m in self.movers])[movers[moving]]
        return self.solids.moved(pose)

    def pose(self, mover, frame):
        """(x, y, z, heading) of a mover at a frame; it stands upright on the ground."""
        y = mover.y[frame]
        x, heading = self.ground.place(y, mover.lateral)
        return np.array([x, y, self.ground.height(x, y), heading + (np.pi if mover.oncoming else 0)])

    def ego(self, frame):
        """[4, 4] ego to world: x forward, y left, z up, on the ground, tilted with it."""
        y, lateral = self.path[frame], self.path_lateral[frame]
        ahead = np.array([y - 1.4, y + 1.4])  # the wheels smooth what the body feels
        x = self.ground.place(ahead, np.interp(ahead, self.path, self.path_lateral))[0]
        forward = np.append(np.diff(np.stack([x, ahead])), 0)
        forward /= np.linalg.norm(forward)
        at = np.array([self.ground.place(y, lateral)[0], y])
        left = np.array([-forward[1], forward[0]])

        def height(offset):
            return float(self.ground.height(*(at + offset)))

        pitch = np.arctan2(height(1.4 * forward[:2]) - height(-1.4 * forward[:2]), 2.8) + self.wobble[frame, 0]
        roll = np.arctan2(height(0.8 * left) - height(-0.8 * left), 1.6) + self.wobble[frame, 1]
        x_axis = np.append(np.cos(pitch) * forward[:2], np.sin(pitch))
        y_axis = np.append(left * np.cos(roll), np.sin(roll))
        y_axis -= x_axis * (x_axis @ y_axis)
        y_axis /= np.linalg.norm(y_axis)
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([x_axis, y_axis, np.cross(x_axis, y_axis)], 1)
        matrix[:3, 3] = *at, height(np.zeros(2))
        return matrix


def colour_near(rng, colour, spread=0.12):
    """A variation of a colour in brightness (mostly) and hue."""
    return np.clip(np.array(colour) * rng.uniform(1 - 2 * spread, 1 + 2 * spread)
                   + rng.normal(0, spread / 3, 3), 0.03, 0.95)


def random_street(seed, frames, *, movers=1.0, mover_speed=1.0, occluders=1.0):
    """The street of a seed. The knobs are those of `SyntheticConfig`."""
    rng = np.random.default_rng([20231121, seed])
    ground = Ground(
        centre=Waves.random(rng, [(110, 260), (60, 110)], rng.choice([0.05, 0.25, 0.45])),
        profile=Waves.random(rng, [(90, 160), (45, 80), (25, 40)], rng.uniform(0.03, 0.055)),
        crossfall=Waves.random(rng, [(60, 140), (25, 50)], rng.uniform(0.0, 0.0012)),
        road=rng.choice([3.5, 5.5, 5.7]), sidewalk=rng.uniform(1.6, 3.2))
    tilt = rng.uniform(0.01, 0.035)
    ground.crossfall.amplitude[:] *= tilt / max(ground.crossfall.amplitude.sum(), 1e-9)

    path, lateral, wobble = _drive(rng, ground, frames)
    table = Table()
    _line_the_street(rng, ground, table, path[0] - BEHIND, path[frames - 1] + AHEAD, occluders)
    traffic = _traffic(rng, ground, table, path, movers, mover_speed)

    azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.1)
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    overcast = rng.uniform(0, 1)
    sky = np.array([[0.30, 0.50, 0.85], [0.75, 0.84, 0.95]]) * (1 - overcast) + overcast * np.array([[0.75] * 3, [0.88] * 3])
    tones = np.stack([colour_near(rng, (0.34, 0.34, 0.36)), colour_near(rng, (0.58, 0.55, 0.52)),
                      colour_near(rng, (0.30, 0.42, 0.18)), np.array([0.88, 0.88, 0.84])])
    return Street(ground, table.solids(), traffic, path, lateral, wobble, sun, sky, tones, seed)


def _drive(rng, ground, frames):
    """The ego path: about a metre a frame with varying speed, weaving a little in its lane."""
    extra = 110
    f = np.arange(frames + extra)
    speed = 1.1 + sum(rng.uniform(0.1, 0.3) * np.sin(2 * np.pi * f / rng.uniform(15, 60) + rng.uniform(0, 6.28))
                      for _ in range(2))
    speed = np.clip(speed, 0.6, 1.6)
    path = np.zeros(len(f))
    for i in range(1, len(f)):
        path[i] = path[i - 1] + speed[i] / np.hypot(1, ground.centre.slope(path[i - 1]))
    extra = np.searchsorted(path, path[frames - 1] + 60)
    path = path[:extra + 1]
    f = f[:extra + 1]
    lateral = LANE + 0.15 * np.sin(2 * np.pi * path / rng.uniform(30, 60) + rng.uniform(0, 6.28))
    wobble = np.stack([np.deg2rad(0.25) * np.sin(2 * np.pi * f / rng.uniform(5, 14) + rng.uniform(0, 6.28))
                       for _ in range(2)], -1) * np.array([1.0, 0.6])
    return path, lateral, wobble


WALLS = [(0.72, 0.64, 0.52), (0.62, 0.36, 0.27), (0.78, 0.76, 0.72), (0.55, 0.52, 0.50), (0.70, 0.55, 0.38),
         (0.50, 0.30, 0.24), (0.66, 0.68, 0.62), (0.80, 0.70, 0.55), (0.45, 0.47, 0.52)]
PAINTS = [(0.75, 0.76, 0.78), (0.12, 0.12, 0.14), (0.55, 0.08, 0.08), (0.10, 0.18, 0.42), (0.85, 0.85, 0.83),
          (0.35, 0.37, 0.40), (0.10, 0.30, 0.20), (0.78, 0.62, 0.15), (0.45, 0.25, 0.12)]


class Builder:
    """Places objects given by (y, lateral) on the ground."""

    def __init__(self, rng, ground, table):
        self.rng, self.ground, self.table = rng, ground, table

    def pose(self, y, lateral):
        x, heading = self.ground.place(y, lateral)
        return np.array([x, y, float(self.ground.height(x, y)), heading])

    def seed(self):
        return float(self.rng.uniform(0, 200))

    def building(self, y, side, front, length, sunk=1.5):
        rng = self.rng
        depth, height = rng.uniform(8, 13), rng.uniform(4.5, 15)
        x, _, z, heading = self.pose(y, side * (front + depth / 2))
        wall, second = colour_near(rng, WALLS[rng.integers(len(WALLS))]), colour_near(rng, (0.14, 0.17, 0.22))
        pattern = (rng.uniform(1.6, 3.4), rng.uniform(2.6, 3.4))
        self.table.add(w.BOX, (x, y, z + (height - sunk) / 2), (length / 2, depth / 2, (height + sunk) / 2), w.BUILDING,
                       w.FACADE, wall, second, heading, pattern, self.seed())
        if rng.random() < 0.6:  # a roof part set back, or a projecting bay
            self.table.add(w.BOX, (x, y, z + height + 0.8), (length * 0.4, depth * 0.35, 0.8), w.BUILDING, w.PLAIN,
                           wall * 0.7, None, heading, pattern, self.seed())
        if rng.random() < 0.5:
            wide = rng.uniform(0.8, 1.8)
            shift = rng.uniform(-0.3, 0.3) * length
            along = np.array([np.cos(heading), np.sin(heading)]) * shift
            out = np.array([np.sin(heading), -np.cos(heading)]) * side * -(depth / 2)
            self.table.add(w.BOX, (x + along[0] + out[0], y + along[1] + out[1], z + height * 0.35), (wide, 0.6, height * 0.35),
                           w.BUILDING, w.FACADE, colour_near(rng, wall), second, heading, pattern, self.seed())

    def tree(self, y, lateral):
        rng = self.rng
        x, _, z, _ = self.pose(y, lateral)
        stem, radius = rng.uniform(2.2, 3.6), rng.uniform(0.12, 0.25)
        green = colour_near(rng, (0.22, 0.36, 0.12) if rng.random() < 0.75 else (0.45, 0.36, 0.12), 0.15)
        self.table.add(w.CYLINDER, (x, y, z + stem / 2 - 0.2), (radius, radius, stem / 2 + 0.4), w.TRUNK, w.BARK,
                       colour_near(rng, (0.32, 0.24, 0.17)), seed=self.seed())
        crown = rng.uniform(1.0, 1.9)
        for k in range(rng.integers(2, 5)):
            offset = rng.normal(0, 0.45 * crown, 3) * (k > 0)
            r = crown * rng.uniform(0.6, 1.0)
            self.table.add(w.SPHERE, (x + offset[0], y + offset[1], z + stem + 0.6 * crown + abs(offset[2])), (r, r, r),
                           w.VEGETATION, w.FOLIAGE, green * rng.uniform(0.85, 1.15), green * 0.4, seed=self.seed())

    def bush(self, y, lateral):
        x, _, z, _ = self.pose(y, lateral)
        green = colour_near(self.rng, (0.20, 0.33, 0.12), 0.15)
        for _ in range(self.rng.integers(1, 4)):
            r = self.rng.uniform(0.4, 0.9)
            dx, dy = self.rng.normal(0, 0.5, 2)
            self.table.add(w.SPHERE, (x + dx, y + dy, z + 0.4 * r), (r, r, r), w.VEGETATION, w.FOLIAGE, green, green * 0.4,
                           seed=self.seed())

    def barrier(self, y, lateral, length):
        """A hedge or a fence along the street."""
        x, _, z, heading = self.pose(y, lateral)
        if self.rng.random() < 0.5:
            green, height = colour_near(self.rng, (0.18, 0.31, 0.11)), self.rng.uniform(0.8, 2.0)
            self.table.add(w.BOX, (x, y, z + height / 2 - 0.3), (length / 2, 0.35, height / 2 + 0.3), w.VEGETATION,
                           w.FOLIAGE, green, green * 0.45, heading, seed=self.seed())
        else:
            wood = colour_near(self.rng, WALLS[self.rng.integers(len(WALLS))])
            height = self.rng.uniform(0.9, 1.9)
            self.table.add(w.BOX, (x, y, z + height / 2 - 0.3), (length / 2, 0.06, height / 2 + 0.3), w.FENCE, w.SLATS,
                           wood, wood * 0.5, heading, (self.rng.uniform(0.15, 0.5), 1), self.seed())

    def pole(self, y, lateral, sign):
        rng = self.rng
        x, _, z, heading = self.pose(y, lateral)
        height = rng.uniform(2.2, 3.0) if sign else rng.uniform(4.5, 7.5)
        radius = 0.05 if sign else rng.uniform(0.07, 0.12)
        self.table.add(w.CYLINDER, (x, y, z + height / 2 - 0.2), (radius, radius, height / 2 + 0.2), w.POLE, w.PLAIN,
                       colour_near(rng, (0.50, 0.51, 0.50)), seed=self.seed())
        if sign:
            paint = [(0.75, 0.10, 0.10), (0.10, 0.20, 0.62), (0.85, 0.72, 0.10)][rng.integers(3)]
            size = rng.uniform(0.30, 0.42)
            self.table.add(w.BOX, (x, y, z + height), (0.04, size, size), w.TRAFFIC_SIGN, w.SIGN, paint, (0.9, 0.9, 0.9),
                           heading + rng.normal(0, 0.15), (size, size), self.seed())
        else:
            self.table.add(w.BOX, (x, y, z + height), (0.15, 0.6, 0.08), w.POLE, w.PLAIN, (0.4, 0.4, 0.42), None, heading,
                           seed=self.seed())

    def vehicle(self, pose, mover=-1, truck=None):
        rng = self.rng
        truck = rng.random() < 0.12 if truck is None else truck
        paint, seed = colour_near(rng, PAINTS[rng.integers(len(PAINTS))], 0.1), self.seed()
        parts = Table()
        rubber, glass = (0.07, 0.07, 0.07), (0.12, 0.15, 0.18)
        if truck:
            length, width, height = rng.uniform(5.5, 8), 2.3, rng.uniform(2.6, 3.2)
            parts.add(w.BOX, (-0.9, 0, 0.5 + height / 2), (length / 2 - 0.9, width / 2, height / 2), w.TRUCK, w.PAINT, paint,
                      colour_near(rng, (0.8, 0.8, 0.8)), pattern=(length, height), seed=seed)
            parts.add(w.BOX, (length / 2 - 0.85, 0, 1.35), (0.85, width / 2 - 0.05, 0.95), w.TRUCK, w.CABIN, paint * 0.9, glass,
                      pattern=(1.7, 1.9), seed=seed)
            label, radius, axle = w.TRUCK, 0.45, length / 2 - 1.1
        else:
            length, width = rng.uniform(3.7, 4.8), rng.uniform(1.65, 1.85)
            body, roof = rng.uniform(0.5, 0.65), rng.uniform(0.45, 0.85)
            back = rng.uniform(-0.5, 0.1)
            parts.add(w.BOX, (0, 0, 0.28 + body / 2), (length / 2, width / 2, body / 2), w.CAR, w.PAINT, paint, rubber,
                      pattern=(length, body), seed=seed)
            parts.add(w.BOX, (back, 0, 0.28 + body + roof / 2), (length * 0.28, width / 2 - 0.1, roof / 2), w.CAR, w.CABIN,
                      paint, glass, pattern=(length * 0.56, roof), seed=seed)
            label, radius, axle = w.CAR, 0.32, length / 2 - 0.75
        for sx in (-1, 1):
            for sy in (-1, 1):
                centre = (sx * axle, sy * (width / 2 - radius + 0.04), radius)
                parts.add(w.SPHERE, centre, (radius,) * 3, label, w.PLAIN, rubber, seed=seed)
        self._place(parts, pose, mover)

    def person(self, pose, mover=-1):
        rng = self.rng
        height = rng.uniform(1.5, 1.9)
        parts = Table()
        coat, trousers = rng.uniform(0.1, 0.8, 3), rng.uniform(0.05, 0.4, 3)
        parts.add(w.CYLINDER, (0, 0, (height - 0.25) / 2), (0.24, 0.24, (height - 0.25) / 2), w.PERSON, w.CLOTH, coat, trousers,
                  pattern=(1, height), seed=self.seed())
        parts.add(w.SPHERE, (0, 0, height - 0.13), (0.13,) * 3, w.PERSON, w.PLAIN, colour_near(rng, (0.65, 0.48, 0.38)))
        self._place(parts, pose, mover)

    def cyclist(self, pose, mover=-1):
        rng = self.rng
        parts = Table()
        coat = rng.uniform(0.1, 0.85, 3)
        parts.add(w.BOX, (0, 0, 0.55), (0.75, 0.05, 0.28), w.BICYCLIST, w.PLAIN, rng.uniform(0.1, 0.6, 3), seed=self.seed())
        for sx in (-1, 1):
            parts.add(w.BOX, (0.55 * sx, 0, 0.33), (0.23, 0.03, 0.33), w.BICYCLIST, w.PLAIN, (0.08, 0.08, 0.08))
        parts.add(w.CYLINDER, (-0.1, 0, 1.15), (0.22, 0.22, 0.38), w.BICYCLIST, w.CLOTH, coat, coat * 0.6, pattern=(1, 1.2),
                  seed=self.seed())
        parts.add(w.SPHERE, (0.05, 0, 1.66), (0.14,) * 3, w.BICYCLIST, w.PLAIN, rng.uniform(0.1, 0.9, 3))
        self._place(parts, pose, mover)

    def _place(self, parts, pose, mover):
        """Standing objects go to the world at once; movers stay in their own frame and are carried every frame."""
        for kind, centre, half, _, label, style, (colour, second), pattern, seed, _ in parts.rows:
            yaw = 0.0
            if mover < 0:
                cos, sin = np.cos(pose[3]), np.sin(pose[3])
                x, y, z = centre
                centre = (pose[0] + cos * x - sin * y, pose[1] + sin * x + cos * y, pose[2] + z)
                yaw = pose[3]
            self.table.add(kind, centre, half, label, style, colour, second, yaw, pattern, seed, mover)


def _line_the_street(rng, ground, table, start, end, occluders):
    """Everything that stands still along both sides, from `start` to `end`."""
    build = Builder(rng, ground, table)
    edge = ground.road + ground.sidewalk
    for side in (-1, 1):
        y = start
        green = rng.uniform(0.1, 0.45)  # how open this side of the street is
        while y < end:
            length = rng.uniform(8, 20)
            front = edge + rng.choice([0.1, 0.1, 2.5, 5.0]) * rng.uniform(0.5, 1.2)
            middle = y + length / 2
            if rng.random() > green:
                build.building(middle, side, front, length)
                if front > edge + 1.5 and rng.random() < 0.7:
                    build.barrier(middle, side * (edge + 0.3), length * rng.uniform(0.4, 0.9))
            else:
                build.barrier(middle, side * (edge + rng.uniform(0.2, 1.0)), length)
                for _ in range(rng.poisson(4 * occluders)):
                    build.tree(y + rng.uniform(0, length), side * (edge + rng.uniform(2.5, 16)))
                for _ in range(rng.poisson(3 * occluders)):
                    build.bush(y + rng.uniform(0, length), side * (edge + rng.uniform(1.5, 8)))
                build.building(middle, side, edge + rng.uniform(18, 26), length)
            y += length + rng.choice([0.0, 0.6, 3.0]) * rng.uniform(0.3, 1)

        y = start + rng.uniform(0, 10)
        avenue = rng.random() < 0.5
        while y < end:
            what = rng.random()
            if what < 0.35 and avenue:
                build.tree(y, side * (ground.road + rng.uniform(0.5, 0.9)))
            elif what < 0.8:
                build.pole(y, side * (ground.road + rng.uniform(0.35, 0.6)), rng.random() < 0.5)
            elif ground.sidewalk > 2.2:
                build.bush(y, side * (edge - 0.4))
            y += rng.uniform(4, 14) / max(occluders, 0.05)

        if ground.road > 5:
            y, share = start, rng.uniform(0.2, 0.8) * occluders
            while y < end:
                if rng.random() < share:
                    pose = build.pose(y, side * (ground.road - 1.1 + rng.normal(0, 0.06)))
                    pose[3] += rng.normal(0, 0.03) + (np.pi if side < 0 else 0)
                    build.vehicle(pose, truck=rng.random() < 0.07)
                y += rng.uniform(5.3, 7.5)

        for _ in range(rng.poisson(occluders * (end - start) / 35)):
            build.person(build.pose(rng.uniform(start, end), side * (ground.road + rng.uniform(0.5, ground.sidewalk - 0.3))))


def _traffic(rng, ground, table, path, movers, speed):
    """Moving objects; their primitives carry the index of their `Mover`."""
    build, found = Builder(rng, ground, table), []
    frames = np.arange(len(path))

    def add(make, y, lateral, oncoming=False, **options):
        make(None, mover=len(found), **options)
        found.append(Mover(np.asarray(y, np.float64), lateral, oncoming))

    if rng.random() < 0.5 * movers:  # a vehicle ahead in the same lane
        gap = rng.uniform(9, 28)
        y = path[0] + gap + (path - path[0]) * (1 if speed else 0) + 2 * np.sin(frames / rng.uniform(9, 20))
        add(build.vehicle, y if speed else np.full(len(path), path[-1] + 20), LANE + rng.normal(0, 0.1))
    for _ in range(rng.poisson(2.5 * movers)):
        step = rng.uniform(0.6, 1.3) * speed
        add(build.vehicle, rng.uniform(20, 190) - step * frames, -LANE + rng.normal(0, 0.1), oncoming=True)
    for _ in range(rng.poisson(2.0 * movers)):
        step = rng.uniform(0.08, 0.16) * speed * rng.choice([-1, 1])
        side = rng.choice([-1, 1])
        add(build.person, rng.uniform(5, 90) + step * frames, side * (ground.road + rng.uniform(0.5, ground.sidewalk - 0.3)),
            oncoming=step < 0)
    for _ in range(rng.poisson(0.8 * movers)):
        oncoming = bool(rng.random() < 0.5)
        step = rng.uniform(0.25, 0.5) * speed
        start = rng.uniform(15, 80)
        edge = min(ground.road, 3.5) - 0.45
        add(build.cyclist, start + (-step if oncoming else step) * frames, -edge if oncoming else edge, oncoming=oncoming)
    return found
