"""A run's folder, beside its checkpoint: what it was started with, and its losses and scores."""

import dataclasses
import json
import time
from dataclasses import dataclass, fields
from pathlib import Path

from selfocc import InputError, config, files
from selfocc.config import Config, Folders

FILE_NAME = "run.json"  # so that a run can go on without being told


@dataclass(frozen=True)
class Run:
    settings: Config
    folders: Folders  # absolute
    processes: int
    init: Path | None = None  # the checkpoint that it started from

    def write(self, folder: Path) -> None:
        """Raises InputError if the folder cannot be written."""
        content = json.dumps(dataclasses.asdict(self), indent=1, default=str)
        files.write_file(folder / FILE_NAME, content.encode())

    def changed(self, before: "Run") -> list[str]:
        """A line for everything that differs from an earlier part of the same run."""
        pairs = config.differences(before.settings, self.settings)
        lines = [f"{name} is now {now}, was {then}" for name, then, now in pairs]
        for f in fields(Folders):
            now, then = getattr(self.folders, f.name), getattr(before.folders, f.name)
            if now != then:
                lines.append(f"the folder of {f.name} is now {now}, was {then}")
        if self.processes != before.processes:
            lines.append(
                f"{self.processes} processes now, {before.processes} before: a step sees as many "
                "times more or fewer images"
            )
        return lines


def read(folder: Path) -> Run | None:
    """What the run in a folder was started with; None where nothing says it.

    Raises InputError for a file that is damaged.
    """
    path = folder / FILE_NAME
    try:
        values = json.loads(path.read_text())
        where = {name: Path(at) for name, at in values["folders"].items() if at is not None}
        init = values["init"] and Path(values["init"])
        settings = config.from_dict(values["settings"])
        return Run(settings, Folders(**where), values["processes"], init)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, and give all options") from None


def completed(given: Folders, before: Folders) -> Folders:
    """The folders given, absolute, and those of before where none is given.

    Labels, poses and split files belong to their data: of another data folder, none is taken over.
    """
    at = {f.name: getattr(given, f.name) for f in fields(Folders)}
    at = {name: path and path.absolute() for name, path in at.items()}
    if at["data"] in (None, before.data):
        at = {name: path or getattr(before, name) for name, path in at.items()}
    return Folders(**at)


class Log:
    """metrics.jsonl, appended; on resume the lines of steps that will be repeated are dropped."""

    def __init__(self, folder: Path, start: int):
        self.path, self.begun = folder / "metrics.jsonl", time.time()
        lines = self.path.read_text().splitlines() if start and self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        files.write_file(self.path, "".join(line + "\n" for line in kept).encode())

    def write(self, **values):
        values["seconds"] = round(time.time() - self.begun, 1)
        values = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        files.append(self.path, json.dumps(values) + "\n")
