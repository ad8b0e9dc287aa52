"""`python -m selfocc.predict`: images, folders and videos of one camera."""

import re

import imageio.v3 as iio
import numpy as np
import pytest

import selfocc
from selfocc import predict
from tests.test_scene import camera, noise, written

HEIGHT = ["--camera-height", "1.65"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return written(tmp_path_factory.mktemp("weights"), "synthetic", "volume.voxel=4")


@pytest.fixture
def drive(tmp_path):
    """A folder of three images, and other files."""
    folder = tmp_path / "drive"
    folder.mkdir()
    for number in range(3):
        iio.imwrite(folder / f"{number}.png", noise(40, 70, number))
    (folder / "calib.txt").write_text("")
    return folder


def command(ckpt, *words):
    """The exit code."""
    return predict.main(["--ckpt", str(ckpt), "--device", "cpu", *map(str, words)])


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder(ckpt, drive, tmp_path, capsys):
    out = tmp_path / "out"
    words = [drive, "--intrinsics", "50,51,33,20", "--pitch", "4", "--out", out, "--html"]
    assert command(ckpt, *words, *HEIGHT) == 0
    names = [f"{number}.{kind}" for number in range(3) for kind in ("npz", "png")]
    assert files(out) == [*names, "page.html"]
    model = selfocc.load(ckpt, "cpu")
    k = np.array([[50, 0, 33], [0, 51, 20], [0, 0, 1]])
    for number in range(3):
        scene = model.predict(noise(40, 70, number), k, model.level_camera(1.65, 4.0))
        arrays = np.load(out / f"{number}.npz")
        assert np.array_equal(arrays["sdf"], scene.sdf) and tuple(arrays["box"]) == scene.box
        assert np.array_equal(iio.imread(out / f"{number}.png"), scene.panel(f"{number}"))
    page = (out / "page.html").read_text()
    assert [f'"name": "{n}"' in page for n in range(4)] == [True, True, True, False]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"3 frames in {out}, the first 3 also in page.html; ")
    rates = re.search(r"; ([\d.]+) a second, the network alone ([\d.]+) \(medians\)$", line)
    assert 0 < float(rates[1]) <= float(rates[2])


def test_field_of_view_and_every_second_image(ckpt, drive, tmp_path):
    out = tmp_path / "out"
    assert command(ckpt, drive, "--fov", "90", "--every", "2", "--out", out, *HEIGHT) == 0
    assert files(out) == ["0.npz", "0.png", "2.npz", "2.png"]
    model = selfocc.load(ckpt, "cpu")
    scene = model.predict(noise(40, 70, 2), camera(40, 70, 35.0), model.level_camera(1.65))
    assert np.abs(np.load(out / "2.npz")["sdf"] - scene.sdf).max() < 1e-4


@pytest.mark.parametrize("kind", ["gif", "mp4"])
def test_a_video(kind, ckpt, tmp_path):
    if kind == "mp4":
        pytest.importorskip("av", reason="mp4 needs av (imageio[pyav])")
    video, out = tmp_path / f"drive.{kind}", tmp_path / "out"
    options = dict(plugin="pyav", codec="libx264") if kind == "mp4" else dict(duration=100)
    iio.imwrite(
        video, np.stack([np.full((40, 70, 3), 50 * n, np.uint8) for n in range(5)]), **options
    )
    assert command(ckpt, video, "--fov", "80", "--every", "2", "--out", out, *HEIGHT) == 0
    names = ["000000", "000002", "000004"]
    assert files(out) == sorted(f"{name}.{x}" for name in names for x in ("npz", "png"))
    for number, name in zip((0, 2, 4), names, strict=True):
        image = iio.imread(out / f"{name}.png")[40:100, 100:500]
        assert np.abs(image.astype(int) - 50 * number).max() <= 4


