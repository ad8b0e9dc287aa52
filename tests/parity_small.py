"""The part of the record that every clone has, in tests/data/goldens: python -m tests.parity_small

Of the TPV network the first encoder layer with everything before it but the ResNet, and the whole
head with its losses; of the BEV network the self-attention with the transposed grid. Weights and
inputs are whole, of large outputs there is every third token.
"""

import shutil

import numpy as np
import torch

from tests import goldens
from tests.parity import Record

EVERY = 3  # tokens
IMAGES = ("curr_imgs", "prev_imgs", "next_imgs")
FILES = (
    "extra/lr_schedule.json",
    "extra/aabb.npz",
    "losses/AdaptiveSparsityLoss.npz",
    "losses/EdgeLoss3DMS.npz",
    "losses/RGBLossMS.npz",
    "losses/SSIM.npz",
    "losses/SecondGradLoss.npz",
    "losses/SemLosses.npz",
    "losses/SparsityLosses.npz",
)


def select_tpv(record: Record, state: dict) -> dict[str, np.ndarray]:
    """What `tests/test_parity.py` compares of the TPV network."""
    out, gradients = record.outputs, record.gradients
    kept = {f"state.{n}": t for n, t in state.items() if _needed(n)}
    kept |= {n: out[n] for n in out if n.startswith(("fpn.", "loss.", "representation."))}
    kept |= {f"input.{n}": t for n, t in record.inputs.items() if n.startswith(("meta.", "rays"))}
    kept |= {f"input.{n}": (256 * record.inputs[n]).byte() for n in IMAGES}
    kept |= {f"encoder.{n}": out[f"encoder.layer0.{n}"][:, ::EVERY] for n in ("self_attn", "norm2")}
    kept |= {
        n: out[n]
        for n in (
            "field_volume.density_color", "out.weights.0", "out.ms_depths.0", "out.ms_colors.0",
            "out.uniform_sdf", "rand_like.0",
        )
    }  # fmt: skip
    kept["grad.volume"] = gradients["@density_color"]
    for i in range(3):
        kept[f"grad.{i}"] = gradients[f"@representation.{i}"][:, ::EVERY]
    kept |= {
        f"grad.{n}": g for n, g in gradients.items() if n.startswith("head.model.field.density")
    }
    return {name: np.asarray(value) for name, value in kept.items()}


def _needed(name: str) -> bool:
    return name.startswith(("lifter.", "head.")) or (
        name.startswith("encoder.") and not name.startswith("encoder.layers.1.")
    )


def select_bev(record: Record, state: dict) -> dict[str, np.ndarray]:
    """Self-attention of the first layer of the BEV network."""
    attention = "encoder.layers.0.attentions.0."
    names = ("lifter.", "encoder.positional_encoding.", attention)
    kept = {f"state.{n}": t for n, t in state.items() if n.startswith(names)}
    kept["encoder.self_attn"] = record.outputs["encoder.layer0.self_attn"][:, ::EVERY]
    return {name: np.asarray(value) for name, value in kept.items()}


def main() -> None:
    for name in FILES:
        (goldens.SMALL / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(goldens.FOLDER / name, goldens.SMALL / name)
    for name, select in (("tpv_mono", select_tpv), ("bev_surround", select_bev)):
        state = torch.load(goldens.path(f"{name}/state_dict.pth"), weights_only=True)
        part = select(Record.load(name), state["state_dict"])
        np.savez_compressed(goldens.SMALL / f"{name}.npz", **part)
    size = sum(f.stat().st_size for f in goldens.SMALL.rglob("*") if f.is_file())
    print(f"{size / 1e6:.2f} MB in {goldens.SMALL}")


if __name__ == "__main__":
    main()
