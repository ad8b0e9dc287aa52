"""The published protocols against recorded numbers; truth is perfect, and moved truth is not."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfocc import InputError, config, labels, metrics, presets, protocols
from selfocc.batch import Sequence
from selfocc.geometry import node_positions
from selfocc.metrics import DEPTH_ERRORS
from selfocc.scores import Scores

GOLDENS = Path(__file__).parent / "data" / "metrics"


@pytest.fixture(scope="module")
def published():
    return json.loads((GOLDENS / "metrics.json").read_text())


def load(name):
    with np.load(GOLDENS / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def rules(dataset, protocol="published"):
    return protocols.choose(presets.build("kitti", [f"data.dataset={dataset}"]), protocol)


def percent(value):
    """Of the published metrics, which count in float32."""
    return pytest.approx(value / 100, rel=2e-7)


def counted(occupied, truth, mask=None):
    """Counts of what is occupied, bool [ny, nx, nz]."""
    sdf, all_or_masked = torch.where(occupied, -1.0, 1.0), 0 if mask is None else 1
    mask = torch.zeros_like(occupied) if mask is None else mask
    return metrics.threshold_counts(sdf, truth, mask, torch.zeros(1))[all_or_masked]


def scored(counts):
    return metrics.best_threshold(counts, torch.zeros(1))


# recorded numbers


def kitti_frames():
    volumes = load("kitti_volumes.npz")
    for frame in ("frame0", "frame1"):
        of_frame = {k.split(".")[1]: v for k, v in volumes.items() if k.startswith(frame)}
        yield of_frame["gt_raw"].flip(1), of_frame


def test_kitti_occupancy_equals_the_published(published):
    occupancy = unknown_as_free = 0
    for truth, frame in kitti_frames():
        occupied = rules("kitti").crop(frame["sdf"] <= 0)
        assert torch.equal(occupied, frame["pred_occ_post"].bool())
        assert torch.equal(rules("kitti").crop(frame["sdf"]) <= 0, occupied)
        occupancy += counted(occupied, truth)
        unknown_as_free += counted(occupied, torch.where(truth == 255, 0, truth))
    want, counts = published["kitti"]["SSCMetrics2"], published["kitti"]["SSCMetrics2_counts"]
    (fp, _), (tp, fn) = occupancy.tolist()
    assert [tp, fp, fn] == [counts[key] for key in ("tp", "fp", "fn")]
    for key in ("iou", "precision", "recall"):
        assert scored(occupancy)[key] == pytest.approx(want[key], rel=1e-7)
    counts = published["kitti"]["IoU_counts"]
    (fp, _), (tp, fn) = unknown_as_free.tolist()
    assert [[tp], [tp + fp], [tp + fn]] == [counts[k] for k in ("correct", "positive", "seen")]
    assert scored(unknown_as_free)["iou"] == percent(published["kitti"]["IoU_class_percent"])


def test_kitti_semantics_equal_the_published(published):
    confusion = 0
    for truth, frame in kitti_frames():
        classes = torch.where(frame["sdf"] <= 0, frame["pred_sem"], 0)
        classes = rules("kitti").crop(classes)
        assert torch.equal(classes, frame["pred_miou"])
        confusion += metrics.confusion_counts(classes, truth, 20)
    want, results = published["kitti"], metrics.class_scores(confusion)
    correct = confusion.diagonal()
    assert correct.tolist() == want["SSCMetrics20_tps"]
    assert (confusion.sum(dim=0) - correct).tolist() == want["SSCMetrics20_fps"]
    assert (confusion.sum(dim=1) - correct).tolist() == want["SSCMetrics20_fns"]
    assert results["iou"] == pytest.approx(want["SSCMetrics20"]["iou_ssc"], rel=1e-6)
    assert results["miou_ssc"] == pytest.approx(want["SSCMetrics20"]["iou_ssc_mean"], rel=1e-6)
    check_mean_iou(confusion, want["MeanIoU"])


def check_mean_iou(confusion, want):
    """Counts of every class, and their mean with 1 for classes never seen."""
    seen, positive = confusion.sum(dim=1), confusion.sum(dim=0)
    counts = zip(seen, positive, confusion.diagonal(), strict=True)
    ours = [{"seen": s, "positive": p, "correct": c} for s, p, c in counts][1:]
    assert ours == want["counts"]
    assert metrics.class_scores(confusion)["miou_published"] == percent(want["mIoU_percent"])


@pytest.fixture(scope="module")
def nuscenes():
    """Recorded SDF and logits [22, y, x, z] on the published grid, truth [y, x, z], mask, results.

    Only a coarse volume is kept; the grid was made of it in this way.
    """
    recorded = load("nuscenes_volumes.npz")
    size = recorded["gt_semantics"].shape
    grid = F.interpolate(recorded["lowres"], size, mode="trilinear", align_corners=True)[0]
    grid[0] += 0.15
    truth = recorded["gt_semantics"].transpose(0, 1)
    return (
        grid,
        torch.where(truth == 17, 0, truth),
        recorded["mask_camera"].transpose(0, 1),
        recorded,
    )


@pytest.mark.parametrize("pose", ["identity", "shifted"])
def test_occ3d_equals_the_published(pose, nuscenes, published):
    grid, truth, mask, recorded = nuscenes
    of_nuscenes = rules("nuscenes")
    if pose == "shifted":
        grid = protocols.move_grid(grid, of_nuscenes.box, recorded["shifted.ego2lidar"])
    sdf = of_nuscenes.crop(grid[0])
    lut = torch.tensor(
        labels.label_map(config.DataConfig(label_map="openseed21")).voxel_classes("nuscenes")
    )
    classes = torch.where(sdf <= 0, lut[grid[1:].argmax(0)], 0)
    if pose == "shifted":
        assert torch.equal((sdf <= 0).transpose(0, 1), recorded["shifted.pred_occ"].bool())
        assert torch.equal(classes.transpose(0, 1), recorded["shifted.pred_miou"])
    want = published[f"nuscenes_{pose}"]
    for counts, key in (
        (counted(sdf <= 0, truth, mask), "iou"), (counted(sdf <= 0, truth), "iou_nomask"),
    ):  # fmt: skip
        (fp, _), (tp, fn) = counts.tolist()
        assert want[key]["counts"] == [{"seen": tp + fn, "correct": tp, "positive": tp + fp}]
        assert scored(counts)["iou"] == percent(want[key]["mIoU_percent"])
    confusion = metrics.confusion_counts(classes, torch.where(mask, truth, 255), 17)
    check_mean_iou(confusion, want["miou"])


def test_depth_equals_the_published(published):
    data, sums = load("depth.npz"), 0
    for frame in ("frame0", "frame1"):
        predicted, location, truth, mask = (
            data[f"{frame}.{key}"] for key in ("pred", "loc", "gt", "mask")
        )
        read = protocols.read_depth(predicted, location, displaced=True)
        sums += metrics.depth_sums(read, torch.where(mask, truth, 0))
    want = published["depth"]
    for i, name in enumerate((*DEPTH_ERRORS, "scaling")):
        ours = metrics.depth_means(sums)[..., i]
        theirs = torch.tensor(want["per_type_cam"][name]).double()
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=0), name  # theirs is float32
    for i, results in enumerate(metrics.depth_scores(sums)):
        for ours, theirs in (*zip(DEPTH_ERRORS, DEPTH_ERRORS), ("scale", "scaling")):  # noqa: B905
            assert results[ours] == pytest.approx(want["all_cams"][theirs][i], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "dataset", "points", "matrix", "size"),
    [
        ("kitti", "kitti", "points", "lidar2img_kitti", (96, 320)),
        ("kitti_raw", "kitti_raw", "points", "lidar2img_kitti", (96, 320)),
        ("nus", "nuscenes", "nus_points", "lidar2img_nus", (128, 256)),
    ],
)
def test_lidar_truth_equals_the_published(name, dataset, points, matrix, size):
    data = load("lidar_depth_gt.npz")
    cloud = data[points][:, :3]
    if points == "points":  # recorded in the velodyne's axes
        cloud = torch.stack([-cloud[:, 1], cloud[:, 0], cloud[:, 2]], 1)
    location, depth = protocols.lidar_truth(cloud, data[matrix], size, rules(dataset))
    mask = (depth > 0) & (depth < 80)
    assert torch.equal(mask, data[f"{name}.mask"])
    assert torch.allclose(depth[mask], data[f"{name}.depth"][mask], rtol=1e-12, atol=0)
    assert torch.allclose(location[mask], data[f"{name}.loc"][mask], rtol=1e-12, atol=0)


# truth and moved truth

MOVES = {
    "shifted in x": lambda v: v.roll(1, -2),
    "shifted in y": lambda v: v.roll(-3, -3),
    "shifted in z": lambda v: v.roll(1, -1),
    "mirrored": lambda v: v.flip(-2),
    "rotated": lambda v: v.rot90(1, (-3, -2)),
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A label map of four classes, as every class takes time."""
    file = tmp_path_factory.mktemp("labels") / "few.json"
    names = (("driveable_surface", "road"), ("car", "car"), ("free", "free"), ("manmade", "pole"))
    file.write_text(json.dumps([{"name": k, "occ3d": o, "kitti": k} for o, k in names]))
    return file


