"""Pictures: captions that can be read, legends that tell the truth, videos that lose nothing."""

import re

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from imageio.config import known_plugins

import eval as eval_script
from selfocc import InputError, panels, pictures, presets
from selfocc.config import DataConfig
from selfocc.datasets import check
from selfocc.datasets.overlays import overlay
from selfocc.datasets.synthetic import SyntheticConfig, SyntheticSequence, synthetic_sequences
from selfocc.datasets.video import VideoDataset
from selfocc.model import SelfOcc
from selfocc.street.rigs import make_rig
from tests.tiny import SETTINGS

REAL = dict(known_plugins)
SURROUND = ("front left", "front", "front right", "back left", "back", "back right")


def ink(picture):
    """Rows and columns of the pixels that are darker than half grey."""
    return np.nonzero((picture < 128).all(-1))


def height_of(line):
    rows, _ = ink(line)
    return rows.max() - rows.min() + 1


@pytest.mark.parametrize("width", [320, 1242, 5820])
def test_captions_grow_with_the_picture_and_hide_nothing(width):
    picture = np.full((90, width, 3), 200, np.uint8)
    size = pictures.text_size(width)
    captioned = pictures.caption(picture, "Tall gypsy", size)
    above = len(captioned) - len(picture)
    assert (captioned[above:] == picture).all()
    assert size >= max(12, 0.012 * width)
    assert 0.8 * size < height_of(captioned[:above]) < above - 2  # nothing is cut off


@pytest.mark.parametrize("width", [1, 9, 33, 64, 200, 330])
@pytest.mark.parametrize("text", ["2011_09_26_drive_0052_sync/l 0000000044", "Straße 北京\n2", ""])
def test_long_captions_shrink_and_are_shortened_to_fit(width, text):
    line = pictures.caption(np.full((5, width, 3), 255, np.uint8), text, 12)[:-5]
    rows, columns = ink(line)
    assert line.shape[1] == width
    if len(rows):
        assert rows.min() >= 1 and rows.max() < len(line) - 1
        assert columns.max() < width - 1 or width < 10
    if text and width >= 33:
        assert columns.max() > 20  # something is said


def test_captions_do_without_freetype(monkeypatch):
    bitmap = pictures.ImageFont.load_default_imagefont()

    def old(size=None):
        if size is not None:
            raise ImportError("The _imagingft C module is not installed")
        return bitmap

    pictures._font.cache_clear()
    monkeypatch.setattr(pictures.ImageFont, "load_default", old)
    try:
        line = pictures.caption(np.full((4, 100, 3), 255, np.uint8), "Größe of a long street", 12)
        bar = pictures.legend(100, pictures.DEPTH_TICKS, 12)
    finally:
        pictures._font.cache_clear()
    assert len(ink(line)[0]) > 20 and line.shape[1] == bar.shape[1] == 100


def metres(label):
    return float(re.fullmatch(r"[<>]?(-?[\d.]+) (m|%)", label).group(1))


