import json
import re

import pytest

from selfocc import InputError, config, presets


def test_presets_survive_json():
    for name, (_, preset) in presets.PRESETS.items():
        assert preset.preset == name
        assert config.from_dict(json.loads(json.dumps(config.to_dict(preset)))) == preset


@pytest.mark.parametrize(
    "override, section, name, value",
    [
        ("optim.steps=5", "optim", "steps", 5),
        ("optim.lr=1e-5", "optim", "lr", 1e-5),
        ("volume.nodes=3,4,5", "volume", "nodes", (3, 4, 5)),
        ("field.ground=none", "field", "ground", None),
        ("field.ground=-1.5", "field", "ground", -1.5),
        ("render.sharpen=2,30", "render", "sharpen", (2.0, 30.0)),
        ("loss.automask=false", "loss", "automask", False),
        ("loss.photometric=reprojection", "loss", "photometric", "reprojection"),
    ],
)
def test_override(override, section, name, value):
    got = getattr(getattr(presets.build("synthetic", [override]), section), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "override, said",
    [
        ("optim.step=4", "did you mean 'steps'"),
        ("optm.steps=4", "did you mean 'optim.steps'"),
        ("optim.steps=x", "expected a whole number of at least 1"),
        ("data.crop=3", "expected 2 numbers"),
        ("loss.automask=perhaps", "expected true | false"),
        ("steps=4", "expected section.field=value"),
    ],
)
def test_wrong_override_says_what_is_right(override, said):
    with pytest.raises(InputError, match=re.escape(said)):
        presets.build("synthetic", [override])


def test_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'synthetic'"):
        presets.build("sinthetic")


def test_saved_field_this_version_lacks():
    values = config.to_dict(presets.build("synthetic"))
    values["optim"]["momentum"] = 0.9
    with pytest.raises(InputError, match=r"optim\.momentum"):
        config.from_dict(values)


def test_quirks_had_no_section_once():
    saved = config.to_dict(presets.build("kitti"))
    del saved["quirks"]
    saved["encoder"]["transposed_bev_grid"] = True
    quirks = config.from_dict(saved).quirks
    assert quirks.transposed_bev_grid and not quirks.white_256
