"""The page, and meshes: what is written is what was given, and a browser draws it."""

import base64
import io
import json
import re
import shutil
import subprocess
import zlib

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import eval as eval_script
from selfocc import InputError, checkpoint, mesh, panels, pictures
from selfocc.batch import collate
from selfocc.datasets import Folders, open_dataset
from selfocc.datasets.video import VideoDataset
from selfocc.inference import Predictor
from selfocc.labels import OCC3D, SEMANTICKITTI, voxel_palette
from selfocc.model import SelfOcc
from selfocc.page import STEP, Shown, write_page
from selfocc.presets import build
from tests.test_scene import written
from tests.tiny import here, overrides

BOX = (-8.0, 0.0, -1.0, 8.0, 16.0, 3.0)
RED, BLUE, GREY = (220, 40, 60), (30, 90, 230), (120, 130, 125)
PALETTE = {
    1: ("wall", RED),
    2: ("</script> & hedge", BLUE),
    3: ("ground", GREY),
    9: ("crane", RED),
}


def scene():
    """Voxels of 0.5 m: ground, a red block near on the right, a blue one far on the left."""
    classes = np.zeros((32, 32, 8), np.uint8)
    classes[:, :, 0] = 3
    classes[4:8, 20:26, 1:4] = 1
    classes[22:30, 4:12, 1:5] = 2
    sdf = np.where(classes > 0, -0.1, 0.7).astype(np.float32)
    sdf[16, 16, 6] = 0.4  # occupied only at a higher threshold
    return sdf, classes


def read(path):
    text = path.read_text()
    return json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def unpack(text, shape):
    """A grid, without its margin of voxels that are free."""
    packed = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    grid = packed.reshape([n + 2 for n in shape])
    inside = grid[1:-1, 1:-1, 1:-1]
    assert (grid == 255).sum() == grid.size - inside.size + (inside == 255).sum()
    return inside


def bare(occupied):
    """[6, ny, nx, nz]: which occupied voxels have a free neighbour, or none, on each side."""
    padded = np.pad(occupied, 1)
    ny, nx, nz = occupied.shape
    sides = [(0, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2)]
    beside = [padded[y : y + ny, x : x + nx, z : z + nz] for y, x, z in sides]
    return occupied & ~np.array(beside)


def test_the_page_holds_what_it_was_given(tmp_path):
    rng = np.random.default_rng(0)
    shape, threshold = (9, 7, 5), 0.15
    sdf = rng.uniform(-3, 3, shape).astype(np.float32)
    sdf[0, 0, :4] = np.inf, -np.inf, np.nan, threshold
    classes = rng.integers(1, 4, shape).astype(np.uint8)
    truth = rng.random(shape) < 0.3
    picture = np.full((20, 30, 3), 90, np.uint8)
    picture[:, 15:] = 200, 30, 30
    frames = [
        Shown("a/0", sdf, classes, {"image": picture}, truth),
        Shown("a/1", sdf + 1, None, {}),
    ]
    write_page(tmp_path / "page.html", iter(frames), BOX, threshold, "<b>", PALETTE)
    content = read(tmp_path / "page.html")
    assert content["shape"] == list(shape) and content["box"] == list(BOX)
    assert (content["title"], content["threshold"], content["step"]) == ("<b>", 0.15, STEP)
    assert content["names"] == {str(k): PALETTE[k][0] for k in (1, 2, 3)}
    assert content["colours"][2] == list(BLUE)
    assert content["heights"] == pictures.turbo(np.array([0.1, 0.3, 0.5, 0.7, 0.9])).tolist()
    first, second = content["frames"]
    assert [first["name"], second["name"]] == ["a/0", "a/1"]
    assert second["pictures"] == {} and not {"classes", "truth"} & second.keys()
    assert (unpack(first["classes"], shape) == classes).all()
    assert ((unpack(first["truth"], shape) <= 128) == truth).all()
    shown = iio.imread(io.BytesIO(base64.b64decode(first["pictures"]["image"])), extension=".jpg")
    assert abs(shown.astype(int) - picture)[:, [0, 7, 22, 29]].max() < 8
    for frame, given in zip(content["frames"], (sdf, sdf + 1), strict=True):
        levels = unpack(frame["sdf"], shape)
        for level in range(255):  # what the slider can say
            metres = threshold + (level - 128) * STEP
            assert ((levels <= level) == (given <= metres)).all() or level == 0, level
        near = abs(given - threshold) < 1.9
        centres = threshold + (levels - 128.5) * STEP
        assert near.sum() > 100 and abs(centres - given)[near].max() <= STEP / 2 + 1e-6


