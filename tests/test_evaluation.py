"""Evaluations: with semantics, shared out among processes, broken off and taken up again."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace as replaced
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
import train as train_script
from selfocc import InputError, checkpoint, evaluation, metrics, protocols
from selfocc.batch import collate
from selfocc.config import DataConfig
from selfocc.datasets import Folders, open_dataset, open_sequences
from selfocc.datasets.export_kitti import export_kitti, export_kitti_raw
from selfocc.datasets.export_nuscenes import export_nuscenes
from selfocc.datasets.synthetic import SyntheticConfig, SyntheticSequence
from selfocc.datasets.video import VideoDataset
from selfocc.evaluation import Samples, evaluate
from selfocc.journal import Journal
from selfocc.labels import SEMANTICKITTI, label_map
from selfocc.model import Seen, SelfOcc
from selfocc.presets import build
from selfocc.render import render_grid
from selfocc.scores import SEEN, Scores, photometric_record
from tests.tiny import ROOT, TORCHRUN, environment, here, overrides, run

# with this threshold so young a model calls some voxels occupied
SEMANTIC = {"optim__steps": "2", "loss__weight_semantic": "0.1", "volume__threshold": "1"}
COMMON = ("--prior-frames", "2", "--pictures", "0", "--task", "all")


@pytest.fixture(scope="module")
def semantic(cache, tmp_path_factory):
    """The run folder of two steps with the semantic loss, evaluated by one process."""
    out = tmp_path_factory.mktemp("runs") / "semantic"
    assert here(train_script, "--out", out, cache=cache, **SEMANTIC) == 0
    assert here(eval_script, "--ckpt", out, *COMMON, cache=cache) == 0
    return out


def confusion(folder):
    """[truth, predicted] of all frames."""
    lines = (folder / "frames.0.jsonl").read_text().splitlines()[1:]
    return sum(torch.tensor(json.loads(line)["scores"]["semantics"]) for line in lines)


def results(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_semantics_of_the_embedded_world(semantic):
    tables = results(semantic / "eval")
    table = tables["semantics"]
    classes = table.keys() & set(SEMANTICKITTI)
    assert {"road", "sidewalk", "building"} <= classes and "free" not in classes
    mean = sum(table[name]["iou"] for name in classes) / len(classes)
    assert table["mIoU"]["iou"] == pytest.approx(mean) and 0 <= mean < 1
    line = json.loads((semantic / "metrics.jsonl").read_text().splitlines()[-2])
    assert line["semantic"] > 0
    assert {"occupancy", "depth, exact", "novel depth", "photometric"} <= tables.keys()
    assert tables["protocol"] == "own"


def test_two_processes_make_the_same_table(semantic, cache, tmp_path):
    torchrun = (*TORCHRUN[:-1], "eval.py")
    done = run(*torchrun, "--ckpt", semantic, "--out", tmp_path, *COMMON, cache=cache)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == results(semantic / "eval")
    assert done.stdout.count("IoU>0.3m") == 1  # only the first process talks
    shares = [(tmp_path / f"frames.{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert [len(lines) - 1 for lines in shares] == [2, 1]


def test_a_killed_evaluation_goes_on(semantic, cache, tmp_path):
    command = [sys.executable, "eval.py", "--ckpt", semantic, "--out", tmp_path, *COMMON]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(cache), stderr=subprocess.DEVNULL)
    file = tmp_path / "frames.0.jsonl"
    while not file.exists() or file.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "metrics.json").exists()
    begun = file.read_text().splitlines()
    file.write_text(file.read_text() + '{"frame": 10, "sco')  # torn, as a full disk leaves it
    assert here(eval_script, *command[2:], "--resume", cache=cache) == 0
    assert file.read_text().splitlines()[: len(begun)] == begun
    assert results(tmp_path) == results(semantic / "eval")


def test_another_evaluation_is_not_resumed(semantic, cache, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SELFOCC_CACHE", str(cache))
    file = tmp_path / "frames.0.jsonl"
    content = (semantic / "eval" / "frames.0.jsonl").read_text()
    options = ("--ckpt", str(semantic), "--out", str(tmp_path), *COMMON, "--resume")
    for change, said in (
        (("--protocol", "corrected"), "is of another evaluation"),
        (("--set", "volume.threshold=0.2"), "is of another evaluation"),
        (("--frames", "2"), "is of another evaluation"),
        (("--label-map", "openseed21"), "knows 20 classes, the label map 21"),
        (("--pictures", "-1"), "--pictures: '-1' is no whole number"),
        ((), "is damaged"),
    ):
        file.write_text(content if change else content.replace("scores", "scorn"))
        before = file.read_text()
        assert eval_script.main([*options, *change]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
        assert file.read_text() == before


@pytest.mark.parametrize("kind", ["kitti", "kitti_raw", "nuscenes"])
def test_scores_of_other_files_are_not_taken_over(kind, ring_files, tmp_path, cache, monkeypatch):
    """Files of the same names: other content, another time of change, one more, another folder."""
    monkeypatch.setenv("SELFOCC_CACHE", str(cache))
    folder, copy = tmp_path / "data", tmp_path / "copy"
    if kind == "nuscenes":
        shutil.copytree(ring_files, folder)
    else:
        world = SyntheticConfig(image_size=(32, 64), frames=6)
        scene = SyntheticSequence(world, "synthetic-train-000", 0, cache)
        {"kitti": export_kitti, "kitti_raw": export_kitti_raw}[kind]([scene], folder)
    shutil.copytree(folder, copy)
    settings = build("synthetic_surround" if kind == "nuscenes" else "synthetic", overrides())
    model = torch.nn.Module()
    model.config = replaced(settings, data=replaced(settings.data, dataset=kind))
    drive = "2011_09_26_drive_0001_sync"
    names = dict(kitti="00", kitti_raw=drive, nuscenes="scene-0003")
    label = folder / "labels"

    def identity(where=folder, frames=None, labels=None):
        data = replaced(model.config.data, train=names[kind], val=names[kind], source=(0.0, 99.0))
        data = replaced(data, label_map="semantickitti20", voxels="occ3d")
        sequences = open_sequences(data, "train", Folders(data=where, labels=labels))
        dataset = VideoDataset(sequences, data, train=False)
        rules = protocols.choose(model.config)
        found = evaluation.identity(model, dataset, dataset, ("depth",), rules, frames, 1)
        read = {file for s in sequences for f in range(s.frames) for file in s.files(f)}
        return found, [file for file in read if file.exists()]

    first, read = identity()
    everything = {path for path in folder.rglob("*") if path.is_file()}
    unread = {str(path.relative_to(folder)) for path in everything - set(read)}
    known = (
        r"times.txt|timestamps|\.(bin|occluded)$|labels/|nuScenes-Occupancy|"
        "category|attribute|instance|annotation|visibility|log|map"
    )
    assert [name for name in unread if not re.search(known, name)] == []
    assert identity()[0] == first
    assert identity(copy)[0] != first and identity(frames=1)[0] != first
    for path in sorted(read)[:: max(1, len(read) // 5)]:
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert identity()[0] != first, path
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity()[0] == first
    if label.is_dir():
        assert identity(labels=label)[0] != first


def test_journal_keeps_every_digit(tmp_path):
    record = {"a": torch.rand(2, 3, dtype=torch.float64), "b": torch.tensor([[2**60 + 1, 0]])}
    journal = Journal(tmp_path, "this", 0, resume=False)
    journal.add(7, record)
    again = Journal(tmp_path, "this", 0, resume=True).records
    assert list(again) == [7]
    for name, state in record.items():
        assert torch.equal(again[7][name], state) and again[7][name].dtype == state.dtype
    assert Journal(tmp_path, "this", 0, resume=False).records == {}


@pytest.fixture
def model(semantic, cache, monkeypatch):
    monkeypatch.setenv("SELFOCC_CACHE", str(cache))
    saved = checkpoint.load(semantic)
    model = SelfOcc(saved.config).eval()
    checkpoint.restore(saved, model)
    return model


def test_rays_in_chunks_are_the_same(model, monkeypatch):
    dataset = open_dataset(model.config, "val", Folders())
    rules = protocols.choose(model.config)
    sample = Samples(dataset, rules, ("depth",), model.config.volume)[0]
    with torch.no_grad():
        volume = model.see(sample.batch).volume
        whole = render_grid(model, volume, sample.batch.target, (32, 64), (8, 16))
        monkeypatch.setattr("selfocc.render._rays_at_once", lambda _: 13)
        parts = render_grid(model, volume, sample.batch.target, (32, 64), (8, 16))
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_network_that_diverged_is_no_silent_zero(model):
    dataset = open_dataset(model.config, "val", Folders())
    with torch.no_grad():
        model.decoder.net[3].bias[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        evaluate(model, dataset, torch.device("cpu"), ("depth",), frames=1, progress=False)


def test_the_true_volume_scores_perfectly(model, monkeypatch):
    """The whole loop with the truth instead of the network's volume, and with it mirrored.

    Twice as many nodes as voxels: every second node is the centre of one, all others are free.
    """

    def see(batch, flip):
        labels = metrics.pool_voxels(batch.voxels[0], model.config.volume.voxel)
        known = torch.where(labels == 255, 0, labels).long()
        logits = torch.nn.functional.one_hot(known, 20).movedim(-1, 0).float()
        sdf = torch.where(known > 0, -9.0, 9.0)
        coarse = torch.cat([sdf[None], torch.zeros(3, *sdf.shape), logits])[None]
        if flip:
            coarse = coarse.flip(3)
        nodes = torch.full((*coarse.shape[:2], *(2 * n + 1 for n in coarse.shape[2:])), 9.0)
        nodes[:, :, 1::2, 1::2, 1::2] = coarse
        return Seen(torch.zeros_like(nodes), nodes, None)

    dataset = open_dataset(model.config, "val", Folders())
    for flip in (False, True):
        monkeypatch.setattr(model, "see", lambda batch, flip=flip: see(batch, flip))
        tables = evaluate(
            model, dataset, torch.device("cpu"), ("occupancy",), frames=1, progress=False
        )
        scores = tables["occupancy"]["SelfOcc"]["iou"], tables["semantics"]["mIoU"]["iou"]
        assert scores == (1, 1) if not flip else max(scores) < 0.7
        seen, rays = tables[SEEN], tables["RayIoU"]
        assert (
            set(seen["SelfOcc"].values()) == {1.0}
            if not flip
            else seen["SelfOcc"]["iou_51.2"] < 0.7
        )
        assert rays["SelfOcc"]["ray"] == 1 if not flip else rays["SelfOcc"]["ray"] < 0.9
        # thin images of a coarse world: all that they show is there
        assert 0 < rays["exact depth"]["ray"] < 1 and 0.5 < seen["exact depth"]["iou_12.8"] < 1


@pytest.fixture(scope="module")
def files(semantic, cache, tmp_path_factory):
    """The scenes as KITTI files, and the labels of their images in a folder beside."""
    folder = tmp_path_factory.mktemp("kitti")
    data = checkpoint.load(semantic).config.data
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFOCC_CACHE", str(cache))
        scenes = [s for split in ("val", "train") for s in open_sequences(data, split, Folders())]
        export_kitti(scenes, folder / "data")
        for number, scene in enumerate(scenes):
            for frame in range(scene.frames):
                place = f"dataset/sequences/{number:02d}/image_2/{scene.frame_id(frame)}.png"
                (folder / "labels" / place).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(scene.semantics(frame)[0]).save(folder / "labels" / place)
    return folder


def kitti_options(files):
    options = ("--dataset", "kitti", "--data", files / "data", "--val", "00", "--train", "01")
    return (*options, "--label-map", "semantickitti20")


def test_photometric_error_only_where_sources_see_the_target(cache):
    """A frame that nobody else sees leaves the mean of all others as it is."""
    world = SyntheticConfig(image_size=(32, 64), frames=4)
    data = VideoDataset([SyntheticSequence(world, "train-0", 0, cache)], DataConfig(
        crop=(32, 64), pad=(32, 64), source=(0.01, 40)), train=False)  # fmt: skip
    data.index = [(0, 1)]
    batch = collate([data[0]]).to(torch.device("cpu"))
    assert photometric_record(batch.depth.clamp_min(1), batch)["photometric"].isfinite().all()
    behind = batch.sources.camera_to_volume.clone()
    behind[..., 1, 3] += 1000
    sources = dataclasses.replace(batch.sources, camera_to_volume=behind)
    away = dataclasses.replace(batch, sources=sources)
    assert photometric_record(batch.depth.clamp_min(1), away) == {}
    alone = dataclasses.replace(batch.sources, camera_to_volume=torch.stack(
        [batch.target.camera_to_volume] * 2, 1))  # fmt: skip
    itself = dataclasses.replace(batch, sources=alone)
    assert photometric_record(batch.depth.clamp_min(1), itself) == {}


@pytest.mark.parametrize("protocol", ["published", "corrected"])
def test_the_same_scores_through_files(protocol, semantic, files, cache, tmp_path):
    folders = tmp_path / "direct", tmp_path / "files"
    for out, options in zip(folders, ((), kitti_options(files)), strict=True):
        options = (*options, "--protocol", protocol, "--frames", 1, "--out", out, *COMMON)
        assert here(eval_script, "--ckpt", semantic, *options, cache=cache) == 0
    ours, theirs = (confusion(folder) for folder in folders)
    assert ours[1:, 1:].sum() > 400 and (ours - theirs).abs().sum() < 1e-4 * ours.sum()
    ours, theirs = (results(folder) for folder in folders)
    tables = ["occupancy", "depth, lidar", "photometric"]
    # the published one measures metres ahead in other planes here and there
    tables += ["novel depth"] if protocol == "corrected" else []
    for name in tables:
        assert ours[name].keys() == theirs[name].keys()
        for method, row in ours[name].items():
            assert theirs[name][method] == pytest.approx(row, rel=1e-3), (name, method)
    assert ours["protocol"] == theirs["protocol"] == protocol and ours["frames"] == 1


def test_training_with_label_files(semantic, files, cache, tmp_path, capsys):
    options = ("--preset", "synthetic", *kitti_options(files), "--labels", files / "labels")
    assert here(train_script, *options, "--out", tmp_path / "a", cache=cache, **SEMANTIC) == 0
    lines = [(out / "metrics.jsonl").read_text().splitlines() for out in (semantic, tmp_path / "a")]
    ours, theirs = (json.loads(line[0]) for line in lines)
    assert theirs["semantic"] == pytest.approx(ours["semantic"], rel=1e-3)
    (tmp_path / "labels").mkdir()
    for labels, said in (
        (("--labels", tmp_path / "labels"), "no such label map; write one for every image"),
        ((), "needs 2-D labels"),
    ):
        words = (*options[:-2], *labels, "--out", tmp_path / "b")
        assert here(train_script, *words, cache=cache, **SEMANTIC) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and said in last


class Ring(SyntheticSequence):
    """A scene of the embedded world with what only nuScenes has: Occ3D classes, camera mask."""

    def voxels(self, frame):
        classes = np.array(label_map(DataConfig()).occ3d, np.uint8)
        labels = super().voxels(frame)
        return np.where(labels == 255, 0, classes[labels % len(classes)])

    def voxel_mask(self, frame):
        mask = super().voxels(frame) != 255
        mask[:6] = mask[-6:] = mask[:, :6] = mask[:, -6:] = mask[..., 12:] = False
        return mask

    def voxels_to_volume(self, frame):
        return np.diag([-1.0, -1.0, 1.0, 1.0])  # a volume that looks back


def test_true_occ3d_scores_perfectly(cache):
    """With camera mask, and labels in another frame than the volume; not if it is forgotten."""
    settings = build("synthetic_surround", [
        "data.dataset=nuscenes", "field.classes=20", "data.label_map=semantickitti20",
        "data.crop=32,64", "data.pad=32,64",
    ])  # fmt: skip
    world = SyntheticConfig(rig="surround", image_size=(32, 64), frames=1)
    sequence = Ring(world, "synthetic-val-000", 1, cache)
    dataset = VideoDataset([sequence], settings.data, train=False)
    rules = protocols.choose(settings)
    sample = Samples(dataset, rules, ("occupancy",), settings.volume)[0]
    assert (sample.labels == 255).any() and sample.labels.unique().tolist()[:2] == [0, 4]
    truth = torch.from_numpy(SyntheticSequence.voxels(sequence, 0)).long()
    ids = torch.where(truth == 255, 0, truth)
    logits = torch.nn.functional.one_hot(ids, 20).movedim(-1, 0).float()
    volume = torch.cat([torch.where(ids > 0, -9.0, 9.0)[None], logits])[None]
    scores = Scores(SimpleNamespace(config=settings), rules)
    turned = volume.flip(2, 3)
    tables = scores.tables([scores.occupancy(turned, sample.labels, sample.voxels_to_volume)])
    assert tables["occupancy"]["SelfOcc"]["iou"] > 0.9999
    assert tables["semantics"]["mIoU"]["iou"] > 0.999
    tables = scores.tables([scores.occupancy(turned, sample.labels)])
    assert tables["occupancy"]["SelfOcc"]["iou"] < 0.7


def test_the_same_scores_through_nuscenes_files(cache, tmp_path, monkeypatch):
    """Occupancy, classes and depth of the ring, directly and through tables, scans and Occ3D."""
    monkeypatch.setenv("SELFOCC_CACHE", str(cache))
    settings = build("synthetic_surround", overrides(data__frames="5", volume__threshold="1"))
    field = dataclasses.replace(settings.field, classes=20)
    settings = dataclasses.replace(settings, field=field)
    torch.manual_seed(0)
    model = SelfOcc(settings)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path / checkpoint.FILE_NAME, settings, 0, model, optimizer)
    scenes = [
        s for part in ("val", "train") for s in open_sequences(settings.data, part, Folders())
    ]
    export_nuscenes(scenes, tmp_path / "data")
    folders = tmp_path / "direct", tmp_path / "files"
    files = ("--dataset", "nuscenes", "--data", tmp_path / "data", "--label-map", "semantickitti20")
    for out, options in zip(folders, ((), files), strict=True):
        options = (*options, "--protocol", "published", "--frames", 1, "--out", out, *COMMON)
        assert eval_script.main(["--ckpt", str(tmp_path), *map(str, options)]) == 0
    ours, theirs = (results(folder) for folder in folders)
    for name in ("occupancy", "depth, lidar"):
        assert ours[name].keys() == theirs[name].keys()
        for method, row in ours[name].items():
            if "iou_above" in row:  # what is ground differs a little between the classes
                row["iou_above"] = theirs[name][method]["iou_above"]
                row["threshold_above"] = theirs[name][method]["threshold_above"]
            assert theirs[name][method] == pytest.approx(row, rel=1e-3), (name, method)
    lut = torch.tensor(label_map(DataConfig(dataset="nuscenes", label_map="semantickitti20")).occ3d)
    ours, theirs = (confusion(folder) for folder in folders)
    merged = torch.zeros_like(theirs)
    merged.index_put_(
        (lut[:, None].expand(20, 20), lut[None].expand(20, 20)), ours, accumulate=True
    )
    assert theirs[1:, 1:].sum() > 100 and (merged - theirs).abs().sum() < 1e-3 * theirs.sum()
