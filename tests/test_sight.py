"""What cameras and LiDARs see of voxels: scenes made by hand, and rays marched in small steps."""

import math

import pytest
import torch

from selfocc import metrics, protocols, sight
from selfocc.presets import build
from selfocc.scores import SEEN, Scores
from selfocc.sight import Cameras, Rays, Sight, before, cast, ends, seen_in_truth

BOX = (-4.0, 0.0, -2.0, 4.0, 8.0, 2.0)  # voxels of a metre: [8, 8, 4]


def camera():
    """In the middle of the near side, looking along y: 41 x 81 pixels, 45 degrees to each side."""
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    pose[:3, 3] = torch.tensor([0.1, -0.5, 0.1])
    intrinsics = torch.tensor([[40.0, 0, 40], [0, 40, 20], [0, 0, 1]], dtype=torch.float64)
    return Cameras(intrinsics[None], pose[None])


def street():
    """A wall across the left half at y = 3, a post behind it, and one to the right, at y = 5."""
    labels = torch.zeros(8, 8, 4, dtype=torch.uint8)
    labels[3, :4] = 13
    labels[5, 2], labels[5, 6] = 18, 18
    labels[1, 3] = metrics.UNKNOWN  # which hides nothing
    return labels


def check_street(seen):
    assert seen[1:3, 3:5, 1:3].all() and seen[3, 2:4, 1:3].all()  # free, and the wall
    assert not seen[4:, :3].any() and not seen[5, 2].any()  # all that is behind the wall
    assert seen[5, 6, 1:3].all() and not seen[7, 7, 1:3].any()  # the post, and its shadow
    assert not seen[0, 0].any() and not seen[0, 7].any()  # beside the image
    assert seen[7, 4, 1:3].all()


def test_what_the_truth_hides():
    check_street(seen_in_truth(street(), camera(), (41, 81), BOX))


def test_what_depth_hides():
    labels, size = street(), (41, 81)
    occupied = (labels > 0) & (labels < 255)
    (origin,), (directions,) = camera().rays(size)
    depth = torch.linspace(0, 12, 1201)[1:]  # in steps of a centimetre
    cell = (origin + directions[:, None] * depth[:, None] - torch.tensor(BOX[:3])).floor().long()
    inside = ((cell >= 0) & (cell < torch.tensor([8, 8, 4]))).all(-1)
    x, y, z = cell.clamp(min=0).minimum(torch.tensor([7, 7, 3])).unbind(-1)
    hit = inside & occupied[y, x, z]
    exact = torch.where(hit.any(1), depth[hit.int().argmax(1)], 0).view(1, *size)
    assert (exact[0, 20] > 0).float().mean() == pytest.approx(0.6, abs=0.1)
    wall = ends(exact, camera(), BOX, (8, 8, 4))
    assert torch.equal(wall & occupied, wall) and wall[3, 1:4, 1:3].all() and not wall[5, 2].any()
    check_street(wall | before(exact, camera(), BOX, (8, 8, 4)))


def test_rays_by_hand():
    occupied = torch.zeros(8, 8, 4, dtype=torch.bool)
    occupied[2, 6, 1] = True  # x 2 to 3, y 2 to 3, z -1 to 0
    starts = torch.tensor([[-3.5, 2.5, -0.5], [-9, 2.5, -0.5], [2.5, 2.5, -0.5], [3.5, 2.5, -0.5]])
    along_x = torch.tensor([[1.0, 0, 0]]).expand(4, 3)
    place, left = cast(occupied, BOX, starts, along_x)
    assert place.tolist() == [(2 * 8 + 6) * 4 + 1] * 3 + [-1]
    assert left.tolist() == [6.5, 12, 0.5, math.inf]
    assert cast(occupied, BOX, starts, 2 * along_x)[1].tolist() == [3.25, 6, 0.25, math.inf]
    assert cast(occupied, BOX, starts, -along_x)[0].tolist()[:2] == [-1, -1]


