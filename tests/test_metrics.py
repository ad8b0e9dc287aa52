"""Metrics against the numbers of the published implementation and cases worked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from selfocc.metrics import (
    DEPTH_ERRORS,
    ConstantPrior,
    DepthMetrics,
    MedianDepth,
    NovelDepthMetrics,
    OccupancyMetrics,
    SemanticMetrics,
    ThresholdCurve,
    above_ground,
    crop_margins_kitti,
    depth_errors,
    fill_nearest,
    flat_ground_depth,
    flat_ground_sdf,
    lidar_truth,
    pool_voxels,
    sample_depth,
)

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens" / "metrics"


@pytest.fixture(scope="module")
def published():
    if not GOLDENS.is_dir():
        pytest.skip(f"no published numbers at {GOLDENS}")
    return json.loads((GOLDENS / "metrics.json").read_text())


def load(name):
    return np.load(GOLDENS / name)


# voxels


def kitti_frames(classes=False):
    volumes = load("kitti_volumes.npz")
    for frame in ("frame0", "frame1"):
        labels = torch.from_numpy(volumes[f"{frame}.gt_raw"].astype(np.uint8)).flip(1)
        yield (
            labels,
            {key: torch.from_numpy(volumes[f"{frame}.{key}"]) for key in ("sdf", "pred_sem")},
        )


def test_kitti_occupancy_equals_the_published(published):
    occupancy, semantic = OccupancyMetrics(), SemanticMetrics(20)
    unknown_as_free = OccupancyMetrics()
    for labels, prediction in kitti_frames():
        occupied = crop_margins_kitti(prediction["sdf"] <= 0)
        occupancy.update(occupied, labels)
        unknown_as_free.update(occupied, torch.where(labels == 255, 0, labels))
        semantic.update(occupied, labels)  # its two classes are free and car, whatever is occupied
    want = published["kitti"]["SSCMetrics2"]
    assert {"tp": occupancy.tp, "fp": occupancy.fp, "fn": occupancy.fn} == published["kitti"][
        "SSCMetrics2_counts"
    ]
    assert occupancy.results() == pytest.approx(
        {k: want[k] for k in ("iou", "precision", "recall")}, rel=1e-6
    )
    assert semantic.results()["iou"][:2] == pytest.approx(want["iou_ssc"], rel=1e-5)
    assert 100 * unknown_as_free.results()["iou"] == pytest.approx(
        published["kitti"]["IoU_class_percent"]
    )


def test_kitti_semantics_equal_the_published(published):
    metrics = SemanticMetrics(20)
    for labels, prediction in kitti_frames():
        classes = torch.where(prediction["sdf"] <= 0, prediction["pred_sem"], 0)
        metrics.update(crop_margins_kitti(classes), labels)
    results, ssc = metrics.results(), published["kitti"]["SSCMetrics20"]
    assert metrics.confusion.diagonal().tolist() == published["kitti"]["SSCMetrics20_tps"]
    assert results["iou"] == pytest.approx(ssc["iou_ssc"], rel=1e-5)
    assert results["miou_ssc"] == pytest.approx(ssc["iou_ssc_mean"], rel=1e-5)
    assert 100 * results["miou_published"] == pytest.approx(
        published["kitti"]["MeanIoU"]["mIoU_percent"]
    )


@pytest.mark.parametrize("pose", ["identity", "shifted"])
def test_nuscenes_equals_the_published(published, pose):
    volumes = load("nuscenes_volumes.npz")
    labels = np.where(volumes["gt_semantics"] == 17, 0, volumes["gt_semantics"])
    seen = np.where(volumes["mask_camera"] == 1, labels, 255).astype(np.uint8)
    want = published[f"nuscenes_{pose}"]
    for truth, key in ((seen, "iou"), (labels, "iou_nomask")):
        occupancy = OccupancyMetrics()
        occupancy.update(volumes[f"{pose}.pred_occ"], truth)
        assert 100 * occupancy.results()["iou"] == pytest.approx(want[key]["mIoU_percent"])
    semantic = SemanticMetrics(17)
    semantic.update(volumes[f"{pose}.pred_miou"], seen)
    assert 100 * semantic.results()["miou_published"] == pytest.approx(want["miou"]["mIoU_percent"])


def test_crop_margins():
    free = crop_margins_kitti(torch.full((256, 256, 32), -1.0)) > 0
    kept = ~free
    assert kept[:250, 6:250, :28].all() and kept.sum() == 250 * 244 * 28
    pooled = crop_margins_kitti(torch.ones(128, 128, 16, dtype=torch.bool), factor=2)
    assert pooled.sum() == 125 * 122 * 14


def test_pool_voxels_by_hand():
    labels = torch.zeros(2, 2, 8, dtype=torch.uint8)
    labels[..., 0:2] = 255
    labels[0, 0, 0], labels[0, 1, 0], labels[1, 1, 1] = 3, 7, 7  # occupied: 7 has the majority
    labels[..., 3:4] = 255  # half known, none occupied: free
    labels[..., 4:6] = 255
    labels[0, :, 4] = 0  # a quarter known, none occupied: unknown
    labels[1, 1, 6] = 9  # one occupied child is enough
    assert pool_voxels(labels, 2).tolist() == [[[7, 0, 255, 9]]]
    with pytest.raises(ValueError, match="pooled by 3"):
        pool_voxels(labels, 3)


def test_fill_nearest_is_the_nearest():
    torch.manual_seed(0)
    known = torch.rand(23, 37) < 0.02
    values = torch.where(known, torch.rand(23, 37), 0)
    y, x = torch.meshgrid(torch.arange(23.0), torch.arange(37.0), indexing="ij")
    pixels = torch.stack([y, x], -1).reshape(-1, 2)
    distance = torch.cdist(pixels, pixels[known.flatten()])
    filled = fill_nearest(values, known).flatten()
    chosen = (filled[:, None] == values[known]).float().argmax(1)
    assert torch.isin(filled, values[known]).all()
    reached = distance.gather(1, chosen[:, None])[:, 0]
    # jump flooding may err by a fraction of a pixel, rarely
    assert (reached - distance.amin(1)).max() < 1 and (
        reached == distance.amin(1)
    ).float().mean() > 0.98
    assert torch.equal(fill_nearest(values, torch.zeros_like(known)), values)


def test_above_ground_follows_the_slope():
    labels = torch.full((1, 6, 10), 255, dtype=torch.uint8)
    labels[0, 0, 2] = 9
    labels[0, 0, 1] = 17  # lower than the highest ground voxel
    labels[0, 5, 5] = 11
    labels[0, 3, 8] = 15  # vegetation is no ground
    above = above_ground(labels, voxel_size=0.2)
    lowest = above.int().argmax(dim=2)[0].tolist()
    assert lowest == [
        4,
        4,
        4,
        7,
        7,
        7,
    ]  # 0.4 m above the ground voxel; columns 1-4 follow their nearest
    assert above_ground(labels, voxel_size=0.4).int().argmax(dim=2)[0, 0] == 3
    assert not above_ground(torch.full((2, 2, 4), 15, dtype=torch.uint8), 0.2).any()


def test_threshold_curve_equals_direct_counting():
    torch.manual_seed(1)
    curve = ThresholdCurve(torch.linspace(-1, 1, 9))
    frames = [
        (
            torch.randn(6, 5, 4),
            torch.tensor([0, 9, 255], dtype=torch.uint8)[torch.randint(3, (6, 5, 4))],
        )
        for _ in range(2)
    ]
    masks = [torch.rand(6, 5, 4) < 0.7 for _ in frames]
    frames[0][0][0, 0, 0] = curve.thresholds[4]  # a value on a threshold counts as occupied
    for (sdf, labels), mask in zip(frames, masks, strict=True):
        curve.update(sdf, labels, mask)
    results = curve.results()
    for i, threshold in enumerate(curve.thresholds):
        direct = OccupancyMetrics()
        for (sdf, labels), mask in zip(frames, masks, strict=True):
            direct.update(sdf <= threshold, labels, mask)
        assert {k: results[k][i] for k in ("iou", "precision", "recall")} == direct.results()
    assert results["best"]["iou"] == max(results["iou"])


def test_nothing_scored_is_zero_not_an_error():
    labels = torch.full((2, 2, 2), 255, dtype=torch.uint8)
    occupancy, semantic, curve = OccupancyMetrics(), SemanticMetrics(), ThresholdCurve()
    occupancy.update(torch.ones(2, 2, 2, dtype=torch.bool), labels)
    semantic.update(torch.ones(2, 2, 2, dtype=torch.uint8), labels)
    curve.update(torch.zeros(2, 2, 2), labels)
    assert occupancy.results()["iou"] == 0 and curve.results()["best"]["iou"] == 0
    assert semantic.results()["miou"] == 0 and semantic.results()["miou_published"] == 1
    depth = DepthMetrics()
    depth.update(torch.ones(1, 2, 2), torch.zeros(1, 2, 2))
    assert depth.results() == {}


# depth


def test_depth_equals_the_published(published):
    data, metrics = load("depth.npz"), DepthMetrics()
    for frame in ("frame0", "frame1"):
        predicted, location, truth, mask = (
            torch.from_numpy(data[f"{frame}.{key}"]) for key in ("pred", "loc", "gt", "mask")
        )
        metrics.update(sample_depth(predicted, location), torch.where(mask, truth, 0))
    want = published["depth"]
    per_camera = metrics.per_camera()
    for i, name in enumerate((*DEPTH_ERRORS, "scaling")):
        assert per_camera[..., i].tolist() == [
            pytest.approx(row, rel=2e-6) for row in want["per_type_cam"][name]
        ]
    for i, kind in enumerate(("raw", "median")):
        results = metrics.results()[kind]
        assert results["scale"] == pytest.approx(want["all_cams"]["scaling"][i], rel=2e-6)
        assert [results[e] for e in DEPTH_ERRORS] == pytest.approx(
            [want["all_cams"][e][i] for e in DEPTH_ERRORS], rel=2e-6
        )


def test_depth_errors_equal_the_published(published):
    data = load("depth.npz")
    predicted, truth = (torch.from_numpy(data[key]) for key in ("np_pred", "np_gt"))
    errors = depth_errors(predicted.clamp(1e-3, 80), truth)
    want = published["compute_depth_errors_np"]
    assert errors.tolist() == pytest.approx([want[name] for name in DEPTH_ERRORS], rel=1e-12)


@pytest.mark.parametrize(
    ("rig", "points", "matrix", "size", "near"),
    [
        ("kitti", "points", "lidar2img_kitti", (96, 320), 1e-3),
        ("nus", "nus_points", "lidar2img_nus", (128, 256), 1),
    ],
)
def test_lidar_truth_equals_the_published(published, rig, points, matrix, size, near):
    data = load("lidar_depth_gt.npz")
    cloud = data[points][:, :3]
    if rig == "kitti":  # recorded in the velodyne's axes
        cloud = np.stack([-cloud[:, 1], cloud[:, 0], cloud[:, 2]], 1)
    location, depth = lidar_truth(cloud, data[matrix], size)
    mask = (depth > near) & (depth < 80)
    assert torch.equal(mask, torch.from_numpy(data[f"{rig}.mask"]))
    assert np.allclose(depth[mask], data[f"{rig}.depth"][mask], rtol=1e-12)
    assert np.allclose(location[mask], data[f"{rig}.loc"][mask], rtol=1e-12)


def test_depth_scores_only_what_has_truth():
    truth = torch.tensor([[10.0, 20, 0, 90]])
    metrics = DepthMetrics()
    metrics.update(torch.tensor([[11.0, 22, 5, 5]]), truth)
    metrics.update(
        torch.ones(1, 4), torch.zeros(1, 4)
    )  # a frame without truth does not dilute the mean
    results = metrics.results()
    assert results["raw"]["abs_rel"] == pytest.approx(0.1) and results["median"][
        "abs_rel"
    ] == pytest.approx(0, abs=1e-7)
    assert results["median"]["scale"] == pytest.approx(1 / 1.1)
    capped = DepthMetrics(maximum=15)
    capped.update(torch.tensor([[100.0, 22, 5, 5]]), truth)
    assert capped.results()["raw"]["abs_rel"] == pytest.approx(0.5)


def test_novel_depth_buckets_round_up():
    metrics = NovelDepthMetrics()
    for distance, factor in ((0.4, 1.1), (1.0, 1.3), (1.01, 2.0)):
        metrics.update(distance, torch.full((1, 3), 10 * factor), torch.full((1, 3), 10.0))
    results = metrics.results()
    assert list(results) == [1, 2]
    assert results[1]["raw"]["abs_rel"] == pytest.approx(0.2) and results[2]["raw"][
        "abs_rel"
    ] == pytest.approx(1.0)


# baselines


def test_constant_prior_finds_what_is_common():
    prior = ConstantPrior()
    labels = torch.zeros(3, 2, 2, 2, dtype=torch.uint8)
    labels[:, 0, 0, 0] = 9
    labels[0, 1, 0, 0] = 13
    labels[:, 1, 1, 1] = 255
    labels[1:, 0, 1, 1] = 255
    labels[0, 0, 1, 1] = 1
    for frame in labels:
        prior.add(frame)
    probability = prior.probability()
    assert probability[0, 0, 0] == 1 and probability[0, 1, 1] == 1 and probability[1, 1, 1] == 0
    assert probability[1, 0, 0] == pytest.approx(1 / 3)
    curve = prior.curve()
    curve.update(-probability, labels[1])
    results = curve.results()
    assert results["best"]["iou"] == 1 and -results["best"]["threshold"] > 1 / 3


def test_median_depth_ignores_holes_and_fills_them():
    median = MedianDepth()
    maps = torch.tensor([[[[5.0, 0, 0]]], [[[7.0, 9, 0]]], [[[30.0, 0, 0]]]])
    for depth in maps:
        median.add(depth)
    assert median.depth().tolist() == [[[7.0, 9.0, 9.0]]]


def test_flat_ground():
    intrinsics = np.array([[[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]])
    pitch = 0.1  # downwards
    turn = np.array(
        [[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]]
    )
    camera_to_volume = np.eye(4)[None].copy()
    camera_to_volume[0, :3, :3] = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]) @ turn
    camera_to_volume[0, :3, 3] = 0, 0.3, -0.08
    depth = flat_ground_depth(intrinsics, camera_to_volume, (48, 64), ground_z=-1.73, maximum=60.0)
    assert depth.shape == (1, 48, 64) and depth.dtype == torch.float32
    v, u = np.mgrid[:48, :64]
    points = (
        np.stack([u, v, np.ones_like(u)], -1)
        @ np.linalg.inv(intrinsics[0]).T
        * depth[0].numpy()[..., None]
    )
    z = (points @ camera_to_volume[0, :3, :3].T + camera_to_volume[0, :3, 3])[..., 2]
    met = depth[0].numpy() < 60
    assert np.allclose(z[met], -1.73, atol=1e-5) and met[-1].all() and not met[0].any()
    assert (z[~met] > -1.73).all()
    assert flat_ground_sdf(torch.tensor([-1.73, 0.0]), -1.73).tolist() == pytest.approx([0, 1.73])