def test_ahead_is_the_front_of_the_box(tmp_path):
    sdf, _ = scene()
    frames = [Shown("a", sdf, None, {})]
    around = (-8.0, -8.0, -1.0, 8.0, 8.0, 3.0)
    for box, given, ahead in (
        (BOX, None, (0, 1)),
        (around, None, (1, 0)),
        (around, (0, 2.0, 0.1), (0, 1)),
    ):
        write_page(tmp_path / "page.html", frames, box, 0.0, "a", ahead=given)
        assert read(tmp_path / "page.html")["ahead"] == list(ahead)


def test_what_cannot_be_shown_is_said(tmp_path):
    sdf, classes = scene()
    good = Shown("a", sdf, None, {})
    for frames, said in (
        ([], "a page needs a frame"),
        ([good, Shown("b", sdf[1:], None, {})], r"b: voxels are \(31, 32, 8\), not \(32, 32, 8\)"),
        ([Shown("b", sdf, classes, {})], "give one, as labels.voxel_palette does"),
    ):
        with pytest.raises(InputError, match=said):
            write_page(tmp_path / "page.html", frames, BOX, 0.0, "a")
    with pytest.raises(InputError, match=r"labels\.voxel_palette"):
        mesh.write_ply(tmp_path / "mesh.ply", sdf, BOX, 0.0, classes)
    assert list(tmp_path.iterdir()) == []


def test_every_class_has_a_colour_of_its_own():
    for dataset, names in (("nuscenes", OCC3D), ("kitti", SEMANTICKITTI)):
        palette = voxel_palette(dataset)
        assert tuple(name for name, _ in palette.values()) == names and palette[0][0] == "free"
    assert len({colour for _, colour in voxel_palette("nuscenes").values()}) == len(OCC3D)


def read_ply(path):
    """vertices [V, 3], colours [V, 3] and triangles [F, 3], as the header describes them."""
    header, body = path.read_bytes().split(b"end_header\n", 1)
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    counts = [int(line.split()[2]) for line in lines if line.startswith("element")]
    properties = [line.split()[1:] for line in lines if line.startswith("property")]
    assert properties[-1] == ["list", "uchar", "int", "vertex_indices"]
    kinds = {"float": "<f4", "uchar": "u1"}
    vertex = np.dtype([(name, kinds[kind]) for kind, name in properties[:-1]])
    vertices = np.frombuffer(body, vertex, counts[0])
    rest = body[counts[0] * vertex.itemsize :]
    faces = np.frombuffer(rest, [("n", "u1"), ("corners", "<i4", 3)])
    assert len(faces) == counts[1] and (faces["n"] == 3).all()
    columns = (np.stack([vertices[name] for name in names], 1) for names in ("xyz", COLOUR))
    return *columns, faces["corners"]


COLOUR = ["red", "green", "blue"]


