"""`pip install .` finds all of selfocc and kernels, and only these."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.tiny import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_versions_are_taken_from_the_requirements():
    assert PROJECT["project"]["dynamic"] == ["dependencies"]
    source = PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"]
    assert source == {"file": ["requirements.txt"]}


def test_wheel(tmp_path):
    setuptools = pytest.importorskip("setuptools", reason="setuptools builds the wheel")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("setuptools is older than 77")
    for name in ("selfocc", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("selfocc-*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (about,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = wheel.read(about).decode()
    files = [path for name in ("selfocc", "kernels") for path in (ROOT / name).rglob("*.py")]
    files += [ROOT / "selfocc" / "page.html", *(ROOT / "selfocc" / "weights").iterdir()]
    assert names == {path.relative_to(ROOT).as_posix() for path in files}
    needed = re.findall(r"^Requires-Dist: (\S+?)[<>=;\s]", metadata, re.MULTILINE)
    listed = (ROOT / "requirements.txt").read_text().split("\n")
    assert needed == [re.split("[<>=;]", line)[0] for line in listed if line]


@pytest.mark.parametrize("where", ["elsewhere", "overwritten"])
def test_another_package_called_kernels_is_told(where, tmp_path):
    """Also where pip has written its files over ours."""
    shutil.copytree(ROOT / "selfocc", tmp_path / "ours" / "selfocc")
    shutil.copytree(ROOT / "kernels", tmp_path / "ours" / "kernels")
    theirs = tmp_path / ("theirs" if where == "elsewhere" else "ours") / "kernels"
    theirs.mkdir(parents=True, exist_ok=True)
    (theirs / "__init__.py").write_text("def get_kernel(): ...\n")
    path = f"{tmp_path / 'theirs'}:{tmp_path / 'ours'}"
    done = subprocess.run(
        [sys.executable, "-c", "import selfocc"],
        cwd=tmp_path,
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {theirs / '__init__.py'} is not the `kernels` of SelfOcc")
