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
    "idle axis": (["ma", "mesh.stage=2"], "mesh.stage: got 2; takes 1, as layout ma splits no work over it"),
    "unknown name": (["mb"], "layout: got 'mb'; takes ma, ma_folded, tp, zero, or a row"),
    "unknown letter": (["b=expert z=attention"], "layout: got 'z=attention'; takes the letters b (batch)"),
    "unknown axis": (["b=node"], "layout: got 'b=node'; takes after b= the axes stage, attention, expert"),
    "letter twice": (["b=expert b=attention"], "layout: got 'b twice'"),
    "axis twice": (["b=expert+expert"], "layout: got 'b=expert+expert'; takes expert once"),
    "axis twice in tokens": (["b=expert s=expert h=expert"], "layout: got 'b=expert and s=expert'"),
    "axis twice in experts": (["b=expert e=expert f=expert"], "layout: got 'e=expert and f=expert'"),
    "part of a sequence": (["b=expert s=attention"], "layout: got 's=attention'; takes axes of h"),
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