def test_rays_meet_what_small_steps_meet():
    torch.manual_seed(0)
    occupied = torch.rand(8, 8, 4) < 0.1
    starts = torch.rand(400, 3) * 12 - torch.tensor([6.0, 2, 6])
    directions = torch.nn.functional.normalize(torch.randn(400, 3), dim=1)
    place, left = cast(occupied, BOX, starts, directions)
    steps = torch.arange(0, 25, 0.002)
    cell = (starts[:, None] + directions[:, None] * steps[:, None] - torch.tensor(BOX[:3])).floor()
    x, y, z = cell.long().unbind(-1)
    number = torch.where(((cell >= 0) & (cell < torch.tensor([8, 8, 4]))).all(-1),
                         (y * 8 + x) * 4 + z, 256)  # fmt: skip
    hit = torch.cat([occupied.flatten(), torch.tensor([False])])[number]
    first = torch.where(hit.any(1), number.gather(1, hit.int().argmax(1, True))[:, 0], -1)
    same = place == first
    assert same.float().mean() > 0.99 and 0.05 < (first >= 0).float().mean() < 0.9  # not at edges
    there = same & (place >= 0)
    last = (number[there] == place[there, None]).int().cumsum(1).argmax(1) * 0.002
    assert torch.allclose(left[there], last, atol=0.01)


def test_ranges_are_one_within_the_other():
    reach = sight.ring((-25.6, 0, -2, 25.6, 51.2, 4.4), (128, 128, 16))
    assert reach[31, 64, 0] == 0 and reach[32, 64, 0] == 1 and reach[0, 64 - 33, 0] == 1
    assert reach[63, 127, 0] == 1 and reach[64, 64, 3] == 2 and reach.max() == 2


def test_the_rays_of_sparseocc():
    rays = sight.lidar_directions()
    assert rays.shape == (14040, 3)
    assert torch.allclose(rays.norm(dim=1), torch.ones(14040))
    pitch = rays[::360, 2].asin()
    slopes = [-1 / k for k in range(1, 11)]
    assert pitch[:10].tan().tolist() == pytest.approx(slopes, rel=1e-5)
    assert pitch[-2] < 0.21 <= pitch[-1] and (pitch.diff()[9:] - pitch.diff()[8]).abs().max() < 1e-5
    assert rays[360 + 90].tolist() == pytest.approx(
        [0, math.cos(pitch[1]), math.sin(pitch[1])], abs=1e-6
    )


def test_rays_that_count():
    labels = torch.zeros(8, 8, 4, dtype=torch.uint8)
    labels[:, :, 0] = 9
    labels[:, 6:, 1] = metrics.UNKNOWN
    rays = sight.lidar_rays(labels, BOX, torch.tensor([[0.0, 4, 0.5]]))
    assert len(rays.left) > 500 and (rays.label == 9).all() and (rays.directions[:, 2] < 0).all()
    meet = rays.origins + rays.directions * rays.left[:, None]
    assert (meet[:, 2] >= -2 - 1e-4).all() and (meet[:, 2] < -1 + 1e-4).all()
    assert meet[:, 0].max() < 2.3 and meet[:, 0].min() < -3.9  # nothing through the unknown


def test_places_of_the_lidar():
    poses = torch.eye(4).repeat(30, 1, 1)
    poses[:, 1, 3] = torch.arange(30) - 10.0
    places = sight.lidar_places(poses, 10, (-4, 0, -2, 4, 20, 2))
    assert places[:, 1].tolist() == [0, 3, 6, 8, 11, 13, 16, 18]
    poses[:, 0, 3] = 3.5
    assert sight.lidar_places(poses, 10, (-4, 0, -2, 4, 20, 2))[:, 1].tolist() == [0]


def test_ray_iou_by_hand():
    truth, inf = torch.tensor([10.0, 10, 10, 10, 10]), math.inf
    left = torch.tensor([10.5, 11, 7, 14, inf])  # off by 0.5, 1, 3, 4, and nothing met
    truth_label, label = torch.tensor([1, 1, 2, 2, 2]), torch.tensor([1, 2, 2, 2, 0])
    counts = metrics.ray_counts(left, label, truth, truth_label, 3)
    assert counts.tolist() == [[5, 2, 3], [4, 1, 3], [1, 1, 0], [2, 1, 0], [3, 1, 1]]
    whole, first, second = metrics.ray_scores(counts)
    assert whole == pytest.approx({"ray_1": 1 / 8, "ray_2": 2 / 7, "ray_4": 3 / 6,
                                   "ray": (1 / 8 + 2 / 7 + 3 / 6) / 3})  # fmt: skip
    assert first["ray_1"] == first["ray_4"] == 1 / 2 and second["ray_4"] == 1 / 5
    assert metrics.ray_scores(torch.zeros(5, 1)) == [{}]


