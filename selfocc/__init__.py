"""SelfOcc: self-supervised 3D occupancy from camera video (arXiv 2311.12754)."""


def counted(number: int, noun: str) -> str:
    """ "1 frame", "2 frames"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class InputError(Exception):
    """What the user gave cannot be used; the message says what and how to mend it, in one line."""

    def line(self) -> str:
        """The message alone: torch's loader wraps that of a worker process in its traceback."""
        return " ".join(str(self).rpartition("selfocc.InputError: ")[2].split())