def truth_and_volume(dataset, protocol, few, seed=0):
    """Random labels, and settings and a volume that say the same where the protocol reads it.

    Nodes lie on the points that are read: from end to end as published, else at voxel centres.
    """
    settings = [f"data.dataset={dataset}", f"data.label_map={few}"]
    of_data = protocols.choose(presets.build("kitti", settings), protocol)
    shape = (256, 256, 32) if dataset == "kitti" else (200, 200, 16)
    lo, hi = np.array(of_data.box).reshape(2, 3)
    if not of_data.ends:
        half = (hi - lo) / np.array([shape[1], shape[0], shape[2]]) / 2
        lo, hi = lo + half, hi - half
    box = ",".join(str(float(x)) for x in (*lo, *hi))
    lut = labels.label_map(presets.build("kitti", settings).data).voxel_classes(dataset)
    settings += [f"volume.box={box}", "volume.nodes=" + ",".join(map(str, shape))]
    settings.append(f"field.classes={len(lut)}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(lut), shape, generator=generator)
    truth = of_data.crop(torch.tensor(lut, dtype=torch.uint8)[ids])
    logits = F.one_hot(ids, len(lut)).movedim(-1, 0).float()
    volume = torch.cat([torch.where(truth > 0, -1.0, 1.0)[None], logits])[None]
    truth[torch.rand(shape, generator=generator) < 0.1] = metrics.UNKNOWN
    return presets.build("kitti", settings), of_data, truth, volume


@pytest.mark.parametrize(
    ("dataset", "protocol"),
    [("kitti", "published"), ("nuscenes", "published"), ("nuscenes", "corrected")],
)
def test_true_voxels_are_perfect(dataset, protocol, few):
    settings, of_data, truth, volume = truth_and_volume(dataset, protocol, few)
    scores = Scores(SimpleNamespace(config=settings), of_data)
    tables = scores.tables([scores.occupancy(volume, truth)])
    row = tables["occupancy"]["SelfOcc"]
    assert (row["iou"], row["precision"], row["recall"], row["iou_above"]) == (1, 1, 1, 1)
    semantics = {name: row["iou"] for name, row in tables["semantics"].items()}
    never_seen = semantics.pop("mIoU, never seen counts 0")
    assert set(semantics.values()) == {1} and len(semantics) == 2 + 3
    assert never_seen == pytest.approx(3 / (len(labels.voxel_names(dataset)) - 1))


@pytest.mark.parametrize(
    ("protocol", "move"), [("published", "shifted in x"), ("corrected", "mirrored")]
)
def test_moved_voxels_are_not(protocol, move, few):
    settings, of_data, truth, volume = truth_and_volume("nuscenes", protocol, few)
    scores = Scores(SimpleNamespace(config=settings), of_data)
    tables = scores.tables([scores.occupancy(MOVES[move](volume), truth)])
    assert tables["occupancy"]["SelfOcc"]["iou"] < 0.95  # most voxels of random labels are full
    assert tables["semantics"]["mIoU of the classes seen"]["iou"] < 0.3


@pytest.mark.parametrize("degrees", [None, 0, 30])
def test_own_voxels_are_as_low_as_their_lowest_corner(degrees):
    """A plane, in the frame of the voxels and where a matrix takes them."""
    box, shape, normal = (-4.0, 0.0, -1.0, 4.0, 6.0, 2.0), (6, 4, 2), np.array([0.3, -0.5, 0.7])
    nodes = node_positions(box, (4, 5, 3)).numpy()
    volume = torch.from_numpy(nodes @ normal + 0.1)[None, None].float()
    angle = np.radians(degrees or 0)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    x, y, z = (metres.numpy() for metres in protocols.centres(box, shape))
    centres = np.stack(np.meshgrid(x, y, z, indexing="ij"), -1).swapaxes(0, 1)
    half = np.array([1.0, 0.5, 0.75])
    turned = normal @ matrix[:3, :3]
    lowest = torch.from_numpy(centres @ turned + 0.1 - half @ np.abs(turned)).float()
    move = None if degrees is None else torch.from_numpy(matrix)
    sdf, _ = protocols.read_voxels(volume, 0, rules("kitti", "own"), box, shape, move)
    corners = np.stack([centres + half * sign for sign in itertools.product((-1, 1), repeat=3)])
    place = corners @ matrix[:3, :3].T
    whole = ((place >= np.array(box[:3]) - 1e-6) & (place <= np.array(box[3:]) + 1e-6)).all((0, -1))
    assert whole.mean() > 0.3 and (degrees == 30) != whole.all()
    torch.testing.assert_close(sdf[whole], lowest[whole])


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_moved_street_does_not_score(move):
    """A wall, a road and a car, as SDF and as labels, moved by a voxel or more."""
    truth = torch.zeros(256, 256, 32, dtype=torch.uint8)
    truth[10:240, 20:230, 5] = 9
    truth[10:240, 60, 6:20] = 13
    truth[30:52, 100:110, 6:13] = 1
    moved, exact = (
        scored(counted(rules("kitti").crop(labels) > 0, truth))["iou"]
        for labels in (move(truth), truth)
    )
    assert exact == 1 and moved < 0.98


@pytest.mark.parametrize("protocol", ["published", "corrected"])
def test_voxels_of_another_frame(protocol):
    """A volume turned by a quarter: read through the matrix it is what it was."""
    of_data = rules("nuscenes", protocol)
    lo, hi = torch.tensor(of_data.box).view(2, 3)
    if not of_data.ends:  # then nodes lie at the centres of voxels
        lo, hi = lo + 0.2, hi - 0.2
    box, shape = (*lo.tolist(), *hi.tolist()), (200, 200, 16)
    grid = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    turned = grid.rot90(1, (2, 3))  # what was at (x, y) is at (y, -x)
    matrix = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    sdf, likeliest = protocols.read_voxels(turned, 2, of_data, box, shape, matrix)
    assert torch.allclose(sdf, grid[0, 0], atol=1e-3)
    assert (likeliest == grid[0, 1:].argmax(0)).float().mean() > 0.999
    moved = torch.eye(4)
    moved[0, 3] = 30.0  # the last 30 m along x come from beyond the box
    beyond = protocols.read_voxels(grid, 0, of_data, box, shape, moved)[0][:, -70:]
    assert (beyond == (0 if of_data.ends else torch.inf)).all()


def plane_depth(u, v, size):
    """A depth that changes evenly over the image, as bilinear reading reproduces."""
    return 10 + 20 * u / size[1] + 15 * v / size[0]


@pytest.mark.parametrize("protocol", ["published", "corrected"])
def test_true_depth_is_perfect_where_its_rays_are(protocol):
    size, rays = (60, 90), (12, 18)
    # the published reading takes the first and last ray for the ends of the image
    steps = [n / (r - (protocol == "published")) for n, r in zip(size, rays, strict=True)]
    v, u = torch.meshgrid(*(torch.arange(r) * s for r, s in zip(rays, steps, strict=True)),
                          indexing="ij")  # fmt: skip
    grid = plane_depth(u, v, size)[None]
    # within the last ray, as beyond it nothing is known
    location = torch.rand(1, 500, 2, generator=torch.Generator().manual_seed(0)) * 0.9
    truth = plane_depth(location[..., 0] * size[1], location[..., 1] * size[0], size)

    def abs_rel(depth, protocol=protocol):
        reading = protocols.read_depth(depth, location, protocol == "published")
        return [row["abs_rel"] for row in metrics.depth_scores(metrics.depth_sums(reading, truth))]

    assert max(abs_rel(grid)) < 1e-6
    other = "corrected" if protocol == "published" else "published"
    assert min(abs_rel(grid, other)) > 1e-3  # the displacement
    for moved in (grid.roll(1, 2), grid.flip(2), grid.flip(1), grid.flip(1, 2)):
        assert min(abs_rel(moved)) > 1e-2


def test_depth_outside_the_window_is_not_scored():
    truth = torch.full((1, 375, 1242), 5.0)
    truth[0, 200, 600] = 0.05  # too near for KITTI raw
    scored = protocols.scored_depth(truth, rules("kitti_raw"))[0] > 0
    rows, cols = scored.any(1).nonzero(), scored.any(0).nonzero()
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (153, 370, 44, 1196)
    assert not scored[200, 600] and scored.sum() == len(rows) * len(cols) - 1
    assert torch.equal(protocols.scored_depth(truth, rules("kitti")), truth)


# novel depth


def drive(positions, inputs=None):
    sequence = Sequence()
    sequence.frames, sequence.inputs = len(positions), inputs
    sequence.positions = np.array(positions, float)
    steps = np.linalg.norm(np.diff(sequence.positions, axis=0), axis=1)
    sequence.path = np.concatenate([[0], np.cumsum(steps)])
    return sequence


def test_novel_targets_of_kitti():
    """Slow, so that frames are skipped: published distances then grow too fast."""
    sequence = drive([[0, 0, 0.15 * k] for k in range(7)] + [[0, 5, 2.0], [0, 0, 12.0]])
    published = list(protocols.novel_targets(sequence, 0, rules("kitti")))
    # 0.15 + 0.30 + 0.45, then the same again, then 1.1; heights do not count; 12 m is too far
    assert [frame for _, frame in published] == [3, 6, 7]
    assert [metres for metres, _ in published] == pytest.approx([0.9, 1.8, 2.9])
    sequence.skipped = [3]  # then frame 4 is the first that is 0.4 m away: 0.15 + ... + 0.6
    published = list(protocols.novel_targets(sequence, 0, rules("kitti")))
    assert published[0] == (pytest.approx(1.5), 4)
    corrected = list(protocols.novel_targets(drive([[0, 0, 0.15 * k] for k in range(7)]), 0,
                                             rules("kitti", "corrected")))  # fmt: skip
    assert [frame for _, frame in corrected] == [3, 6]
    assert [metres for metres, _ in corrected] == pytest.approx([0.45, 0.9])


def test_novel_targets_of_nuscenes():
    sequence = drive([[0.3 * k, 0, 0] for k in range(60)], inputs=[0, 10, 20, 21, 22, 30, 50])
    targets = dict((f, m) for m, f in protocols.novel_targets(sequence, 21, rules("nuscenes")))
    assert targets == pytest.approx({10: 3.3, 0: 6.3, 30: 2.7, 50: 8.7})
    assert not list(protocols.novel_targets(drive([[0, 0, 0]] * 3), 1, rules("nuscenes")))


# choice


def test_the_default_protocol():
    assert rules("kitti", None).protocol == "published"
    embedded = protocols.choose(presets.build("synthetic"))
    assert (embedded.protocol, embedded.box, embedded.scored) == ("own", None, protocols.ALL)
    ring = protocols.choose(presets.build("synthetic_surround"), "published")
    assert ring.dataset == "nuscenes" and ring.ground == metrics.GROUND
    with pytest.raises(InputError, match="--protocol paper: unknown"):
        rules("kitti", "paper")
    pooled = protocols.choose(presets.build("kitti", ["volume.voxel=2"]), "own")
    assert (pooled.crop(torch.ones(128, 128, 16)) == 1).sum() == 125 * 122 * 14
    pooled = protocols.choose(presets.build("nuscenes", ["volume.voxel=2"]), "own")
    assert (pooled.crop(torch.ones(100, 100, 8)) == 1).sum() == 94 * 94 * 6