@pytest.mark.parametrize("protocol", protocols.PROTOCOLS)
def test_tables_by_range_leave_the_others_alone(protocol):
    """Half a street is predicted; what is seen and near counts, and published columns stay."""
    config = build("kitti", ["data.dataset=kitti"])
    model = torch.nn.Module()
    model.config = config
    scores = Scores(model, protocols.choose(config, protocol))
    shape, reach = (256, 256, 32), sight.ring(config.volume.box, (256, 256, 32))
    labels = torch.zeros(shape, dtype=torch.uint8)
    labels[8:-8, 128, 8:20] = 13  # all along y
    labels[8:-8, 129, 8:20] = 13
    labels[8:-8, 128, 8] = 9  # of ground
    volume = torch.ones(1, 4, 257, 257, 33)
    volume[:, :, :60, 120:138] = -1  # occupied up to about 12 m
    seen = torch.ones(shape, dtype=torch.bool)
    seen[:, 129], seen[:, :128], seen[:, 131:] = False, False, False
    plain = scores.occupancy(volume, labels)
    record = scores.occupancy(volume, labels, None, Sight(seen, labels > 0, "exact depth"))
    names = {name for name in record if name.startswith("seen/")}
    assert plain.keys() == record.keys() - names and len(names) == len(scores.thresholds) + (
        1 if protocol == "own" else 0
    )
    assert all(torch.equal(plain[name], record[name]) for name in plain)
    tables = scores.tables([record, record])
    assert tables["occupancy"] == scores.tables([plain])["occupancy"]
    assert set(tables[SEEN]["exact depth"].values()) == {1.0}
    ours = tables[SEEN]["SelfOcc"]
    sdf, _ = protocols.read_voxels(volume, 0, scores.rules, config.volume.box, shape)
    found, true = scores.rules.crop(sdf) <= 0, labels > 0
    for k, metres in enumerate(sight.RANGES):
        for name, mask in (("iou", seen), ("iou_above", seen & (torch.arange(32) > 9))):
            near = mask & (reach <= k)
            both, either = ((found & true)[near].sum(), (found | true)[near].sum())
            assert ours[f"{name}_{metres}"] == pytest.approx(float(both / either), rel=1e-6)
    assert ours["iou_12.8"] > ours["iou_25.6"] > ours["iou_51.2"] > 0


def test_rays_through_the_whole_tables():
    config = build("nuscenes")
    model = torch.nn.Module()
    model.config = config
    scores = Scores(model, protocols.choose(config, "own"))
    labels = torch.zeros(200, 200, 16, dtype=torch.uint8)
    labels[..., 0] = 11
    labels[120:124, 80:120, 1:8] = 4
    rays = sight.lidar_rays(labels, config.volume.box, torch.tensor([[1.0, 0, 1.8]]))
    assert {4, 11} == set(rays.label.tolist())
    classes = torch.where(labels == 4, 3, 12)  # ids of openseed21: car, road
    logits = torch.nn.functional.one_hot(classes.long(), 21).movedim(-1, 0).float()
    coarse = torch.cat(
        [torch.where(labels > 0, -9.0, 9.0)[None], torch.zeros(3, 200, 200, 16), logits]
    )
    nodes = torch.full((1, 25, 401, 401, 33), 9.0)
    nodes[:, :, 1::2, 1::2, 1::2] = coarse
    record = scores.occupancy(nodes, labels, None, None, rays)
    tables = scores.tables([record])
    assert set(tables["RayIoU"]["SelfOcc"].values()) == {1.0}
    assert set(tables["RayIoU"]["flat ground"].values()) != {1.0}
    assert tables["RayIoU by class"].keys() == {"mean", "car", "driveable_surface"}
    assert tables["RayIoU by class"]["mean"]["ray"] == 1
    none = Rays(*(part[:0] for part in (rays.origins, rays.directions, rays.left, rays.label)))
    assert (
        scores.tables([scores.occupancy(nodes, labels, None, None, none)])["RayIoU"]["SelfOcc"]
        == {}
    )
