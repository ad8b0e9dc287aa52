"""The embedded world read back through KITTI's files scores the same."""

import json

import pytest

import eval as eval_script
from selfocc import checkpoint
from selfocc.datasets import Folders, open_sequences
from selfocc.datasets.export_kitti import export_kitti


def test_kitti_export_gives_the_same_metrics(finished, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SELFOCC_CACHE", str(cache))
    data = checkpoint.load(finished).config.data
    scenes = [s for split in ("val", "train") for s in open_sequences(data, split, Folders())]
    export_kitti(scenes, tmp_path)
    kitti = ("--dataset", "kitti", "--data", str(tmp_path), "--val", "00", "--train", "01")
    tables = {}
    for name, options in (("synthetic", ()), ("kitti", kitti)):
        out = tmp_path / name
        common = ("--ckpt", str(finished), "--out", str(out), "--prior-frames", "2")
        common += ("--protocol", "own")
        assert eval_script.main([*common, *options, "--pictures", "0"]) == 0
        tables[name] = json.loads((out / "metrics.json").read_text())
    ours, theirs = tables["synthetic"], tables["kitti"]
    assert {"SelfOcc", "constant prior, best threshold"} <= ours["occupancy"].keys()
    for task in ("occupancy", "depth, lidar", "photometric"):
        assert ours[task].keys() == theirs[task].keys()
        for method, row in ours[task].items():
            assert theirs[task][method] == pytest.approx(row, rel=1e-4), (task, method)
    assert "depth, exact" not in theirs  # files hold no dense depth
