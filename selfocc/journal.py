"""Scores of single frames on disk, so that an evaluation that was broken off can go on.

A line a frame, written when it is scored: `frames.R.jsonl` of process R in the evaluation's folder,
{"frame": 12, "scores": {name: numbers}}. The first line says what was evaluated. A killed process
loses the frame it was working on.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfocc import InputError, distributed, files

Record = dict[str, Tensor]  # the counts of a frame by name, see scores.py


class Journal:
    """The scores of the frames of one evaluation, by frame.

    With `resume` the frames that an earlier run of the same evaluation left in `folder` are
    there at once; without it they are removed. `identity` says what the same evaluation is.
    InputError if the folder holds another one, or cannot be written.
    """

    def __init__(self, folder: Path, identity: str, rank: int, resume: bool):
        self.header = {"evaluation": identity}
        self.path, first = folder / f"frames.{rank}.jsonl", folder / "frames.0.jsonl"
        with distributed.chief_first():
            if rank == 0:
                left = sorted(folder.glob("frames.*.jsonl"))
                kept = {f: r for path in left if resume for f, r in self._read(path).items()}
                lines = (_line(frame, record) for frame, record in sorted(kept.items()))
                files.write_file(first, (json.dumps(self.header) + "\n" + "".join(lines)).encode())
                for path in left:
                    if path != first:
                        path.unlink()
            self.records: dict[int, Record] = self._read(first)
        if rank > 0:
            files.append(self.path, json.dumps(self.header) + "\n")

    def add(self, frame: int, record: Record) -> None:
        """Keep the scores of a frame. Raises InputError if they cannot be written."""
        line = _line(frame, record)
        files.append(self.path, line)
        self.records[frame] = _parse(line)[1]

    def _read(self, path: Path) -> dict[int, Record]:
        # what follows the last line break was being written when the process died
        header, *lines = path.read_text().rpartition("\n")[0].splitlines() or [""]
        try:
            if header and json.loads(header) != self.header:
                raise InputError(
                    f"{path} is of another evaluation (checkpoint, data or options differ); run "
                    "without --resume to start anew, or choose another --out"
                )
            return dict(map(_parse, lines))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}); run without --resume") from None


def _line(frame: int, record: Record) -> str:
    scores = {name: counts.tolist() for name, counts in record.items()}
    return json.dumps({"frame": frame, "scores": scores}) + "\n"


def _parse(line: str) -> tuple[int, Record]:
    entry = json.loads(line)
    # numpy keeps whole numbers whole, and gives every float64 back exactly
    scores = {name: torch.from_numpy(np.array(s)) for name, s in entry["scores"].items()}
    return entry["frame"], scores
