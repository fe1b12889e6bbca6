"""The layouts and meshes of a plan."""

from dataclasses import replace

import pytest
from small import config

from maxsep.config import ConfigError, files, runs
from maxsep.config.validate import validate
from maxsep.planning import candidates


def names(found) -> list[str]:
    return [runs.name(one.layout, one.mesh) for one in found]


def test_the_studys_run_has_each_program_once_on_16_devices():
    found = candidates.every(files.load_config("configs/seed.py"), 16)
    for one in found:
        validate(one)
        assert one.mesh.devices == 16
    of = {layout: [name.partition(":")[2] for name in names(found) if name.startswith(f"{layout}:")] for layout in
          ("ma", "ma_folded", "tp", "pp", "tp_pp", "zero")}  # fmt: skip
    assert of["ma"] == ["1x16", "2x8", "4x4", "8x2", "16x1"]
    assert of["ma_folded"] == ["2x8", "4x4", "8x2", "16x1"], "1x16 is that of ma"
    assert of["tp"] == ["1x16", "2x8", "4x4", "8x2", "16x1"]
    assert of["pp"] == ["2x1x8", "4x1x4"], "the other axes of pp split the same; more stages than layers do not go"
    assert "2x8x1" in of["tp_pp"]
    assert "4x4" in of["zero"]


def test_a_row_of_ones_own_is_planned_too():
    own = "b=attention+expert e=expert"
    found = candidates.every(replace(config((2, 2)), layout=own), 4)
    assert own in {one.layout for one in found}


def test_what_no_layout_divides_is_refused():
    with pytest.raises(ConfigError, match=r"--cluster: got 7 devices; takes .*: mesh: got attention 7; takes"):
        candidates.every(config(), 7)


@pytest.mark.parametrize(
    "run, says",
    [
        ("ma:4x8", "--runs: got ma:4x8 = 32 devices; takes all 16 of --cluster"),
        ("ma:4x3", "--runs: ma:4x3: mesh: got expert 3; takes"),
        ("ma", "--runs: got 'ma'; takes layout:attention x expert"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(run, says):
    with pytest.raises(ConfigError) as refused:
        candidates.asked([run], config(), 16)
    assert says in str(refused.value)