def test_the_page_has_no_more_frames_than_a_browser_can_hold(
    ckpt, drive, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(predict, "ON_PAGE", 2)
    out = tmp_path / "out"
    assert command(ckpt, drive, "--fov", "80", "--html", "--out", out, *HEIGHT) == 0
    assert "2.npz" in files(out) and '"name": "2"' not in (out / "page.html").read_text()
    assert f"3 frames in {out}, the first 2 also in page.html" in capsys.readouterr().out


def test_what_is_written_stays_where_an_image_is_damaged(ckpt, drive, tmp_path, capsys):
    whole = (drive / "2.png").read_bytes()
    (drive / "2.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    assert command(ckpt, drive, "--fov", "80", "--html", "--out", out, *HEIGHT) == 2
    assert files(out) == ["0.npz", "0.png", "1.npz", "1.png", "page.html"]
    assert '"name": "1"' in (out / "page.html").read_text()
    said = capsys.readouterr()
    assert not said.out
    assert error(said.err) == f"error: {drive / '2.png'}: damaged or unreadable PNG; copy it again"


def error(text):
    """The one line after the progress bar."""
    (line,) = (x for x in text.split("\n") if x.startswith("error: "))
    assert text.endswith(f"{line}\n")
    return line


@pytest.mark.parametrize("content", ["", "torn", "gif"])
def test_a_video_that_cannot_be_read(content, ckpt, tmp_path, capsys):
    video, out = tmp_path / f"drive.{'gif' if content == 'gif' else 'mp4'}", tmp_path / "out"
    video.write_bytes(content.encode())
    assert command(ckpt, video, "--fov", "80", "--html", "--out", out, *HEIGHT) == 2
    assert f"{video}: frame 0 cannot be read" in error(capsys.readouterr().err)
    assert not out.exists()


def test_an_empty_video(ckpt, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict.iio, "imiter", lambda path: iter(()))
    (tmp_path / "drive.mp4").write_bytes(b"")
    assert command(ckpt, tmp_path / "drive.mp4", "--fov", "80", "--out", tmp_path, *HEIGHT) == 2
    assert "frame 0 cannot be read (it has no frames); copy" in error(capsys.readouterr().err)


BAD = [
    (["DRIVE"], "give --intrinsics FX,FY,CX,CY in pixels"),
    (["DRIVE", "--fov", "80", "--intrinsics", "1,2,3,4"], "not allowed with"),
    (["DRIVE", "--intrinsics", "50,50,35"], "invalid four_numbers value: '50,50,35'"),
    (["DRIVE", "--intrinsics", "500,500,350,200"], "do not suit images of 40x70 pixels"),
    (["DRIVE", "--fov", "0"], "do not suit images of 40x70 pixels"),
    (["DRIVE", "--fov", "nan"], "intrinsics: not all numbers are finite"),
    (["DRIVE", "--fov", "80", "--pitch", "nan"], "camera_to_volume: not all numbers are finite"),
    (["DRIVE", "--fov", "80", "--out", "DRIVE"], "holds the images and would overwrite them"),
    (["DRIVE", "DRIVE", "--fov", "80"], "some images have the same name"),
    (["DRIVE", "DRIVE/calib.txt", "--fov", "80"], "calib.txt: not .png .jpg"),
    (["EMPTY", "--fov", "80"], "holds no images"),
    (["DRIVE/9.png", "--fov", "80"], "9.png: no such file"),
]


@pytest.mark.parametrize("words, said", BAD)
def test_wrong_input(words, said, ckpt, drive, tmp_path, capsys):
    (tmp_path / "EMPTY").mkdir()
    places = {"DRIVE": str(drive), "EMPTY": str(tmp_path / "EMPTY")}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert command(ckpt, "--out", tmp_path / "out", *HEIGHT, *words) == 2
    assert said in error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and len(files(drive)) == 4


def test_a_rig_is_for_python(drive, tmp_path, capsys):
    surround = written(tmp_path, "synthetic_surround", "volume.voxel=4")
    assert command(surround, drive, "--fov", "80", "--out", tmp_path / "out", *HEIGHT) == 2
    said = "1 image given, but the network sees a rig of 6 cameras at once; give selfocc.load"
    assert said in error(capsys.readouterr().err)
