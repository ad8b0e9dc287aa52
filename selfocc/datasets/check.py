"""Look a data folder over before a long run.

    python -m selfocc.datasets.check --dataset kitti_raw --data DIR

Counts what is there, reads files and names those that are damaged, judges poses and calibration,
draws LiDAR onto the images, and says what each task needs that is not there. Knows data sets only
as `batch.Sequence`. Exit code 2 where something has to be mended.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from selfocc import InputError, counted, pictures, presets
from selfocc.batch import Sequence
from selfocc.commandline import Parser, add_data_options, count, folders, overrides, run
from selfocc.config import DataConfig
from selfocc.datasets import open_sequences, usual
from selfocc.datasets.epipolar import epipolar_offset, scan_agreement
from selfocc.datasets.reading import check_camera
from selfocc.datasets.video import VideoDataset, scan_maps
from selfocc.files import make_folder

LONGEST_STEP = 5.0  # metres between consecutive frames, or six times the median
WIDEST_TURN = 15.0  # degrees between consecutive frames, or six times the median
# Pixels off the epipolar lines, at a focal length of 720 pixels, and at most: errors of rotations
# grow with it. Chance is 4. Right poses and calibrations have 0.17 to 0.48 on five real drives, and
# 0.72 with rotations that are 0.1 degrees off. Under the old calibration, images resized to a half
# have 1.1 to 3.0, to 0.75 1.4 to 3.7, to 0.9 0.8 to 1.9, one side alone to 0.8 0.9 to 3.7; without
# their upper 60 rows 1.9 to 2.9.
LARGEST_OFFSET, FOCAL, LARGEST_OF_ALL = 0.9, 720.0, 1.5
# IoU of SemanticKITTI's voxels/*.bin with the scan: 0.85 to 0.99, and below 0.25 one voxel off
LEAST_OVERLAP = 0.5
SHIFTS = range(-2, 3)  # voxels upwards that are tried
PARTS = ("images", "lidar", "depth", "semantics", "voxels")


class Report:
    """What was found in one split; `problems` have to be mended, `notes` and `facts` have not."""

    def __init__(self, split: str, sequences: list[Sequence], data: DataConfig):
        self.split, self.sequences, self.data = split, sequences, data
        self.problems = list(dict.fromkeys(line for s in sequences for line in s.damaged))
        self.notes = list(dict.fromkeys(line for s in sequences for line in s.missing))
        self.facts: list[str] = []
        self.places = [(s, f) for s in sequences for f in range(s.frames)]
        self.found: Counter[str] = Counter()
        self.read = 0
        self.overlaps: list[list[float]] = []  # of scans on disk as voxels, for each of SHIFTS

    def check(self, frames: int | None, pairs: int = 8) -> None:
        """Everything; reads `frames` frames, evenly spread (None: all), and some with voxels."""
        for sequence in self.sequences:
            self._check_poses(sequence)
        places = _spread(self.places, frames)
        # voxels and scans may be rare, and are what frames are judged by
        for judged in ([(s, f) for s in self.sequences for f in s.labelled],
                       [(s, f) for s in self.sequences for f in s.inputs or ()]):  # fmt: skip
            places += [place for place in _spread(judged, 10) if place not in places]
        for sequence, frame in tqdm(places, desc=f"reading {self.split}", unit="frame"):
            self._read(sequence, frame)
        self.read = len(places)
        moving = [(s, f, g) for s, f in self.places if (g := _next(s, f)) is not None]
        self._check_matches(_spread(moving, pairs))
        self._check_voxels()
        # scans may be rare, and finding them means reading
        scanned = _spread(moving, 8 * pairs) if self.found["lidar"] else []
        scanned = [(s, f, g) for s, f, g in scanned if self._try(s.lidar, f) is not None]
        self._check_scans(_spread(scanned, pairs))

    def _try(self, read: Callable, *arguments):
        """What `read` returns, or None, with the problem noted."""
        try:
            return read(*arguments)
        except InputError as error:
            if error.line() not in self.problems:
                self.problems.append(error.line())
            return None

    def _read(self, sequence: Sequence, frame: int) -> None:
        where = f"{sequence.name} frame {sequence.frame_id(frame)}"
        absent = () if frame in sequence.labelled else ("voxels",)
        parts = {n: self._try(getattr(sequence, n), frame) for n in PARTS if n not in absent}
        self.found.update(name for name, part in parts.items() if part is not None)
        if parts.get("voxels") is not None:
            scans = self._try(sequence.voxel_scan, frame)
            if scans is not None:
                self.overlaps.append([_overlap(*scans, shift) for shift in SHIFTS])
        if parts["images"] is None:
            return
        sizes = [image.shape[:2] for image in parts["images"]]
        for name in ("depth", "semantics"):
            maps = [] if parts[name] is None else [part.shape for part in parts[name]]
            if maps and maps != sizes:
                self.problems.append(f"{where}: {name} {maps} is no map of its images {sizes}")
        intrinsics, _ = sequence.cameras(frame)
        for camera, (k, size) in enumerate(zip(intrinsics, sizes, strict=True)):
            self._try(check_camera, f"{sequence.name}, camera {camera}", k, size)
        least = np.min(sizes, axis=0)
        if (least < self.data.crop).any():
            self.problems.append(
                f"{where}: {least[0]}x{least[1]} pixels are fewer than the crop "
                f"{self.data.crop[0]}x{self.data.crop[1]} of the preset; choose another preset or "
                "--set data.crop=H,W"
            )

    def _check_poses(self, sequence: Sequence) -> None:
        poses = np.stack([sequence.volume_to_world(f) for f in range(sequence.frames)])
        if not np.isfinite(poses).all():
            self.problems.append(f"{sequence.name}: poses are not all finite")
            return
        step = np.linalg.inv(poses[:-1]) @ poses[1:]
        metres = np.linalg.norm(step[:, :3, 3], axis=1)
        cosine = (np.trace(step[:, :3, :3], axis1=1, axis2=2) - 1) / 2
        degrees = np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))
        for values, limit, unit in ((metres, LONGEST_STEP, "m"), (degrees, WIDEST_TURN, "degrees")):
            # key frames alone are half a second apart
            limit = max(limit, 6 * float(np.median(values))) if len(values) else limit
            far = np.flatnonzero(values > limit)
            if len(far):
                self.problems.append(
                    f"{sequence.name}: {counted(len(far), 'step')} of more than {limit:g} {unit} "
                    f"between consecutive frames, the first, {values[far[0]]:.1f}, after frame "
                    f"{sequence.frame_id(int(far[0]))}; are frames missing or poses wrong?"
                )

    def _median(self, compare: Callable, pairs: list) -> tuple[np.ndarray | None, int]:
        """Of what `compare` finds of pairs of frames, and of how many pairs that is."""
        found = [self._try(compare, *pair) for pair in pairs]
        found = [numbers for numbers in found if numbers is not None]
        return np.median(found, axis=0) if found else None, len(found)

    def _check_matches(self, pairs: list[tuple[Sequence, int, int]]) -> None:
        """Do neighbouring frames look as poses and calibration say?"""
        offset, count = self._median(epipolar_offset, pairs)
        if offset is None:
            return
        self.facts.append(
            f"matches lie {offset:.1f} pixels off their epipolar lines "
            f"(median of {counted(count, 'pair')} of frames; chance is 4)"
        )
        focal = np.median(np.concatenate([s.cameras(0)[0][:, 0, 0] for s in self.sequences]))
        if offset > np.clip(LARGEST_OFFSET * focal / FOCAL, LARGEST_OFFSET, LARGEST_OF_ALL):
            self.problems.append(
                f"{self.split}: neighbouring frames match {offset:.1f} pixels off "
                "their epipolar lines; poses, calibration and images do not belong together"
            )

    def _check_scans(self, pairs: list[tuple[Sequence, int, int]]) -> None:
        """Are the points of a scan where poses and calibration say?"""
        agreement, _ = self._median(scan_agreement, pairs)
        if agreement is None:
            return
        moved, still = agreement
        self.facts.append(
            f"grey value of scan points changes by {moved:.1f} when followed into the next "
            f"frame, by {still:.1f} when not"
        )
        if moved > still:
            self.problems.append(
                f"{self.split}: scan points change their colour more when followed into the "
                f"next frame ({moved:.1f}) than when not ({still:.1f}); are poses inverted, or "
                "scans and cameras calibrated wrongly?"
            )

    def _check_voxels(self) -> None:
        """Are voxels where the scans are that they were made of?"""
        if not self.overlaps:
            return
        overlaps = np.median(self.overlaps, axis=0)
        best, here = SHIFTS[int(overlaps.argmax())], overlaps[SHIFTS.index(0)]
        self.facts.append(
            f"voxels/*.bin and scans have an IoU of {here:.2f} (median of "
            f"{counted(len(self.overlaps), 'frame')})"
        )
        if overlaps.max() < LEAST_OVERLAP:
            self.problems.append(
                f"{self.split}: voxels/*.bin and scans have an IoU of {here:.2f}; they are not "
                "of the same frames, copy both again"
            )
        elif best:
            self.problems.append(
                f"{self.split}: voxels lie {counted(abs(best), 'voxel')} "
                f"{'above' if best > 0 else 'below'} the scans: the IoU of voxels/*.bin with "
                f"them is {here:.2f}, and {overlaps.max():.2f} there; SemanticKITTI's from "
                "before August 2020 lie one too high, download today's"
            )

    def lines(self) -> list[str]:
        """The report, a line each."""
        metres = sum(float(s.path[-1]) for s in self.sequences)
        counts = ", ".join(f"{self.found[part]} with {part}" for part in PARTS)
        return [
            f"{counted(len(self.sequences), 'sequence')}, {counted(len(self.places), 'frame')}, "
            f"{metres:.0f} m; read {self.read}, of which {counts}",
            *self.facts,
            *(f"problem: {line}" for line in self.problems),
            *(f"note: {line}" for line in self.notes),
        ]

    def needs(self) -> list[str]:
        """What each task lacks here, a line each."""
        if self.split == "train":
            labels = "2-D labels are there" if self.found["semantics"] else "lacks --labels DIR"
            return [self._trainable(), f"semantic training: {labels}"]
        known = "lacks truth: LiDAR, depth or stereo"
        if self.found["lidar"] or self.found["depth"]:
            known = f"judged against {'lidar' if self.found['lidar'] else 'depth'}"
        elif self._try(self.sequences[0].stereo_pair, 0) is not None:
            known = "judged against stereo"
        ahead = any(s.path[-1] >= 0.4 for s in self.sequences)
        scored = "can be scored" if self.found["voxels"] else "lacks voxel labels"
        return [
            f"occupancy: {scored}",
            f"depth: {known}",
            f"novel depth: {known if ahead else 'lacks frames at least 0.4 m ahead'}",
            f"semantics: {scored}",
        ]

    def _trainable(self) -> str:
        try:
            dataset = VideoDataset(self.sequences, self.data, train=True)
        except InputError as error:
            self.problems.append(error.line())
            return "training: no frame can be used"
        self.notes = dataset.notes
        near, far = self.data.source
        have = f"{counted(len(dataset), 'frame')} with neighbours"
        return f"training: {have} {near:g} to {far:g} m away"

    def picture(self) -> np.ndarray | None:
        """LiDAR, or else depth, drawn onto every camera of a frame in the middle that has it."""
        middle = len(self.places) // 2
        for place in self.places[middle:] + self.places[:middle]:
            maps = self._try(overlay, *place)
            if maps is not None:
                return _side_by_side(maps, *place)
        return None


def overlay(sequence: Sequence, frame: int) -> list[np.ndarray] | None:
    """Images [N] of [h, w, 3] with LiDAR points or depth in colour, as DEPTH_TICKS; or None."""
    points, depth = sequence.lidar(frame), sequence.depth(frame)
    if points is None and depth is None:
        return None
    images = sequence.images(frame)
    if points is not None:
        sizes = [image.shape[:2] for image in images]
        depth = scan_maps(sequence, frame, points, sequence.cameras(frame)[0], sizes)
    shown = [pictures.spread(pictures.inverse_depth(z)) for z in depth]
    return [
        np.where(near[..., None] > 0, pictures.turbo(near), image)
        for near, image in zip(shown, images, strict=True)
    ]


def _side_by_side(maps: list[np.ndarray], sequence: Sequence, frame: int) -> np.ndarray:
    """What `overlay` has drawn, as one picture with names and a legend."""
    camera_to_volume = np.linalg.inv(sequence.volume_to_world(frame)) @ sequence.cameras(frame)[1]
    rows = pictures.rig_rows(camera_to_volume)
    columns = max(len(row) for row in rows)
    width = columns * (max(p.shape[1] for p in maps) + pictures.GAP) - pictures.GAP
    size, names = pictures.text_size(width), list(sequence.camera_names)
    whole = pictures.rig(maps, rows, names, width, size)
    source = "depth" if sequence.lidar(frame) is None else "LiDAR"
    text = f"{source} of {sequence.name} {sequence.frame_id(frame)}"
    return pictures.caption(whole, text, size, pictures.DEPTH_TICKS)


def _next(sequence: Sequence, frame: int) -> int | None:
    """The first later frame 0.3 m to 3 m away; from farther off, patches look different."""
    away = sequence.path - sequence.path[frame]
    later = np.flatnonzero((away >= 0.3) & (away <= 3))
    return int(later[0]) if len(later) else None


def _overlap(voxels: np.ndarray, scan: np.ndarray, shift: int) -> float:
    """IoU [ny, nx, nz] of the one with the other moved up by `shift` voxels."""
    top = scan.shape[2] - abs(shift)
    low, high = slice(0, top), slice(abs(shift), None)
    up, down = (high, low) if shift > 0 else (low, high)
    a, b = voxels[..., up], scan[..., down]
    return float((a & b).sum() / max((a | b).sum(), 1))


def _spread(items: list, count: int | None) -> list:
    if count is None or count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _main(words: list[str] | None) -> None:
    parser = Parser(prog="python -m selfocc.datasets.check", description=__doc__)
    add_data_options(parser)
    add = parser.add_argument
    said = "whose crop and distances to check; default: the data set's"
    add("--preset", metavar="NAME", help=said)
    said = "frames to read of each split, evenly spread, 0 for all; default: 100"
    add("--frames", type=count, default=100, metavar="N", help=said)
    add("--out", type=Path, default=Path("check"), metavar="DIR", help="pictures; default: check")
    chosen = parser.parse_args(words)
    preset, more = usual(chosen.preset, chosen.dataset, chosen.data)
    if preset is None:
        raise InputError("--dataset is needed, or --preset, which knows its data set")
    data = presets.build(preset, [*more, *overrides(chosen)]).data
    if data.dataset == "synthetic":  # nothing can be missing; a scene of each split shows it
        data = dataclasses.replace(data, scenes=1, scenes_val=1)
    make_folder(chosen.out)
    reports = [Report(s, open_sequences(data, s, folders(chosen)), data) for s in ("train", "val")]
    for report in reports:
        report.check(chosen.frames or None)
    problems = []
    for report in reports:
        needs, picture = report.needs(), report.picture()
        print(f"\n{report.split}")
        for line in [*report.lines(), *needs]:
            print(f"  {line}")
        if picture is not None:
            file = chosen.out / f"{data.dataset}_{report.split}.png"
            pictures.write_picture(file, picture)
            print(f"  picture: {file}")
        problems += report.problems
    if problems:
        raise InputError(f"{counted(len(problems), 'problem')} found, the first: {problems[0]}")


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns the exit code."""
    return run(lambda: _main(words))


if __name__ == "__main__":
    sys.exit(main())
