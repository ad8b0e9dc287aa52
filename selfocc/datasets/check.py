"""Look a data folder over before a long run.

    python -m selfocc.datasets.check --dataset kitti_raw --data DIR

Counts what is there, reads files and names those that are damaged, judges poses, calibration and
what the video can teach, draws LiDAR and matches onto images, and says what each task needs that is
not there. Knows data sets only as `batch.Sequence`. Exit code 2 where something has to be mended.
"""

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from selfocc import InputError, counted, pictures, presets
from selfocc.batch import Sequence
from selfocc.commandline import Parser, add_data_options, count, folders, overrides, run
from selfocc.config import DataConfig
from selfocc.datasets import epipolar, open_sequences, usual
from selfocc.datasets.overlays import draw_ground, draw_matches, overlay, side_by_side
from selfocc.datasets.reading import check_camera
from selfocc.datasets.video import LEAST, VideoDataset
from selfocc.files import make_folder

LONGEST_STEP = 5.0  # metres between consecutive frames, or six times the median
WIDEST_TURN = 15.0  # degrees between consecutive frames, or six times the median
# Pixels off the epipolar lines, at a focal length of 720 pixels, and at most: errors of rotations
# grow with it. Chance is 4. Right poses and calibrations have 0.17 to 0.48 on five real drives, and
# 0.72 with rotations that are 0.1 degrees off; images resized to 0.75 or less have 1.1 to 3.7.
LARGEST_OFFSET, FOCAL, LARGEST_OF_ALL = 0.9, 720.0, 1.5
# Of the patches of TRIED pairs that tell conventions of poses apart, the right one explains 0.66 to
# 1 on four real drives and embedded streets, 0.88 of the best one's share or more, and wrong ones
# up to 0.49 of it; but all the same where the world is the first camera and the road straight.
TRIED, LEAST_TELLING, LEAST_FIT, CLOSE = 3, 30, 0.6, 0.75
# Pixels off its line from where on a match moves by itself or is a mistake: 0.05 to 0.10 of those
# of four real drives, with much traffic or none. What moves along its line does not show.
ASTRAY, MOST_ASTRAY = 3.0, 0.2
LEAST_PARALLAX = 0.5  # pixels at 10 m: 38 as published, 5 to 10 at a quarter of the resolution
JUMP, MOST_JUMPS = 10.0, 0.1  # percent of brightness; four real drives have 0.3 to 2, and 8 at most
MOST_STATIC = 0.5
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
        self.pair: list[tuple[Sequence, int, int]] = []  # that is drawn, if any
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
        consecutive = [(s, f, f + 1) for s, f in self.places if f + 1 < s.frames]
        self.pair = moving[len(moving) // 2 :][:1]
        # where poses are wrong, the way between frames may be
        if self._fit(_spread(moving or consecutive, min(pairs, TRIED))):
            self._check_matches(_spread(moving, pairs))
        self._check_parallax(pairs)
        self._check_video(_spread(consecutive, 2 * pairs))
        self._check_voxels()
        # scans may be rare, and finding them means reading
        scanned = _spread(moving, 8 * pairs) if self.found["lidar"] else []
        scanned = [(s, f, g) for s, f, g in scanned if self._try(s.lidar, f) is not None]
        self._check_scans(_spread(scanned, pairs))

    def _judge(self, finding: str, wrong: bool, fault: str, grave: bool = False) -> None:
        """A line for what was found: it is ok, or else what to do about it."""
        to = (self.problems if grave else self.notes) if wrong else self.facts
        to.append(f"{finding}; {fault}" if wrong else f"ok: {finding}")

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
            if self.data.fit == "corner":  # otherwise loading has looked at it, before the cut
                self._try(check_camera, f"{sequence.name}, camera {camera}", k, size)
        least, crop = np.min(sizes, axis=0), self.data.crop
        if (least < crop).any():
            self.problems.append(
                f"{where}: {least[0]}x{least[1]} pixels are fewer than the crop {crop[0]}x"
                f"{crop[1]} of the preset; choose another preset or --set data.crop=H,W"
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

    def _compare(self, compare: Callable, pairs: list) -> list[tuple]:
        """What `compare` finds of pairs of frames where it finds something, and the pairs."""
        found = [(self._try(compare, *pair), pair) for pair in pairs]
        return [(numbers, pair) for numbers, pair in found if numbers is not None]

    def _fit(self, pairs: list[tuple[Sequence, int, int]]) -> bool:
        """Whether no other axes, nor the inverse of the poses, explain the images better."""
        fits = [fits for fits, _ in self._compare(epipolar.fitting, pairs)]
        fits = torch.cat([torch.zeros(len(epipolar.CONVENTIONS), 0), *fits], 1).bool()
        telling = fits.any(0) & ~fits.all(0)
        fitting = fits[:, telling].double().mean(1).tolist()
        shares = dict(zip(epipolar.CONVENTIONS, fitting, strict=True))
        best = max(shares.values())
        if telling.sum() < LEAST_TELLING or best < LEAST_FIT:
            return True
        better = [name for name, share in shares.items() if share >= CLOSE * best]
        wrong = "as given" not in better
        self._judge(
            "of the patches that tell conventions of poses apart fit "
            + ", ".join(f"{share:.0%} {name}" for name, share in shares.items()),
            wrong,
            f"use camera_to_world {' or '.join(better)}: of cameras with x to the right, y down "
            "and z ahead",
            grave=True,
        )
        return not wrong

    def _check_matches(self, pairs: list[tuple[Sequence, int, int]]) -> None:
        """Do neighbouring frames look as poses and calibration say?"""
        found = self._compare(epipolar.offsets, pairs)
        if not found:
            self.notes.append("no frames 0.3 to 3 m apart look alike: poses are not judged")
            return
        medians = [float(offsets.median()) for offsets, _ in found]
        offset, worst = np.median(medians), int(np.argmax(medians))
        sequence, *frames = found[worst][1]
        focal = np.median(np.concatenate([s.cameras(0)[0][:, 0, 0] for s in self.sequences]))
        wrong = offset > np.clip(LARGEST_OFFSET * focal / FOCAL, LARGEST_OFFSET, LARGEST_OF_ALL)
        self._judge(
            f"matches lie {offset:.1f} pixels off their epipolar lines (median of "
            f"{counted(len(found), 'pair')} of frames; chance is 4), at most {medians[worst]:.1f} "
            f"({sequence.name}, {' and '.join(map(sequence.frame_id, frames))})",
            wrong,
            "poses, calibration and images do not belong together",
            grave=True,
        )
        if not wrong:
            astray = float((torch.cat([offsets for offsets, _ in found]) > ASTRAY).double().mean())
            finding = f"roughly {astray:.0%} of matches move by themselves or are mistaken"
            advice = "what moves is learnt wrongly; loss.automask=true leaves out a part of it"
            self._judge(finding, astray > MOST_ASTRAY, advice)

    def _check_parallax(self, count: int) -> None:
        """Do source frames look different enough from the target, as training sees them?"""
        indices = _spread(range(len(self.dataset or ())), count)
        samples = [self._try(self.dataset.__getitem__, (index, 0)) for index in indices]
        frames = [(sample.target, sample.sources) for sample in samples if sample is not None]
        if frames:
            moved = [[epipolar.parallax(*f, metres) for metres in (10, 30)] for f in frames]
            near, far = np.median(moved, axis=0)
            self._judge(
                f"parallax to source frames is {near:.1f} pixels at 10 m and {far:.1f} at 30 m",
                near < LEAST_PARALLAX,
                f"{LEAST_PARALLAX:g} pixels at 10 m teach nothing; --set data.source=A,B with a "
                "greater A, or a larger data.target_scale",
                grave=self.split == "train",
            )

    def _check_video(self, pairs: list[tuple[Sequence, int, int]]) -> None:
        """Do cameras move, and see the same as bright as before?"""
        changes = [change for change, _ in self._compare(epipolar.brightness_changes, pairs)]
        if not changes:
            return
        steps = [np.linalg.norm(np.diff(s.positions, axis=0), axis=1) for s in self.sequences]
        static = float((np.concatenate(steps) < LEAST).mean())
        finding = f"{static:.0%} of frames are less than {LEAST:g} m away from the next"
        advice = "what stands still shows no depth; choose frames that move"
        self._judge(finding, static > MOST_STATIC, advice)
        jumps = float((np.concatenate(changes) > JUMP).mean())
        self._judge(
            f"brightness changes by {np.median(np.concatenate(changes)):.1f}% to the next frame, "
            f"by more than {JUMP:g}% in {jumps:.0%} of pairs",
            jumps > MOST_JUMPS,
            "colours then say little about depth; record with a steadier exposure",
        )

    def _check_scans(self, pairs: list[tuple[Sequence, int, int]]) -> None:
        """Are the points of a scan where poses and calibration say?"""
        if found := [agreement for agreement, _ in self._compare(epipolar.scan_agreement, pairs)]:
            moved, still = np.median(found, axis=0)
            finding = f"grey value of scan points changes by {moved:.1f} when followed into the "
            finding += f"next frame, by {still:.1f} when not"
            fault = "are poses inverted, or scans and cameras calibrated wrongly?"
            self._judge(finding, moved > still, fault, grave=True)

    def _check_voxels(self) -> None:
        """Are voxels where the scans are that they were made of?"""
        if not self.overlaps:
            return
        overlaps = np.median(self.overlaps, axis=0)
        best = SHIFTS[int(overlaps.argmax())]
        fault, wrong = "they are not of the same frames, copy both again", True
        if overlaps.max() >= LEAST_OVERLAP:
            wrong, side = best != 0, "lower" if best > 0 else "higher"
            fault = f"{counted(abs(best), 'voxel')} {side} they have {overlaps.max():.2f}; "
            fault += "SemanticKITTI's from before August 2020 lie one too high, download today's"
        self._judge(
            f"voxels/*.bin and scans have an IoU of {overlaps[SHIFTS.index(0)]:.2f} (median of "
            f"{counted(len(self.overlaps), 'frame')})",
            wrong,
            fault,
            grave=True,
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
            usable = "no frame can be used"
            if self.dataset is not None:
                self.notes += [note for note in self.dataset.notes if note not in self.notes]
                have, (near, far) = counted(len(self.dataset), "frame"), self.data.source
                usable = f"{have} with neighbours {near:g} to {far:g} m away"
            labels = "2-D labels are there" if self.found["semantics"] else "lacks --labels DIR"
            return [f"training: {usable}", f"semantic training: {labels}"]
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

    @functools.cached_property
    def dataset(self) -> VideoDataset | None:
        """What training draws of; None where no frame can be used, a problem of `train` alone."""
        try:
            return VideoDataset(self.sequences, self.data, train=True)
        except InputError as error:
            self.problems += [error.line()] if self.split == "train" else []
            return None

    def verdict(self) -> str:
        if self.problems:
            return f"cannot work as it is, {counted(len(self.problems), 'problem')} to mend"
        return f"can work, {counted(len(self.notes), 'note')} to read" if self.notes else "can work"

    def picture(self) -> np.ndarray | None:
        """LiDAR, or else depth, drawn onto every camera of a frame in the middle that has it."""
        middle = len(self.places) // 2
        for place in self.places[middle:] + self.places[:middle]:
            maps = self._try(overlay, *place)
            if maps is not None:
                source = "depth" if place[0].lidar(place[1]) is None else "LiDAR"
                return side_by_side(maps, *place, source, pictures.DEPTH_TICKS)
        return None

    def drawings(self, height: float) -> dict[str, np.ndarray | None]:
        """By what their files' names end with: scans; a grid on the ground at `height`, and the way
        along it, of a frame after which there are others; matches of two frames in the middle."""
        place = self.places[len(self.places) // 4]
        maps = self._try(draw_ground, *place, height)
        ground = maps and side_by_side(maps, *place, "ground, 5 m a line, and way")
        matches = self._try(draw_matches, *self.pair[0]) if self.pair else None
        return {"": self.picture(), "_ground": ground, "_matches": matches}


def _next(sequence: Sequence, frame: int) -> int | None:
    """The first later frame 0.3 m to 3 m away; from farther off, patches look different."""
    away = sequence.path - sequence.path[frame]
    later = np.flatnonzero((away >= 0.3) & (away <= 3))
    return int(later[0]) if len(later) else None


def _overlap(voxels: np.ndarray, scan: np.ndarray, shift: int) -> float:
    """IoU [ny, nx, nz] of the one with the other moved up by `shift` voxels."""
    top = scan.shape[2] - abs(shift)
    a, b = voxels[..., max(shift, 0) :][..., :top], scan[..., max(-shift, 0) :][..., :top]
    return float((a & b).sum() / max((a | b).sum(), 1))


def _spread(items: Collection, count: int | None) -> list:
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
    config = presets.build(preset, [*more, *overrides(chosen)])
    data, height = config.data, config.volume.ground
    if data.dataset == "synthetic":  # nothing can be missing; a scene of each split shows it
        data = dataclasses.replace(data, scenes=1, scenes_val=1)
    make_folder(chosen.out)
    reports = [Report(s, open_sequences(data, s, folders(chosen)), data) for s in ("train", "val")]
    problems = []
    for report in reports:
        report.check(chosen.frames or None)
        lines, drawn = report.needs(), report.drawings(height)  # both may find problems
        print(f"\n{report.split}")
        for line in [*report.lines(), *lines]:
            print(f"  {line}")
        for ending, picture in drawn.items():
            if picture is not None:
                file = chosen.out / f"{data.dataset}_{report.split}{ending}.png"
                pictures.write_picture(file, picture)
                print(f"  picture: {file}")
        print(f"  verdict: {report.verdict()}")
        problems += report.problems
    if problems:
        raise InputError(f"{counted(len(problems), 'problem')} found, the first: {problems[0]}")


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns the exit code."""
    return run(lambda: _main(words))


if __name__ == "__main__":
    sys.exit(main())
