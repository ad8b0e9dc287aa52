import inspect
import json
import re
from dataclasses import fields

import pytest

from selfocc import InputError, config, presets
from selfocc.commandline import Parser
from selfocc.settings import Section


def test_presets_survive_json():
    for name, (_, preset) in presets.PRESETS.items():
        assert preset.preset == name
        assert config.from_dict(json.loads(json.dumps(config.to_dict(preset)))) == preset


@pytest.mark.parametrize(
    "override, section, name, value",
    [
        ("optim.steps=5", "optim", "steps", 5),
        ("optim.lr=1e-5", "optim", "lr", 1e-5),
        ("volume.nodes=5,9,3", "volume", "nodes", (5, 9, 3)),
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


@pytest.mark.parametrize(
    "override, said",
    [
        (
            "loss.photometric=reprojecton",
            "expected mvs | mvs_combined | reprojection; did you mean 'reprojection'?",
        ),
        ("loss.sparsity=sof", "did you mean 'soft'?"),
        ("loss.semantic=bc", "did you mean 'bce'?"),
        ("render.alpha=neuss", "did you mean 'neus'?"),
        ("render.background=white", "expected random | black"),
        ("encoder.kind=tvp", "did you mean 'tpv'?"),
        ("backbone.norm=bacth", "did you mean 'batch'?"),
        ("backbone.depth=19", "expected 18 | 34 | 50 | 101"),
        ("optim.schedule=steps", "did you mean 'step'?"),
        ("data.neighbours=nearst", "did you mean 'nearest'?"),
        ("data.dataset=kiti", "did you mean 'kitti'?"),
        ("data.voxels=surroundocc", "expected occ3d | openoccupancy"),
        ("data.volume_frame=camera", "expected ego | lidar"),
        ("data.distance=crooked", "expected path | straight"),
        ("data.rig=ring", "expected forward | surround"),
        ("optim.steps=0", "a whole number of at least 1"),
        ("optim.batch=0", "a whole number of at least 1"),
        ("optim.accumulate=-1", "a whole number of at least 1"),
        ("optim.save_every=0", "a whole number of at least 1"),
        ("optim.picture_every=0", "a whole number of at least 1"),
        ("optim.validate_every=0", "a whole number of at least 1"),
        ("optim.validate_frames=0", "a whole number of at least 1"),
        ("optim.workers=-1", "a whole number of at least 0"),
        ("optim.lr=nan", "a number of at least 0"),
        ("optim.clip=inf", "a number above 0"),
        ("optim.seed=-1", "a whole number from 0"),
        ("optim.batch=1.5", "a whole number of at least 1"),
        ("render.rays=0,0", "each a whole number of at least 2"),
        ("render.samples=0", "a whole number of at least 1"),
        ("render.anneal_steps=0", "a whole number of at least 1"),
        ("volume.voxel=3", "expected 1 | 2 | 4 | 8"),
        ("volume.nodes=1,9,9", "each a whole number of at least 2"),
        ("volume.box=0,0,0,1,1", "expected 6 numbers"),
        ("volume.box=0,0,0,1,1,0", "must be greater"),
        ("data.scale=0", "a number above 0 and at most 4"),
        ("data.target_scale=1e4", "a number above 0 and at most 4"),
        ("data.anchor_input=1.1", "a number from 0 to 1"),
        ("data.source=10,0.4", "the first distance must not exceed the second"),
        ("data.up=0,0,0", "which is no direction"),
        ("data.camera_height=1.65", "data.camera_height is of data set posed"),
        ("data.pad=64,64", "data.crop times data.scale makes images of 96x320 pixels"),
        ("field.colors=1", "expected 0 | 3"),
        ("field.ground=nan", "expected a number or none"),
        ("encoder.points_cross=2,0,2", "tpv needs all three"),
        ("encoder.heads=5", "encoder.heads, 5, must divide encoder.dim, 32"),
        ("encoder.dropout=-0.1", "a number from 0 to 1"),
        ("encoder.kind=bev", "encoder.lift needs encoder.kind=tpv"),
        ("encoder.stride=1,5", "encoder.stride along x, 5, must divide the 96 steps"),
        ("encoder.stride=64,1", "encoder.stride along y, 64, must divide the 96 steps"),
    ],
)
def test_values_that_mean_nothing(override, said):
    with pytest.raises(InputError) as error:
        presets.build("synthetic", [override])
    name = override.partition("=")[0].partition(".")[2]
    assert said in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    "override, said",
    [
        ("render.rays=200,20", "more than the 96x320 pixels"),
        ("data.stereo_source=true", "data set synthetic has none"),
        ("field.colors=0", "loss.weight_color needs field.colors=3"),
        ("loss.sparsity_pitch=7", "more than a side of volume.box"),
    ],
)
def test_what_can_be_evaluated_and_not_trained(override, said):
    settings = presets.build("synthetic", [override])
    with pytest.raises(InputError, match=re.escape(said)):
        config.check_training(settings)


def test_all_losses_off():
    names = [f.name for f in fields(config.LossConfig) if f.name.startswith("weight_")]
    settings = presets.build("synthetic", [f"loss.{name}=0" for name in names])
    with pytest.raises(InputError, match="nothing would be learnt"):
        config.check_training(settings)


def test_overrides_are_checked_together():
    """Neither alone would be allowed: 6 heads do not divide 64, nor 4 heads 90."""
    encoder = presets.build("kitti", ["encoder.dim=64", "encoder.heads=4"]).encoder
    assert (encoder.dim, encoder.heads) == (64, 4)


def test_every_field_refuses_another_type():
    """What a checkpoint of another version, or a script, may bring."""
    for _, section in inspect.getmembers(config, inspect.isclass):
        if issubclass(section, Section) and section is not Section:
            for field in fields(section):
                with pytest.raises(InputError, match=rf"{section.section}\.{field.name} is"):
                    section(**{field.name: [object()]})


def test_the_listing_names_every_choice():
    settings = presets.build("kitti")
    lines = [line.split(maxsplit=2) for line in config.listing(settings).splitlines()]
    sections = (v for v in config.to_dict(settings).values() if isinstance(v, dict))
    assert len(lines) == sum(map(len, sections))
    assert ["loss.photometric", "mvs", "mvs | mvs_combined | reprojection"] in lines


@pytest.mark.parametrize(
    "words, said",
    [
        (["--lr", "0.1"], "it is a setting, --set optim.lr=VALUE"),
        (["--batch=3"], "it is a setting, --set optim.batch=VALUE"),
        (["--weight-edge", "1"], "it is a setting, --set loss.weight_edge=VALUE"),
        (["--nonsense"], "unrecognized arguments: --nonsense; --help lists the options"),
    ],
)
def test_options_that_are_settings(words, said):
    with pytest.raises(InputError, match=re.escape(said)):
        Parser().parse_args(words)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'synthetic'"):
        presets.build("sinthetic")


def test_saved_field_this_version_lacks():
    values = config.to_dict(presets.build("synthetic"))
    values["optim"]["momentum"] = 0.9
    with pytest.raises(InputError, match=r"optim\.momentum"):
        config.from_dict(values)
