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
    OccupancyMetrics,
    SemanticMetrics,
    ThresholdCurve,
    above_ground,
    depth_errors,
    fill_nearest,
    flat_ground_depth,
    flat_ground_sdf,
    pool_voxels,
)

GOLDENS = Path(__file__).parent / "data" / "metrics"


@pytest.fixture(scope="module")
def published():
    return json.loads((GOLDENS / "metrics.json").read_text())


def load(name):
    return np.load(GOLDENS / name)


# voxels


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
    occupancy, semantic, curve = OccupancyMetrics(), SemanticMetrics(), ThresholdCurve([0.0])
    occupancy.update(torch.ones(2, 2, 2, dtype=torch.bool), labels)
    semantic.update(torch.ones(2, 2, 2, dtype=torch.uint8), labels)
    curve.update(torch.zeros(2, 2, 2), labels)
    assert occupancy.results()["iou"] == 0 and curve.results()["best"]["iou"] == 0
    assert semantic.results()["miou"] == 0 and semantic.results()["miou_published"] == 1
    depth = DepthMetrics()
    depth.update(torch.ones(1, 2, 2), torch.zeros(1, 2, 2))
    assert depth.results() == {}


# depth


def test_depth_errors_equal_the_published(published):
    data = load("depth.npz")
    predicted, truth = (torch.from_numpy(data[key]) for key in ("np_pred", "np_gt"))
    errors = depth_errors(predicted.clamp(1e-3, 80), truth)
    want = published["compute_depth_errors_np"]
    assert errors.tolist() == pytest.approx([want[name] for name in DEPTH_ERRORS], rel=1e-12)


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
