"""Scenes of images in Python: the same as evaluation sees, at sizes and in formats of any kind."""

import json
import re

import numpy as np
import pytest
import torch

import selfocc
from selfocc import InputError, checkpoint, labels, presets
from selfocc.batch import collate
from selfocc.datasets.synthetic import SyntheticConfig, synthetic_sequences
from selfocc.datasets.video import VideoDataset
from selfocc.geometry import node_positions
from selfocc.inference import Predictor
from selfocc.model import SelfOcc
from selfocc.render import rendered_maps
from tests.tiny import overrides


def written(folder, preset="synthetic", *changes):
    """A checkpoint of a tiny network of random weights, all of which matter."""
    torch.manual_seed(0)
    config = presets.build(preset, [*overrides(), *changes])
    weights = SelfOcc(config)
    with torch.no_grad():
        for weight in weights.parameters():
            weight += 0.1 * torch.randn_like(weight)
    path = folder / checkpoint.FILE_NAME
    checkpoint.write(path, checkpoint.Checkpoint(config, 0, weights.state_dict()))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return selfocc.load(written(tmp_path_factory.mktemp("weights")).parent, "cpu")


def camera(height, width, focal):
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])


def noise(height=32, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def as_evaluated(model, sequence, frame=0):
    """Batch, voxels, and depth maps [N, h, w] by the way that evaluation takes."""
    dataset = VideoDataset.every_frame(sequence, model.model.config.data)
    batch = collate([dataset[frame]]).to(torch.device("cpu"))
    found = Predictor(model.model)(batch.images, batch.intrinsics, batch.camera_to_volume)
    with torch.no_grad():
        volume = model.model.see(batch).volume
        depth, _ = rendered_maps(model.model, volume, batch.target)
    return batch, found, depth[0].numpy()


@pytest.mark.parametrize("scale", [1, 0.5])
def test_an_image_of_the_size_is_seen_as_evaluation_sees_it(scale, cache, tmp_path):
    changes = [] if scale == 1 else ["data.crop=64,128", "data.scale=0.5"]
    model = selfocc.load(written(tmp_path, "synthetic", *changes), "cpu")
    size = model.model.config.data.crop
    world = SyntheticConfig(image_size=size, frames=1)
    (sequence,) = synthetic_sequences(world, "val", 1, cache=cache)
    batch, expected, depth = as_evaluated(model, sequence)
    image, (k, *_) = sequence.image(0, 0), sequence.cameras(0)[0]
    scene = model.predict(image, k, batch.camera_to_volume[0, 0])
    assert scene.sdf.dtype == np.float32 and np.array_equal(scene.sdf, expected.sdf)
    assert scene.voxels.dtype == bool and scene.voxels.any() and not scene.voxels.all()
    assert np.array_equal(scene.voxels, (expected.sdf <= scene.threshold).numpy())
    assert scene.semantics is None
    assert scene.depth().shape == size and scene.depth().dtype == np.float32
    assert np.array_equal(scene.depth(), depth[0])
    other = model.predict(255 - image, k, batch.camera_to_volume[0, 0])
    assert not np.array_equal(scene.sdf, other.sdf)


def test_a_rig_with_classes(cache, tmp_path):
    world = SyntheticConfig(rig="surround", image_size=(24, 40), frames=1)
    (ring,) = synthetic_sequences(world, "val", 1, cache=cache)
    changes = ["data.crop=24,40", "data.pad=24,40", "field.classes=20", "volume.voxel=4"]
    model = selfocc.load(written(tmp_path, "synthetic_surround", *changes), "cpu")
    batch, expected, depth = as_evaluated(model, ring)
    intrinsics, poses = ring.cameras(0)[0], batch.camera_to_volume[0]
    scene = model.predict(ring.images(0), intrinsics, poses)
    assert np.array_equal(scene.sdf, expected.sdf)
    assert scene.semantics.dtype == np.uint8 and scene.semantics.any()
    assert np.array_equal(scene.semantics, expected.classes)
    assert scene.voxels[scene.semantics > 0].all()
    assert scene.palette[1][0] == labels.SEMANTICKITTI[1]
    for k in range(6):
        np.testing.assert_allclose(scene.depth(k), depth[k], rtol=1e-4)
    assert not np.allclose(depth[0], depth[3], rtol=0.1)
    # cameras may differ in size, and depth has that of each
    images, finer = ring.images(0), intrinsics.copy()
    images[2] = images[2].repeat(2, 0).repeat(2, 1)
    finer[2, :2] *= 2
    finer[2, :2, 2] += 0.5
    mixed = model.predict(images, finer, poses)
    assert mixed.depth(2).shape == (48, 80) and mixed.depth(1).shape == (24, 40)
    assert np.mean(mixed.voxels == scene.voxels) > 0.999
    picture = scene.panel("ring")
    assert picture.shape[1] == 2 * 640 + 4
    scene.save(tmp_path / "ring.html")
    scene.save(tmp_path / "ring.npz")
    assert np.array_equal(np.load(tmp_path / "ring.npz")["semantics"], scene.semantics)


@pytest.mark.parametrize("like", [torch.from_numpy, lambda x: x / 255, lambda x: [x]])
def test_formats_of_one_image(model, like):
    image, k, pose = noise(), camera(32, 64, 50), model.level_camera(1.65)
    expected = model.predict(image, k, pose).sdf
    assert np.array_equal(model.predict(like(image), k[None], pose.tolist()).sdf, expected)
    k, pose = torch.from_numpy(k).float(), torch.from_numpy(pose)[None]
    assert np.array_equal(model.predict(like(image), k, pose).sdf, expected)


@pytest.mark.parametrize("pitch", [0, 3])
def test_depth_is_of_the_pixels_that_were_given(pitch, tmp_path):
    """Of a flat road, which the network reads at another size."""
    changes = ["render.eval_samples=512", "render.eval_rays=90,4", "render.sharpen=200,200"]
    model = selfocc.load(written(tmp_path, "synthetic", *changes), "cpu")
    volume, height, k = model.model.config.volume, 1.4, camera(90, 120, 80)
    scene = model.predict(noise(90, 120), k, model.level_camera(height, pitch))
    road = scene.volume.clone()
    road[0, 0] = node_positions(volume.box, volume.nodes)[..., 2] - volume.ground
    scene.volume = road
    rows = np.arange(60, 90, 3)
    down = np.arctan((rows - k[1, 2]) / 80) + np.deg2rad(pitch)
    z = height / np.sin(down) * np.cos(down - np.deg2rad(pitch))
    assert scene.depth().shape == (90, 120)
    np.testing.assert_allclose(scene.depth()[rows, 45:75], np.tile(z[:, None], 30), rtol=0.01)


@pytest.mark.parametrize("preset, ahead", [("synthetic", 1), ("synthetic_surround", 0)])
def test_level_camera(preset, ahead, tmp_path):
    model = selfocc.load(written(tmp_path, preset, "volume.ground=-0.5"), "cpu")
    for pitch in (0.0, 10.0, -10.0):
        pose = model.level_camera(2.0, pitch)
        assert np.isclose(np.linalg.det(pose[:3, :3]), 1) and pose[:3, 3].tolist() == [0, 0, 1.5]
        point = np.array([0, 0, -0.5, 1.0])
        point[ahead] = 7.0
        x, y, z, _ = np.linalg.inv(pose) @ point
        assert np.isclose(x, 0) and np.isclose(
            np.arctan2(y, z), np.arctan(2 / 7) - np.deg2rad(pitch)
        )
        left = np.zeros(4)
        left[1 - ahead] = 1 if ahead == 0 else -1
        assert (np.linalg.inv(pose) @ left)[0] == -1


GOOD = dict(images=noise(), intrinsics=camera(32, 64, 50), camera_to_volume=np.eye(4))
TURNED = np.diag([1.0, 1, -1, 1])
PROJECTIVE = np.eye(4) + np.eye(4)[[3, 3, 3, 2]] * [0, 0, 0.1, 0]
NAN = np.where(np.eye(4), np.nan, 0)
BAD = [
    ({"images": [noise(), noise()]}, "2 images given, but the network sees a rig of 1 camera"),
    ({"images": noise().transpose(2, 0, 1)}, "image 0 has shape [3, 32, 64], not [h, w, 3]"),
    ({"images": noise()[..., 0]}, "image 0 has shape [32, 64]"),
    ({"images": noise()[:0]}, "image 0 has shape [0, 64, 3]"),
    ({"images": "street.png"}, "image 0 has shape []"),
    ({"images": noise().astype(np.float32)}, "image 0 is float32, but neither uint8 nor within 0"),
    ({"images": noise() * np.nan}, "image 0 is float64"),
    ({"images": noise().astype(int)}, "image 0 is int64"),
    ({"intrinsics": np.eye(4)}, "intrinsics: shape [1, 4, 4], not [1, 3, 3]"),
    ({"intrinsics": [[50, 0], [0]]}, "intrinsics: cannot be read as numbers"),
    ({"intrinsics": NAN[:3, :3]}, "intrinsics: not all numbers are finite"),
    ({"intrinsics": camera(32, 64, 50).T}, "intrinsics of image 0: not fx 0 cx, 0 fy cy, 0 0 1"),
    ({"intrinsics": camera(320, 640, 500)}, "intrinsics of image 0: focal lengths 500, 500"),
    ({"intrinsics": camera(32, 64, -50)}, "intrinsics of image 0: focal lengths -50, -50"),
    ({"camera_to_volume": np.eye(3)}, "camera_to_volume: shape [1, 3, 3], not [1, 4, 4]"),
    ({"camera_to_volume": np.stack([np.eye(4)] * 2)}, "camera_to_volume: shape [2, 4, 4]"),
    ({"camera_to_volume": NAN}, "camera_to_volume: not all numbers are finite"),
    ({"camera_to_volume": TURNED}, "camera_to_volume is no rotation and translation"),
    ({"camera_to_volume": 2 * np.eye(4)}, "camera_to_volume is no rotation and translation"),
    ({"camera_to_volume": PROJECTIVE}, "camera_to_volume is no rotation and translation"),
    ({"camera_to_volume": None}, "camera_to_volume: cannot be read as numbers"),
]


@pytest.mark.parametrize("change, said", BAD)
def test_wrong_input(model, change, said):
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        model.predict(**GOOD | change)
    assert "\n" not in str(caught.value)


def test_a_scene_outlives_the_next_frame(model, monkeypatch):
    """Although a CUDA graph always returns the same memory."""
    k, pose, see, kept = camera(32, 64, 50), model.level_camera(1.65), model.voxels, []

    def see_as_a_graph(seen):
        found = see(seen)
        if not kept:
            kept.extend([found, model.volume])
        kept[0].sdf.copy_(found.sdf)
        model.volume = kept[1].copy_(model.volume)
        return kept[0]

    expected = model.predict(noise(), k, pose)
    monkeypatch.setattr(model, "voxels", see_as_a_graph)
    scene, other = (model.predict(noise(seed=seed), k, pose) for seed in (0, 1))
    assert np.array_equal(scene.sdf, expected.sdf) and not np.array_equal(scene.sdf, other.sdf)
    assert np.array_equal(scene.depth(), expected.depth())
    assert not np.array_equal(scene.depth(), other.depth())


def test_a_scene_keeps_its_images(model):
    image = noise()
    scene = model.predict(image, camera(32, 64, 50), model.level_camera(1.65))
    image[:] = 0  # the next frame of a camera
    assert np.array_equal(scene.images[0], noise())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(model, tmp_path):
    k, pose, gpu = camera(32, 64, 50), model.level_camera(1.65), selfocc.load(written(tmp_path))
    assert gpu.graph
    scenes = [gpu.predict(noise(seed=seed), k, pose) for seed in range(3)]
    for seed, scene in enumerate(scenes):
        expected = model.predict(noise(seed=seed), k, pose)
        np.testing.assert_allclose(scene.sdf, expected.sdf, atol=1e-2)
        np.testing.assert_allclose(scene.depth(), expected.depth(), rtol=0.05)


def test_loading():
    model = selfocc.load("street", device="cpu")
    assert not model.model.training and model.model.config.preset == "street"
    with pytest.raises(InputError, match="no checkpoint at nothing"):
        selfocc.load("nothing")
    with pytest.raises(InputError, match="--device"):
        selfocc.load("street", device="tpu7")


def test_saving(model, tmp_path):
    scene = model.predict(noise(), camera(32, 64, 50), model.level_camera(1.65))
    for kind in ("npz", "ply", "html"):
        scene.save(str(tmp_path / f"scene.{kind}"))
    arrays = np.load(tmp_path / "scene.npz")
    assert np.array_equal(arrays["sdf"], scene.sdf) and tuple(arrays["box"]) == scene.box
    assert arrays["threshold"] == scene.threshold and "semantics" not in arrays
    assert (tmp_path / "scene.ply").read_bytes().startswith(b"ply\n")
    assert json.dumps("scene") in (tmp_path / "scene.html").read_text()
    with pytest.raises(InputError, match=r"scene\.obj: a scene is saved as"):
        scene.save("scene.obj")
