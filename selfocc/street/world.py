"""An analytic street: its ground, its solids, where rays hit them and how far points are from them.

World frame: metres, z up, the street runs towards +y. Everything is the ground (a height field),
boxes turned about z, upright cylinders or spheres, so that depth, labels, motion and signed
distance are exact.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

BOX, CYLINDER, SPHERE = range(3)
# Surface styles; shading.py gives them their looks.
PLAIN, FACADE, PAINT, CABIN, FOLIAGE, BARK, SLATS, SIGN, CLOTH = range(9)

CAR, TRUCK, PERSON, BICYCLIST = 1, 4, 6, 7
ROAD, SIDEWALK, BUILDING, FENCE, VEGETATION = 9, 11, 13, 14, 15
TRUNK, TERRAIN, POLE, TRAFFIC_SIGN = 16, 17, 18, 19

FAR = 160.0  # metres; nothing is drawn beyond
TOUCH = 1e-5  # metres between a ray and the ground it is taken to hit
KERB_HEIGHT, KERB_WIDTH = 0.12, 0.06  # metres; a steep smooth step from road to sidewalk
LEVEL = 15.0  # metres from the centre line over which the crossfall levels out


def turned(cos, sin, x, y):
    """(x, y) turned to the left about z; by the opposite angle with -sin."""
    return cos * x - sin * y, sin * x + cos * y


@dataclass(frozen=True)
class Waves:
    """A sum of sines f(y) = sum_i amplitude_i sin(wavenumber_i y + phase_i)."""

    terms: np.ndarray  # [waves, 3] of these

    @classmethod
    def random(cls, rng, wavelengths, *, slope=None, height=None):
        """A wave for each (shortest, longest) wavelength; the sum has bounded slope or height."""
        wavenumber = 2 * np.pi / np.array([rng.uniform(*span) for span in wavelengths])
        share = rng.dirichlet(np.full(len(wavelengths), 2.0))
        amplitude = share * height if slope is None else share * slope / wavenumber
        phase = rng.uniform(0, 2 * np.pi, len(wavelengths))
        return cls(np.stack([amplitude, wavenumber, phase], 1))

    def highest(self):
        """A bound of |f|."""
        return np.abs(self.terms[:, 0]).sum()

    def steepest(self):
        """A bound of |df/dy|."""
        return np.abs(self.terms[:, 0] * self.terms[:, 1]).sum()

    def __call__(self, y):
        return self._sum(np.sin, self.terms[:, 0], y)

    def slope(self, y):
        return self._sum(np.cos, self.terms[:, 0] * self.terms[:, 1], y)

    def _sum(self, wave, amplitudes, y):
        total = np.float32(0)
        for a, k, p in zip(amplitudes, *self.terms.T[1:], strict=True):
            term = y * np.float32(k)
            term += np.float32(p)  # in place, as there are millions of points
            term = wave(term, out=term) if np.ndim(term) else wave(term)
            term *= np.float32(a)
            total = total + term
        return total


@dataclass(frozen=True)
class Ground:
    """The height field: a road along x = centre(y) with grade, crossfall, kerbs and sidewalks."""

    centre: Waves
    profile: Waves
    crossfall: Waves  # tilt across the road, metres per metre
    road: float  # half the width of the road
    sidewalk: float  # width of a sidewalk
    paved: float  # width of its paved part; beyond is grass

    def lateral(self, x, y):
        """Metres to the right of the centre line (seen towards +y)."""
        slope = self.centre.slope(y)
        return (x - self.centre(y)) / np.sqrt(1 + slope * slope)

    def place(self, y, lateral):
        """(x, heading) of a lateral offset at y; the heading of the road in radians from +x."""
        slope = self.centre.slope(y)
        return self.centre(y) + lateral * np.sqrt(1 + slope * slope), np.arctan2(1.0, slope)

    def height(self, x, y):
        return self._height(x, self._along(y))

    def _along(self, y):
        """What a height needs of y: centre line, its stretch, profile and crossfall."""
        slope = self.centre.slope(y)
        return self.centre(y), np.sqrt(1 + slope * slope), self.profile(y), self.crossfall(y)

    def _height(self, x, along):
        centre, stretch, profile, crossfall = along
        lateral = (x - centre) / stretch
        across = lateral / np.sqrt(1 + (lateral * np.float32(1 / LEVEL)) ** 2)
        step = np.clip((np.abs(lateral) - np.float32(self.road)) * np.float32(1 / KERB_WIDTH), 0, 1)
        step = step * step * (3 - 2 * step)
        return profile + crossfall * across + np.float32(KERB_HEIGHT) * step

    def normal(self, x, y, reach=0.02):
        """Unit normals [.., 3], from central differences over +-`reach` metres."""
        here = self._along(y)
        dx = (self._height(x + reach, here) - self._height(x - reach, here)) / (2 * reach)
        dy = (self.height(x, y + reach) - self.height(x, y - reach)) / (2 * reach)
        scale = 1 / np.sqrt(1 + dx * dx + dy * dy)
        return np.stack([-dx * scale, -dy * scale, scale], -1)

    def label(self, x, y):
        lateral = np.abs(self.lateral(x, y))
        walk = np.where(lateral < self.road + self.paved, SIDEWALK, TERRAIN)
        return np.where(lateral < self.road + KERB_WIDTH / 2, ROAD, walk).astype(np.uint8)

    def signed_distance(self, points):
        """[.., 3] -> [..] metres; exact to first order in the curvature."""
        x, y, z = np.moveaxis(points, -1, 0)
        return (z - self.height(x, y)) * self.normal(x, y)[..., 2]

    def cast(self, origin, directions, limit, steps=14, refinements=24):
        """First hit of rays origin + t directions, [R, 3] -> t [R] (inf: none within FAR).

        limit [R]: hits farther than this need not be found.

        March within the slab of heights the ground can have, then false position (Illinois) in the
        first bracket."""
        relief = self.profile.highest() + LEVEL * self.crossfall.highest()
        x0, y0, z0 = origin.astype(np.float32)
        dz = directions[:, 2]
        reach = np.float32(FAR) / np.maximum(np.hypot(directions[:, 0], directions[:, 1]), 1e-6)
        with np.errstate(divide="ignore"):
            enter = (np.float32(relief + KERB_HEIGHT) - z0) / dz
            leave = (np.float32(-relief) - z0) / dz
        near = np.where(dz < 0, np.maximum(enter, 0.5), 0.5)
        far = np.minimum(reach, np.select([dz < 0, dz > 0], [leave * 1.001, enter], reach))
        found = np.full(len(directions), np.inf, np.float32)
        rays = np.flatnonzero((far > near) & (dz < 0.12) & (near < limit))
        near, far, d = near[rays], far[rays], np.ascontiguousarray(directions[rays].T)

        def clearance(t, d):
            return z0 + t * d[2] - self.height(x0 + t * d[0], y0 + t * d[1])

        ratio = (far / near) ** np.float32(1 / steps)
        a, left, safe = near, np.full(len(rays), steps), self._safe(origin, d)
        for _ in range(steps - 1):
            b = a * ratio
            a, left = np.where(b < safe, b, a), left - (b < safe)
        fa, brackets = clearance(a, d), []
        for _ in range(steps):
            b = a * ratio
            fb = clearance(b, d)
            below = fb < 0
            hit = np.flatnonzero(below & (fa >= 0))
            brackets.append((rays[hit], d[:, hit], a[hit], fa[hit], b[hit], fb[hit]))
            left = left - 1
            on = np.flatnonzero(~below & (b < limit[rays]) & (left > 0))
            rays, d, ratio, left = rays[on], d[:, on], ratio[on], left[on]
            a, fa = b[on], fb[on]
        rays, d, a, fa, b, fb = (np.concatenate(v, -1) for v in zip(*brackets, strict=True))
        for _ in range(refinements):
            t = a - fa * (b - a) / np.minimum(fb - fa, np.float32(-1e-12))
            f = clearance(t, d)
            found[rays] = t
            above = f > 0
            a, fa, b, fb = (
                np.where(above, t, a),
                np.where(above, f, fa * np.float32(0.5)),
                np.where(above, b, t),
                np.where(above, fb * np.float32(0.5), f),
            )
            on = np.flatnonzero(np.abs(f) > TOUCH)
            rays, d, a, fa, b, fb = rays[on], d[:, on], a[on], fa[on], b[on], fb[on]
        return found

    def _safe(self, origin, d):
        """t [R] up to which rays origin + t d, [3, R], are above any ground of its steepness."""
        x, y, z = origin
        tilt, dy = self.crossfall.highest(), np.abs(d[1])
        aside = np.abs(d[0]) + self.centre.steepest() * dy
        room = z - self.profile(y) - KERB_HEIGHT - tilt * np.abs(self.lateral(x, y)) - 0.01
        falls = self.profile.steepest() * dy + tilt * aside - d[2]
        return np.where(falls > 0, max(room, 0) / np.maximum(falls, 1e-6), np.inf)


@dataclass(frozen=True)
class Solids:
    """A table of P primitives. half[0] is the radius of upright cylinders and of spheres."""

    kind: np.ndarray  # [P] BOX, CYLINDER or SPHERE
    centre: np.ndarray  # [P, 3] world
    half: np.ndarray  # [P, 3] half extents along the solid's own axes
    yaw: np.ndarray  # [P] radians from +x to the solid's own x axis
    label: np.ndarray  # [P] semantic id
    style: np.ndarray  # [P] how it is painted
    colour: np.ndarray  # [P, 2, 3] main and second colour
    pattern: np.ndarray  # [P, 2] size of the style's pattern, metres
    seed: np.ndarray  # [P] offset of its noise
    mover: np.ndarray  # [P] index of the moving object it belongs to, -1 if it stands still

    def __len__(self):
        return len(self.kind)

    @staticmethod
    def join(tables):
        return Solids(
            *(np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(Solids))
        )

    def only(self, which):
        """The table of some of them: a mask [P] or indices."""
        return Solids(*(getattr(self, f.name)[which] for f in fields(Solids)))

    def moved(self, pose):
        """Carried by `pose` = [P, 4] (x, y, z, yaw) of the object frames they are given in."""
        cos, sin = np.cos(pose[:, 3]), np.sin(pose[:, 3])
        x, y, z = self.centre.T
        centre = np.stack(
            [pose[:, 0] + cos * x - sin * y, pose[:, 1] + sin * x + cos * y, pose[:, 2] + z], -1
        )
        return replace(self, centre=centre, yaw=self.yaw + pose[:, 3])

    def to_local(self, points, index):
        """World points [R, 3] in the axes of solids index [R]; and the cos and sin of their yaw."""
        cos = np.cos(self.yaw).astype(np.float32)[index]
        sin = np.sin(self.yaw).astype(np.float32)[index]
        rel = points - self.centre.astype(np.float32)[index]
        x, y = turned(cos, -sin, rel[..., 0], rel[..., 1])
        return np.stack([x, y, rel[..., 2]], -1), cos, sin

    def corners(self):
        """[P, 8, 3] corners of the bounding boxes; corner i has the signs of the bits of i."""
        signs = np.array([[1 if i >> k & 1 else -1 for k in range(3)] for i in range(8)])
        x, y, z = np.moveaxis(self.half[:, None] * signs, -1, 0)
        x, y = turned(np.cos(self.yaw)[:, None], np.sin(self.yaw)[:, None], x, y)
        return self.centre[:, None] + np.stack([x, y, z], -1)

    def normal(self, points, index):
        """Outward unit normals [R, 3] (world) at surface points [R, 3] on solids index [R].

        Also the points in the axes of the solids [R, 3], and the axis [R] nearest to the normal."""
        local, cos, sin = self.to_local(points, index)
        kind, half = self.kind[index], self.half.astype(np.float32)[index]
        relative = local / half
        side, round_ = np.abs(relative), kind == CYLINDER
        side[round_, 0] = np.hypot(relative[round_, 0], relative[round_, 1])
        side[round_, 1] = 0
        axis = side.argmax(-1)
        flat = (np.arange(3) == axis[:, None]) * np.sign(local)
        curved = local.copy()
        curved[..., 2] = np.where(kind == SPHERE, curved[..., 2], 0)
        curved /= np.maximum(np.linalg.norm(curved, axis=-1, keepdims=True), 1e-9)
        smooth = (kind == SPHERE) | ((kind == CYLINDER) & (axis == 0))
        n = np.where(smooth[:, None], curved, flat)
        world = np.stack([*turned(cos, sin, n[..., 0], n[..., 1]), n[..., 2]], -1)
        return world.astype(np.float32), local, axis

    def signed_distance(self, points, index):
        """Signed distance [R] of world points [R, 3] to solids index [R] (or one index for all)."""
        local, _, _ = self.to_local(points, index)
        half, kind = self.half.astype(np.float32)[index], self.kind[index]
        ball = np.linalg.norm(local, axis=-1) - half[..., 0]
        q = np.abs(local) - half
        radial = np.hypot(local[..., 0], local[..., 1]) - half[..., 0]
        # The cylinder is a box in (radius, height).
        q0 = np.where(kind == CYLINDER, radial, q[..., 0])
        q1 = np.where(kind == CYLINDER, radial, q[..., 1])
        outside = np.sqrt(
            np.maximum(q0, 0) ** 2
            + np.maximum(q[..., 2], 0) ** 2
            + np.where(kind == CYLINDER, 0, np.maximum(q1, 0) ** 2)
        )
        inside = np.minimum(np.maximum(np.maximum(q0, q1), q[..., 2]), 0)
        return np.where(kind == SPHERE, ball, outside + inside)

    def cast(self, origin, directions, solid, ray):
        """t of the first hit of ray[i] with solid[i] for all pairs i; inf where they miss."""
        t = np.full(len(solid), np.inf, np.float32)
        x, y, z = (origin - self.centre).T
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        o = np.stack([*turned(cos, -sin, x, y), z]).astype(np.float32)
        half = self.half.T.astype(np.float32)
        cos, sin = cos.astype(np.float32), sin.astype(np.float32)
        d = np.ascontiguousarray(directions.T)
        kinds = self.kind[solid]
        for kind, hit in ((BOX, _hit_box), (CYLINDER, _hit_cylinder), (SPHERE, _hit_sphere)):
            pair = np.flatnonzero(kinds == kind)
            if len(pair):
                s, r = solid[pair], ray[pair]
                t[pair] = hit(o, half, s, *turned(cos[s], -sin[s], d[0][r], d[1][r]), d[2][r])
        return t


def _hit_box(o, half, s, dx, dy, dz):
    near, far = np.float32(-np.inf), np.float32(np.inf)
    for axis, d in enumerate((dx, dy, dz)):
        inverse = 1 / np.where(d == 0, np.float32(1e-12), d)
        middle = -o[axis][s] * inverse
        spread = np.abs(half[axis][s] * inverse)
        near, far = np.maximum(near, middle - spread), np.minimum(far, middle + spread)
    return np.where((near < far) & (near > 0), near, np.float32(np.inf))


def _hit_cylinder(o, half, s, dx, dy, dz):
    ox, oy, oz = o[0][s], o[1][s], o[2][s]
    a = np.maximum(dx * dx + dy * dy, np.float32(1e-12))
    b = ox * dx + oy * dy
    # The discriminant from the distance between axis and ray: no cancellation for far, thin poles.
    cross = ox * dy - oy * dx
    disc = half[0][s] ** 2 * a - cross * cross
    root = np.sqrt(np.maximum(disc, 0))
    inverse = 1 / np.where(dz == 0, np.float32(1e-12), dz)
    middle, spread = -oz * inverse, np.abs(half[2][s] * inverse)
    near = np.maximum((-b - root) / a, middle - spread)
    far = np.minimum((-b + root) / a, middle + spread)
    return np.where((disc > 0) & (near < far) & (near > 0), near, np.float32(np.inf))


def _hit_sphere(o, half, s, dx, dy, dz):
    ox, oy, oz = o[0][s], o[1][s], o[2][s]
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    cx, cy, cz = oy * dz - oz * dy, oz * dx - ox * dz, ox * dy - oy * dx
    disc = half[0][s] ** 2 * a - (cx * cx + cy * cy + cz * cz)
    t = (-b - np.sqrt(np.maximum(disc, 0))) / a
    return np.where((disc > 0) & (t > 0), t, np.float32(np.inf))


def rectangle_pairs(top, bottom, left, right, width):
    """All pairs (solid, pixel) of rectangles [top:bottom, left:right] in a raster of `width`."""
    columns = np.maximum(right - left, 0)
    count = np.maximum(bottom - top, 0) * columns
    solid = np.repeat(np.arange(len(count), dtype=np.int32), count)
    within = np.arange(count.sum(), dtype=np.int32) - np.repeat(
        (np.cumsum(count) - count).astype(np.int32), count
    )
    row = within // columns.astype(np.int32)[solid]
    column = within - row * columns.astype(np.int32)[solid]
    return solid, (row + top.astype(np.int32)[solid]) * width + (
        column + left.astype(np.int32)[solid]
    ) % width


def first_hits(ground, solids, origin, directions, solid, ray):
    """The scene seen along rays: t [R] (inf: sky) and the solid hit [R] (-1: ground or sky).

    origin [3]; directions [R, 3] float32; (solid, ray): the pairs that can meet."""
    pair_t = solids.cast(origin, directions, solid, ray)
    hits = np.flatnonzero(pair_t < np.inf)
    solid, ray, pair_t = solid[hits], ray[hits], pair_t[hits]
    nearest = np.full(len(directions), np.inf, np.float32)
    np.minimum.at(nearest, ray, pair_t)
    index = np.full(len(nearest), -1, np.int32)
    won = pair_t == nearest[ray]
    index[ray[won]] = solid[won]
    ground_t = ground.cast(origin, directions, nearest)
    first = ground_t <= nearest
    return np.where(first, ground_t, nearest), np.where(first, np.int32(-1), index)
