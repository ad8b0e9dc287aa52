"""SelfOcc: self-supervised 3D occupancy from camera video (arXiv 2311.12754)."""

import sys


class InputError(Exception):
    """What the user gave cannot be used; the message says what and how to mend it, in one line."""

    def report(self) -> int:
        """Print the message and return the exit code, 2."""
        # a worker process of torch's loader wraps the message in its traceback; the last line is ours
        line = str(self).strip().splitlines()[-1].removeprefix("selfocc.InputError: ")
        print(f"error: {line}", file=sys.stderr)
        return 2