@pytest.mark.parametrize("by", ["height", "class"])
def test_a_mesh_is_closed_and_coloured(by, tmp_path):
    rng = np.random.default_rng(1)
    sdf, box, threshold = rng.normal(size=(6, 9, 4)), (-3.0, 1.0, -2.0, 1.5, 4.0, 0.0), -0.2
    occupied = sdf <= threshold  # voxels of 0.5 m
    classes = rng.integers(1, 4, sdf.shape).astype(np.uint8) if by == "class" else None
    mesh.write_ply(tmp_path / "mesh.ply", sdf, box, threshold, classes, PALETTE)
    points, colours, triangles = read_ply(tmp_path / "mesh.ply")
    assert len(triangles) == 2 * bare(occupied).sum()
    a, b, c = points[triangles].swapaxes(0, 1).astype(np.float64)
    normals = np.cross(b - a, c - a)
    # by the theorem of Gauss, which holds only where every face looks outwards
    assert (normals * a).sum() / 6 == pytest.approx(0.125 * occupied.sum())
    y, x, z = np.nonzero(occupied)
    corners = np.stack([x, y, z], 1)[:, None] + np.indices((2, 2, 2)).reshape(3, 8).T
    known = np.unique(corners.reshape(-1, 3), axis=0) * 0.5 + box[:3]
    # a corner that eight occupied voxels share is inside
    assert {*map(tuple, points)} <= {*map(tuple, known)}
    assert (points.min(0) == known.min(0)).all() and (points.max(0) == known.max(0)).all()
    assert len(np.unique(np.concatenate([points, colours], 1), axis=0)) == len(points)
    inside = (points[triangles].mean(1) - 0.1 * normals / 0.25 - box[:3]) / 0.5
    x, y, z = np.floor(inside).astype(int).T
    assert occupied[y, x, z].all()
    expected = pictures.turbo((z + 0.5) / 4)
    if by == "class":
        expected = np.array([(0, 0, 0), RED, BLUE, GREY])[classes[y, x, z]]
    assert (colours[triangles] == expected[:, None]).all()


def test_nothing_makes_an_empty_mesh(tmp_path):
    mesh.write_ply(tmp_path / "mesh.ply", np.ones((2, 3, 4)), BOX, 0.0)
    assert [len(part) for part in read_ply(tmp_path / "mesh.ply")] == [0, 0, 0]


def predicted(model, dataset, index, shape=None):
    batch = collate([dataset[index]])
    return Predictor(model, shape=shape)(batch.images, batch.intrinsics, batch.camera_to_volume)


