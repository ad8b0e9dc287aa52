"""SelfOcc: self-supervised 3D occupancy from camera video (arXiv 2311.12754)."""

import kernels

if not hasattr(kernels, "render_photometric"):  # there are other packages of this name
    raise ImportError(
        f"{kernels.__file__} is not the `kernels` of SelfOcc but another package of that name; "
        "install SelfOcc in an environment without it, or run it in its own folder"
    )


def counted(number: int, noun: str) -> str:
    """ "1 frame", "2 frames"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class InputError(Exception):
    """What the user gave cannot be used; the message says what and how to mend it, in one line."""

    def line(self) -> str:
        """The message alone: torch's loader wraps that of a worker process in its traceback."""
        return " ".join(str(self).rpartition("selfocc.InputError: ")[2].split())


def load(name, device=None):
    """A trained network that makes scenes of images (scene.ScenePredictor), in evaluation mode.

    name: of weights that come with the code, or the path of a checkpoint or run folder; device:
    cpu, cuda or cuda:N, by default cuda where there is one. Whether products on a GPU are rounded
    to TF32, in this process, becomes what the checkpoint has (`optim.tf32`). Raises InputError.
    """
    from selfocc.scene import ScenePredictor  # which imports this

    return ScenePredictor.load(name, device)
