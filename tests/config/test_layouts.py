"""Layouts that cannot work are refused in one line that names the letter or the axis, before JAX starts."""

import pytest

from maxsep.config import cli

IMPOSSIBLE = {
    "tp, 3 of 16 heads": (
        ["tp", "mesh.attention=3"],
        "mesh: got attention 3; takes mesh.attention=2 or mesh.attention=4",
    ),
    "folded experts": (
        ["ma_folded", "mesh.attention=8"],
        "mesh.attention=4 or mesh.expert=2, as layout ma_folded splits",
    ),
    "batch of zero": (
        ["zero", "mesh.attention=8"],
        "mesh.attention=4 or mesh.expert=2, as layout zero splits train.batch",
    ),
    "idle axis": (["tp", "mesh.stage=2"], "mesh.stage: got 2; takes 1, as layout tp splits no work over it"),
    "unknown name": (["mb"], "layout: got 'mb'; takes ma, ma_folded, tp, pp, tp_pp, zero, or a row"),
    "unknown letter": (["b=expert z=attention"], "layout: got 'z=attention'; takes the letters l (layers), b (batch)"),
    "unknown axis": (["b=node"], "layout: got 'b=node'; takes after b= the axes stage, attention, expert"),
    "letter twice": (["b=expert b=attention"], "layout: got 'b twice'"),
    "axis twice": (["b=expert+expert"], "layout: got 'b=expert+expert'; takes expert once"),
    "axis twice in tokens": (["b=expert s=expert h=expert"], "layout: got 'b=expert and s=expert'"),
    "axis twice in experts": (["b=expert e=expert f=expert"], "layout: got 'e=expert and f=expert'"),
    "part of a sequence": (["b=expert s=attention"], "layout: got 's=attention'; takes axes of h"),
    "3 stages of 4 layers": (
        ["pp", "mesh.stage=3", "mesh.attention=1", "model.layers=4", "train.accumulation=4"],
        "mesh: got stage 3; takes mesh.stage=2 or mesh.stage=4, as layout pp splits model.layers (4) over it",
    ),
    "more stages than layers": (
        ["tp_pp", "mesh.stage=4", "train.accumulation=4"],
        "mesh: got stage 4; takes mesh.stage=2, as layout tp_pp splits model.layers (2) over it",
    ),
    "fewer micro-batches than stages": (
        ["tp_pp", "mesh.stage=2"],
        "train.accumulation: got 1; takes at least 2, as layout tp_pp has as many stages",
    ),
    "micro-batches too small for pp": (
        ["pp", "mesh.stage=2", "train.accumulation=2"],
        "takes mesh.attention=2 or mesh.expert=2, as layout pp splits train.batch_size / train.accumulation (8)",
    ),
    "stages of ma": (["ma", "mesh.stage=2"], "(pp, tp_pp, and your own rows with l=stage split layers)"),
    "layers and batch": (["l=stage b=stage+expert"], "layout: got 'l=stage and b=stage+expert'; takes stage in one"),
    "layers and sequence": (["l=attention s=attention h=attention"], "layout: got 'l=attention and s=attention'"),
    "layers and heads": (["l=stage b=expert h=attention+stage"], "layout: got 'l=stage and h=attention+stage'"),
    "layers and experts": (["l=expert e=expert"], "layout: got 'l=expert and e=expert'"),
    "stages that differ": (
        ["pp", "mesh.stage=2", "mesh.expert=1", "train.accumulation=2", "model.dense_layers=1", "model.dense_d_ff=32"],
        "mesh: got stage 2; takes mesh.stage=1, or model.dense_layers=0, as the stages of layout pp must be alike",
    ),
    "layers and a dense hidden size": (["l=stage m=stage"], "layout: got 'l=stage and m=stage'"),
    "layers and hidden size": (["l=stage f=stage"], "layout: got 'l=stage and f=stage'"),
    "experts without tokens": (["b=expert e=attention"], "layout: got 'e=attention'; takes axes of b and s"),
}


@pytest.mark.parametrize("request_", IMPOSSIBLE)
def test_what_is_impossible_is_refused_in_one_line(request_, capsys):
    (layout, *others), message = IMPOSSIBLE[request_]
    argv = ["train.py", f"--config.layout={layout}", *(f"--config.{field}" for field in others)]
    status = cli.run(lambda args: pytest.fail("it started"), lambda values: None, "", "configs/tiny.py", argv=argv)
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (cli.USER_ERROR, "", 1)
    assert message in err
