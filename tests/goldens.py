"""Numbers recorded from the published implementation; tests skip where they are not at hand.

A small part of them is in tests/data/goldens, for every clone.
"""

from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "shared" / "goldens"
SMALL = Path(__file__).parent / "data" / "goldens"


def path(name: str) -> Path:
    if (SMALL / name).exists():
        return SMALL / name
    if not (FOLDER / name).exists():
        pytest.skip(f"no recorded numbers of the published implementation at {FOLDER / name}")
    return FOLDER / name


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(path(name), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