def marks(bar, size):
    """Columns that have a tick mark, and the colour above each."""
    below = pictures.GAP + max(size // 2, 6)
    return {int(x): tuple(bar[below - 1, x]) for x in np.flatnonzero((bar[below] == 0).all(-1))}


@pytest.mark.parametrize(("width", "size"), [(320, 12), (1280, 32), (4808, 60), (40, 12)])
def test_the_depth_legend_has_the_colours_of_its_metres(width, size):
    bar = pictures.legend(width, pictures.DEPTH_TICKS, size)
    found = marks(bar, size)
    expected = {}
    for label, number in pictures.DEPTH_TICKS.items():
        z = 1e9 if label == "far" else metres(label)
        color = pictures.depth_picture(torch.full((1, 1), z))[0, 0].astype(int)
        assert abs(color - pictures.turbo(np.array(pictures.NEAREST / z))).max() <= 1
        margin = min(size // 2, width // 4)
        expected[margin + round(number * (width - 1 - 2 * margin))] = color
    assert set(found) <= set(expected) and margin in found
    assert len(found) >= (5 if width >= 320 else 1)
    slope = 5 * 255 / (width - 2 * margin)  # of turbo, from one column to the next
    for x, color in found.items():
        assert abs(np.array(color, int) - expected[x]).max() <= 1 + slope


def test_the_error_legend_has_the_colours_of_its_percentages():
    bar = pictures.legend(960, pictures.ERROR_TICKS, 12)
    found = marks(bar, 12)
    assert len(found) == len(pictures.ERROR_TICKS) == 6
    for label, (x, color) in zip(pictures.ERROR_TICKS, sorted(found.items()), strict=True):
        truth = torch.full((1, 1), 20.0)
        error = pictures.error_picture(truth * (1 + metres(label) / 100), truth)[0, 0]
        assert abs(np.array(color, int) - error.astype(int)).max() <= 2, (label, x)


def test_the_height_legend_has_the_colours_of_its_metres():
    box = (0.0, 0.0, -2.0, 4.0, 4.0, 4.4)
    ticks = pictures.height_ticks(box)
    assert list(ticks) == ["-2 m", "-1 m", "0 m", "1 m", "2 m", "3 m", "4 m", "4.4 m"]
    for label, number in ticks.items():
        assert metres(label) == pytest.approx(-2 + 6.4 * number)
    for layer in range(16):  # tops of voxels of 0.4 m, seen from above, are as bright as the bar
        grid = torch.zeros(10, 10, 16, dtype=torch.bool)
        grid[:, :, layer] = True
        seen = pictures.occupancy_picture(grid, box, "above", (20, 20))[10, 10]
        centre = -2 + 0.4 * (layer + 0.5)
        assert abs(seen.astype(int) - pictures.turbo(np.array((centre + 2) / 6.4))).max() <= 1


@pytest.mark.parametrize("width", [60, 200, 330, 1280])
def test_labels_of_a_legend_do_not_touch(width):
    size = pictures.text_size(2 * width)
    box = (-51.2, -51.2, -4.0, 51.2, 51.2, 5.0)
    for ticks in (pictures.DEPTH_TICKS, pictures.ERROR_TICKS, pictures.height_ticks(box)):
        bar = pictures.legend(width, ticks, size)
        shown = len(marks(bar, size))
        labels = bar[-round(1.4 * size) :]
        columns = np.unique(ink(labels)[1])
        assert columns.min() >= 3 and columns.max() < width - 3  # the next legend is near
        words = 1 + (np.diff(columns) > size // 3).sum()  # a label has narrower gaps than that
        assert shown <= words <= 2 * shown  # "50" and "m" may count as two


def test_dots_of_scans_are_seen_in_wide_pictures():
    truth = torch.zeros(40, 1600)
    truth[20, 800], truth[20, 802] = 10.0, 20.0
    picture = pictures.error_picture(torch.full_like(truth, 10.0), truth)
    seen = (picture != pictures.NOTHING).any(-1)
    assert 20 <= seen.sum() <= 32
    assert (picture[20, 802] == pictures.turbo(np.array(1.0))).all()  # 50 % off
    assert (picture[20, 800] == pictures.turbo(np.array(1e-6))).all()  # not off
    small = np.eye(9, dtype=np.float32)
    assert (pictures.spread(small) == small).all()


def test_cameras_lie_as_they_look():
    surround = make_rig("surround", (96, 160))
    rows = pictures.rig_rows(surround.camera_to_volume)
    assert [[surround.names[k] for k in row] for row in rows] == [
        list(SURROUND[:3]), list(SURROUND[3:]),
    ]  # fmt: skip
    turned = np.array([[0.0, -1, 0, 5], [1, 0, 0, 3], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert pictures.rig_rows(turned @ surround.camera_to_volume) == rows
    assert pictures.rig_rows(make_rig("forward", (96, 320)).camera_to_volume) == [[0]]
    four = surround.camera_to_volume[[0, 1, 2, 3]]
    assert pictures.rig_rows(four) == [[2, 0, 1], [3]]


def test_occupancy_is_seen_from_behind_wherever_the_front_is():
    ahead = torch.zeros(4, 6, 2, dtype=torch.bool)  # y, x, z
    ahead[3, 5, 0] = True  # front left of a vehicle that looks along x
    box = (0.0, -4.0, 0.0, 12.0, 4.0, 2.0)
    grid, turned = pictures.facing_y(ahead, box, np.array([1.0, 0, 0]))
    assert turned == (-4.0, 0.0, 0.0, 4.0, 12.0, 2.0)
    assert grid.nonzero().tolist() == [[5, 0, 0]]  # far and left
    assert pictures.facing_y(ahead, box, np.array([0.1, 1, 0])) == (ahead, box)


def tiny_model(rig, colors=1):
    settings = SETTINGS | {"data.rig": rig, "backbone.weights": "none", "volume.voxel": "4"}
    overrides = [f"{name}={value}" for name, value in settings.items()]
    if not colors:
        overrides += ["field.colors=0", "loss.weight_color=0"]
    return SelfOcc(presets.build("synthetic_surround", overrides)).eval()


class Sometimes(SyntheticSequence):
    """The world, known in the first frame only, as nuScenes between its key frames."""

    def __init__(self, world):
        vars(self).update(vars(world))

    def depth(self, frame):
        return None if frame else super().depth(frame)

    def voxels(self, frame):
        y, x, z = self.rig.grid
        return None if frame else np.broadcast_to(np.arange(z) < 4, (y, x, z)).astype(np.uint8)

    def lidar(self, frame):
        return None


@pytest.mark.parametrize(("rig", "colors"), [("surround", 1), ("forward", 0)])
def test_panels_of_a_video_show_every_camera_and_have_one_size(rig, colors, cache, monkeypatch):
    world = SyntheticConfig(rig=rig, image_size=(32, 64), frames=2)
    sequence = Sometimes(synthetic_sequences(world, "val", 1, cache=cache)[0])
    model = tiny_model(rig, colors)
    dataset = VideoDataset([sequence], model.config.data, train=False)
    captions = []
    written = pictures.caption
    monkeypatch.setattr(
        pictures, "caption", lambda p, text, *more: captions.append(text) or written(p, text, *more)
    )
    shown = panels.FlyThrough(model, dataset, torch.device("cpu"))
    first, second = shown
    assert len(shown) == 2 and first.shape == second.shape
    assert first.shape[1] == 2 * 320 + pictures.GAP and first.dtype == np.uint8
    for name in SURROUND if rig == "surround" else ():
        # image, colour and depth of two frames, error of the one that has truth
        assert captions.count(name) == 7
    for camera, image in enumerate(sequence.images(0)):
        places = pictures.rig_rows(sequence.rig.camera_to_volume)
        each = (320 - pictures.GAP * (len(places[0]) - 1)) // len(places[0])
        wanted = pictures.scaled(image, each)
        assert found(first[:200, :330], wanted), f"camera {camera} is not shown"


def found(whole, part):
    """Whether a picture is somewhere in another, to a grey value."""
    height, width = part.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(whole[..., 0], (height, width))
    corners = windows[:, :, :: height - 1, :: width - 1].astype(int)
    near = abs(corners - part[:: height - 1, :: width - 1, 0]).max((2, 3)) <= 1
    return any(
        abs(whole[y : y + height, x : x + width].astype(int) - part).max() <= 1
        for y, x in zip(*np.nonzero(near), strict=True)
    )


def test_the_overlay_of_check_has_the_colours_of_the_legend(cache):
    world = SyntheticConfig(rig="surround", image_size=(32, 64), frames=2)
    sequence = synthetic_sequences(world, "val", 1, cache=cache)[0]
    z = sequence.depth(0)
    for camera, drawn in enumerate(overlay(Sometimes(sequence), 0)):
        near, image = pictures.inverse_depth(z[camera]), sequence.image(0, camera)
        assert (drawn == np.where(near[..., None] > 0, pictures.turbo(near), image)).all()


def test_the_check_picture_shows_cameras_of_any_size_by_name(cache, monkeypatch):
    world = SyntheticConfig(rig="surround", image_size=(32, 64), frames=2)
    sequence = synthetic_sequences(world, "val", 1, cache=cache)[0]
    images = [np.pad(image, [(0, 8 * k), (0, 8 * k), (0, 0)]) for k, image in
              enumerate(sequence.images(0))]  # fmt: skip
    monkeypatch.setattr(sequence, "images", lambda _: images)
    assert [p.shape for p in overlay(sequence, 0)] == [image.shape for image in images]
    captions = []
    written = pictures.caption
    monkeypatch.setattr(
        pictures, "caption", lambda p, text, *more: captions.append(text) or written(p, text, *more)
    )
    report = check.Report("val", [sequence], DataConfig())
    picture = report.picture()
    assert picture.shape[1] == 3 * images[-1].shape[1] + 2 * pictures.GAP
    assert captions == [*SURROUND, f"LiDAR of {sequence.name} 000001"]


# videos


def frames(count=5, height=49, width=75):
    y, x = np.mgrid[:height, :width]
    return [
        np.stack([4 * y, 3 * x, np.full_like(x, 50 * k)], -1).astype(np.uint8) for k in range(count)
    ]


class Broken:
    """A plugin of imageio that fails as told: when imported, or when the n-th frame is written."""

    def __init__(self, error, at=None):
        self.error, self.at, self.seen = error, at, 0

    @property
    def plugin_class(self):
        if self.at is None:
            raise self.error
        return lambda request: self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, frame, **_):
        self.seen += 1
        if self.seen > self.at:
            raise self.error


@pytest.fixture
def no_plugin(monkeypatch):
    """As if nothing for videos were installed beside imageio."""
    for plugin, module in pictures.PLUGINS.items():
        error = ModuleNotFoundError(f"No module named {module!r}", name=module)
        monkeypatch.setitem(known_plugins, plugin, Broken(error))


def test_without_a_plugin_a_gif_is_a_choice(no_plugin, tmp_path, recwarn, capfd):
    plugin, why_not = pictures.video_plugin()
    assert plugin is None
    assert why_not == "without `pip install imageio[pyav]` (or imageio-ffmpeg) the video is a GIF"
    path = pictures.write_video(tmp_path / "video", frames(), plugin=plugin)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] == ["video.gif"]
    read = iio.imread(path, plugin="pillow")
    assert read.shape == (5, 50, 76, 3)  # odd sizes are padded, not cropped
    assert (read[:, 49] > 250).all() and (read[:, :, 75] > 250).all()
    for have, want in zip(read, frames(), strict=True):
        assert abs(have[:49, :75].astype(int) - want).mean() < 12  # 256 colours
    assert iio.immeta(path, plugin="pillow")["duration"] == pytest.approx(125, abs=5)
    assert not recwarn.list and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "plugin",
    [
        Broken(ImportError("libavcodec.so.61: cannot open shared object file")),
        Broken(ModuleNotFoundError("No module named 'av._core'", name="av._core")),
        Broken(RuntimeError("unknown encoder 'libx264'\nand more"), at=0),
        Broken(TypeError("expected bytes, NoneType found"), at=1),
    ],
    ids=lambda plugin: str(plugin.error)[:12],
)
def test_a_broken_plugin_is_found_before_anything_is_rendered(plugin, no_plugin, monkeypatch):
    monkeypatch.setitem(known_plugins, "pyav", plugin)
    chosen, why_not = pictures.video_plugin()
    assert chosen is None
    reason = f"{type(plugin.error).__name__}: {str(plugin.error).splitlines()[0]}"
    assert why_not == f"av cannot write a video ({reason}), so it is a GIF"


@pytest.mark.parametrize("at", [0, 3])
def test_a_plugin_that_fails_later_loses_no_frame(at, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(known_plugins, "pyav", Broken(ValueError("odd"), at))
    path = pictures.write_video(tmp_path / "v", frames(), plugin="pyav")
    assert [p.name for p in tmp_path.iterdir()] == ["v.gif"]
    assert len(iio.imread(path, plugin="pillow")) == 5
    said = capsys.readouterr()
    assert "note: av cannot write a video (ValueError: odd), so it is a GIF" in said.out + said.err


def test_what_a_plugin_leaves_torn_is_not_taken_for_a_video(monkeypatch, tmp_path):
    """imageio-ffmpeg says nothing where the disk is full: the file ends in the middle."""
    torn = (32).to_bytes(4, "big") + b"ftyp" + bytes(24) + (9999).to_bytes(4, "big") + b"mdat"

    class Torn(Broken):
        @property
        def plugin_class(self):
            return lambda request: request.get_file().write(torn) and self

        def write(self, frames, **_):
            return list(frames)

    monkeypatch.setitem(known_plugins, "FFMPEG", Torn(None))
    path = pictures.write_video(tmp_path / "v", frames(), plugin="FFMPEG")
    assert path.name == "v.gif" and not (tmp_path / "v.mp4").exists()


def test_a_fault_of_a_frame_is_no_fault_of_the_plugin(monkeypatch, tmp_path):
    class Damaged:
        def __iter__(self):
            yield frames()[0]
            raise InputError("000007.png: damaged")

    monkeypatch.setitem(known_plugins, "pyav", Broken(None, at=99))
    (tmp_path / "v.gif").write_bytes(b"earlier")
    for plugin in ("pyav", None):
        with pytest.raises(InputError, match=r"000007.png: damaged"):
            pictures.write_video(tmp_path / "v", Damaged(), plugin=plugin)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"earlier"]


def test_eval_asks_before_it_reads_any_data(
    finished, cache, no_plugin, tmp_path, monkeypatch, capsys
):
    def opened(*_):
        raise InputError("now the data are opened")

    words = ["--ckpt", str(finished), "--out", str(tmp_path), "--frames", "1", "--task", "depth"]
    words += ["--prior-frames", "1", "--pictures", "0", "--video"]
    with monkeypatch.context() as patch:
        patch.setattr(eval_script, "open_sequences", opened)
        assert eval_script.main(words) == 2
    said = capsys.readouterr()
    assert "note: without `pip install imageio[pyav]`" in said.out and "now the data" in said.err
    monkeypatch.setenv("SELFOCC_CACHE", str(cache))
    monkeypatch.setattr(panels, "FlyThrough", lambda *_: frames())
    assert eval_script.main(words) == 0
    said = capsys.readouterr()
    assert f"video: {tmp_path / 'video.gif'}\n" in said.out and "Traceback" not in said.err
    assert len(iio.imread(tmp_path / "video.gif", plugin="pillow")) == 5


@pytest.mark.parametrize(("module", "plugin"), [(m, p) for p, m in pictures.PLUGINS.items()])
def test_mp4_holds_every_pixel_of_every_frame(
    module, plugin, no_plugin, tmp_path, monkeypatch, recwarn
):
    pytest.importorskip(module)
    monkeypatch.setitem(known_plugins, plugin, REAL[plugin])
    assert pictures.video_plugin()[0] == plugin
    smaller = frames(1, 30, 40)[0]
    larger, thin = np.zeros((98, 300, 3), np.uint8), np.zeros((9000, 10, 3), np.uint8)
    shown = [*frames(), smaller, larger, thin]
    read = pictures.write_video(tmp_path / "v", shown, plugin=plugin)
    assert read == tmp_path / "v.mp4" and not recwarn.list
    video = iio.imread(read, plugin=plugin)
    assert video.shape == (8, 50, 76, 3)  # neither cropped nor stretched
    for have, want in zip(video, frames(), strict=False):
        assert abs(have[:49, :75].astype(int) - want).mean() < 6
    assert (video[:5, 49].mean((1, 2)) > 225).all()  # the white margin
    assert abs(video[5, :30, :40].astype(int) - smaller).mean() < 10
    assert (video[5, 34:, 44:] > 235).all()
    assert (video[6, :20, :70] < 40).all() and (video[6, 30:] > 220).all()