def test_eval_writes_the_page(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(panels, "FRAMES", 2)
    options = ("--task", "depth", "--frames", 1, "--prior-frames", 1, "--pictures", 0, "--html")
    untrained = written(tmp_path, "synthetic", "data.frames=6")
    assert here(eval_script, "--ckpt", untrained, "--out", tmp_path, *options, cache=cache) == 0
    content = read(tmp_path / "page.html")
    assert len(content["frames"]) == 2 and content["title"].startswith("synthetic on ")
    monkeypatch.setenv("SELFOCC_CACHE", str(cache))
    saved = checkpoint.load(untrained)
    model = SelfOcc(saved.config).eval()
    checkpoint.restore(saved, model)
    dataset = open_dataset(model.config, "val", Folders())
    frames = VideoDataset.every_frame(dataset.sequences[0], dataset.config)
    for frame, index in zip(content["frames"], (0, 5), strict=True):
        sdf = predicted(model, frames, index).sdf.numpy()
        assert frame["name"].endswith(f"/{index:06d}")
        levels = unpack(frame["sdf"], sdf.shape)
        assert ((levels <= 128) == (sdf <= content["threshold"])).all() and levels.std() > 1
        labels = torch.from_numpy(dataset.sequences[0].voxels(index))
        occupied = (labels > 0) & (labels != 255)
        pooled = torch.nn.functional.max_pool3d(occupied[None].float(), 2)[0] > 0
        assert ((unpack(frame["truth"], sdf.shape) == 0) == pooled.numpy()).all()
        images = [iio.imread(base64.b64decode(p)) for p in frame["pictures"].values()]
        assert [image.shape for image in images] == [(160, 320, 3)] * 2


def test_classes_and_front_of_a_ring(cache, tmp_path, monkeypatch):
    """Of a frame without labels as well, whose voxels are as those of the labels."""
    monkeypatch.setenv("SELFOCC_CACHE", str(cache))
    more = overrides(data__frames="6", volume__threshold="1", field__classes="20")
    model = SelfOcc(build("synthetic_surround", more)).eval()
    dataset = open_dataset(model.config, "val", Folders())
    (sequence,), voxels = dataset.sequences, dataset.sequences[0].voxels
    monkeypatch.setattr(sequence, "voxels", lambda n: voxels(n) if n in sequence.labelled else None)
    monkeypatch.setattr(panels, "FRAMES", 2)
    sequence.labelled = [0]
    panels.write_page(tmp_path / "page.html", model, dataset, torch.device("cpu"))
    content = read(tmp_path / "page.html")
    assert content["ahead"] == pytest.approx((1, 0), abs=0.1)
    assert ["truth" in frame for frame in content["frames"]] == [True, False]
    frames = VideoDataset.every_frame(sequence, dataset.config)
    for frame, index in zip(content["frames"], (0, 5), strict=True):
        sdf, classes = predicted(model, frames, index, (200, 200, 16))
        occupied, shown = sdf.numpy() <= 1, unpack(frame["classes"], classes.shape)
        assert ((unpack(frame["sdf"], sdf.shape) <= 128) == occupied).all()
        assert occupied.any() and (shown == classes.numpy())[occupied].all()
        assert content["names"].keys() >= {str(k) for k in np.unique(shown[occupied])}


def browse(page, *options):
    chromium = shutil.which("chromium") or pytest.skip("chromium is not installed")
    flags = "--headless --no-sandbox --use-gl=angle --use-angle=swiftshader --hide-scrollbars "
    flags += "--enable-unsafe-swiftshader --enable-logging=stderr --virtual-time-budget=2000 "
    flags += "--disable-extensions --disable-background-networking --no-first-run"
    folder = f"--user-data-dir={page.parent / 'profile'}"
    command = [chromium, *flags.split(), folder, *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    sdf, classes = scene()
    frame = Shown("street/7", sdf, classes, {"picture": np.full((9, 16, 3), 99, np.uint8)}, sdf > 9)
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, [frame], BOX, 0.0, "Example", PALETTE)
    return path


@pytest.mark.parametrize("size", [(1000, 700), (500, 800)])
def test_a_browser_draws_the_voxels(size, example, tmp_path):
    file = tmp_path / "picture.png"
    browse(example, f"--screenshot={file}", f"--window-size={size[0]},{size[1]}")
    picture = iio.imread(file)[..., :3].astype(int)
    assert picture.shape[:2] == size[::-1]

    def where(colour):  # rows and columns, in shares of the page
        found = np.nonzero((abs(picture - colour) <= 2).all(-1))
        return np.array(found) / np.array([[size[1]], [size[0]]])

    middle = 0.36 if size[0] > 800 else 0.5  # of the drawing: pictures are beside it or below it
    red, blue, grey = (where(colour) for colour in (RED, BLUE, GREY))  # tops, in full light
    assert min(red.shape[1], blue.shape[1]) > 300 and grey.shape[1] > 5000
    (row, column), (far_row, far_column) = np.median(red, 1), np.median(blue, 1)
    assert column > middle + 0.05 and far_column < middle - 0.05  # x goes to the right
    assert row > far_row + 0.1  # what is near is below
    assert abs(np.median(grey[1]) - middle) < 0.06
    legend = [where(colour)[0].max() for colour in (RED, BLUE, GREY)]
    assert max(legend) - min(legend) < 0.05
    corner = picture[round(0.12 * size[1]), round(0.1 * size[0])]
    assert (corner == 255).all()  # nothing there


def test_a_browser_counts_the_surface(example):
    sdf, _ = scene()
    text = browse(example, "--dump-dom")
    voxels = bare(sdf <= 0).any(0).sum()
    assert f">{voxels:,} voxels at the surface<" in text and voxels < (sdf <= 0).sum()
    assert "<title>Example</title>" in text and ">street/7<" in text and ">0.00 m<" in text
    assert "&lt;/script&gt; &amp; hedge" in text and "crane" not in text


def test_without_webgl_a_sentence_says_so(example):
    text = browse(example, "--dump-dom", "--disable-3d-apis")
    assert re.search(r'<p id="sorry">Voxels need WebGL 2', text)
    assert ">street/7<" in text and "data:image/jpeg;base64" in text
