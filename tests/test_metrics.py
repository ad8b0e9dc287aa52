"""Metrics against the numbers of the published implementation and cases worked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from selfocc.metrics import (
    DEPTH_ERRORS,
    PRIOR_THRESHOLDS,
    above_ground,
    best_threshold,
    class_scores,
    confusion_counts,
    depth_errors,
    depth_scores,
    depth_sums,
    fill_nearest,
    flat_ground_depth,
    known_depths,
    median_depth,
    pool_voxels,
    prior_probability,
    threshold_counts,
    voxel_counts,
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
    # 0.4 m above the ground voxel; columns 1-4 follow their nearest
    assert lowest == [4, 4, 4, 7, 7, 7]
    assert above_ground(labels, voxel_size=0.4).int().argmax(dim=2)[0, 0] == 3
    assert not above_ground(torch.full((2, 2, 4), 15, dtype=torch.uint8), 0.2).any()


def test_the_best_threshold_equals_direct_counting():
    torch.manual_seed(1)
    thresholds = torch.linspace(-1, 1, 9)
    classes = torch.tensor([0, 9, 255], dtype=torch.uint8)
    frames = [
        (torch.randn(6, 5, 4), classes[torch.randint(3, (6, 5, 4))], torch.rand(6, 5, 4) < 0.7)
        for _ in range(2)
    ]
    frames[0][0][0, 0, 0] = thresholds[4]  # a value on a threshold counts as occupied
    whole, above = sum(threshold_counts(*frame, thresholds) for frame in frames)
    sdf, labels, mask = (torch.cat(parts) for parts in zip(*frames, strict=True))
    known = labels != 255
    check_best(whole, thresholds, sdf[known], labels[known])
    check_best(above, thresholds, sdf[known & mask], labels[known & mask])


def check_best(counts, thresholds, sdf, labels):
    ious = []
    for i, threshold in enumerate(thresholds):
        found, occupied = sdf <= threshold, labels > 0
        both, either = (found & occupied).sum().item(), (found | occupied).sum().item()
        one = torch.stack([counts[:, : i + 1].sum(1), counts[:, i + 1 :].sum(1)], 1)
        assert best_threshold(one, thresholds[i : i + 1]) == {
            "iou": both / either, "precision": both / found.sum().item(),
            "recall": both / occupied.sum().item(), "threshold": threshold.item(),
        }  # fmt: skip
        ious.append(both / either)
    best = best_threshold(counts, thresholds)
    assert best["iou"] == max(ious) and best["threshold"] == thresholds[np.argmax(ious)]


def test_nothing_scored_is_zero_not_an_error():
    labels = torch.full((2, 2, 2), 255, dtype=torch.uint8)
    threshold = torch.tensor([0.0])
    counts, _ = threshold_counts(torch.zeros(2, 2, 2), labels, labels > 0, threshold)
    best = best_threshold(counts, threshold)
    assert (best["iou"], best["precision"], best["recall"]) == (0, 0, 0)
    scores = class_scores(confusion_counts(torch.ones_like(labels), labels, 20))
    assert scores["miou"] == 0 and scores["miou_published"] == 1
    assert depth_scores(depth_sums(torch.ones(1, 2, 2), torch.zeros(1, 2, 2))) == []


# depth


def test_depth_errors_equal_the_published(published):
    data = load("depth.npz")
    predicted, truth = (torch.from_numpy(data[key]) for key in ("np_pred", "np_gt"))
    errors = depth_errors(predicted.clamp(1e-3, 80), truth)
    want = published["compute_depth_errors_np"]
    assert errors.tolist() == pytest.approx([want[name] for name in DEPTH_ERRORS], rel=1e-12)


def test_depth_scores_only_what_has_truth():
    truth = torch.tensor([[10.0, 20, 0, 90]])
    sums = depth_sums(torch.tensor([[11.0, 22, 5, 5]]), truth)
    # a frame without truth does not dilute the mean
    raw, scaled = depth_scores(sums + depth_sums(torch.ones(1, 4), torch.zeros(1, 4)))
    assert raw["abs_rel"] == pytest.approx(0.1) and raw["scale"] == 1
    assert scaled["abs_rel"] == pytest.approx(0, abs=1e-7)
    assert scaled["scale"] == pytest.approx(1 / 1.1)
    far, _ = depth_scores(
        depth_sums(torch.tensor([[40.0, 400, 5, 5]]), 4 * truth[:, :1].expand(1, 4))
    )
    assert far["abs_rel"] == pytest.approx((0 + 1 + 0.875 + 0.875) / 4)  # at most 80 m


# baselines


def test_the_prior_finds_what_is_common():
    labels = torch.zeros(3, 2, 2, 2, dtype=torch.uint8)
    labels[:, 0, 0, 0] = 9
    labels[0, 1, 0, 0] = 13
    labels[:, 1, 1, 1] = 255
    labels[1:, 0, 1, 1] = 255
    labels[0, 0, 1, 1] = 1
    probability = prior_probability(sum(map(voxel_counts, labels)))
    assert probability[0, 0, 0] == 1 and probability[0, 1, 1] == 1 and probability[1, 1, 1] == 0
    assert probability[1, 0, 0] == pytest.approx(1 / 3)
    counts, _ = threshold_counts(-probability, labels[1], labels[1] > 0, PRIOR_THRESHOLDS)
    best = best_threshold(counts, PRIOR_THRESHOLDS)
    assert best["iou"] == 1 and -best["threshold"] > 1 / 3


def test_median_depth_ignores_holes_and_fills_them():
    maps = torch.tensor([[[[5.0, 0, 0]]], [[[7.0, 9, 0]]], [[[30.0, 0, 0]]]])
    assert median_depth(list(map(known_depths, maps)), (1, 1, 3)).tolist() == [[[7.0, 9.0, 9.0]]]


def test_flat_ground():
    intrinsics = np.array([[[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]])
    pitch = 0.1  # downwards
    turn = np.array(
        [[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]]
    )
    camera_to_volume = np.eye(4)[None].copy()
    camera_to_volume[0, :3, :3] = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]) @ turn
    camera_to_volume[0, :3, 3] = 0, 0.3, -0.08
    matrices = torch.from_numpy(intrinsics), torch.from_numpy(camera_to_volume)
    depth = flat_ground_depth(*matrices, (48, 64), ground_z=-1.73)
    assert depth.shape == (1, 48, 64) and depth.dtype == torch.float32
    v, u = np.mgrid[:48, :64]
    points = (
        np.stack([u, v, np.ones_like(u)], -1)
        @ np.linalg.inv(intrinsics[0]).T
        * depth[0].numpy()[..., None]
    )
    z = (points @ camera_to_volume[0, :3, :3].T + camera_to_volume[0, :3, 3])[..., 2]
    met = depth[0].numpy() < 80
    assert np.allclose(z[met], -1.73, atol=1e-5) and met[-1].all() and not met[0].any()
    assert (z[~met] > -1.73).all()
