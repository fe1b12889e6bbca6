"""The check of grouped products passes right ones, and names the kernel that is wrong, wherever it is."""

import jax
import jax.numpy as jnp
import pytest
from small import config

from maxsep.kernels import ROWS, Sizes, check, grouped
from maxsep.parallel.mesh import make_mesh

SIZES = Sizes(rows=200, filled=0.75, groups=3, d_model=16, d_ff=32)


@pytest.mark.parametrize(
    ("d_ff", "dtype"),
    [
        (16, "float32"),
        pytest.param(32, "float32", marks=pytest.mark.slow),
        pytest.param(32, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_right_kernels_pass(d_ff, dtype):
    """Under whatever mesh the run has set."""
    with jax.set_mesh(make_mesh(config((4, 4)))):
        assert check.wrong(SIZES._replace(d_ff=d_ff), dtype, interpret=True) is None


class Less:
    """A reference whose values are one less."""

    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, i):
        return self.ref[i] - 1


rows_kernel, weights_kernel = grouped._rows_kernel, grouped._weights_kernel


@pytest.mark.parametrize(
    "name, broken, says",
    [
        (
            "_rows_kernel",
            lambda g, s, e, x, w, y, **o: rows_kernel(g, s, Less(e), x, w, y, **o),
            "grouped_rows at row ",
        ),
        (
            "_weights_kernel",
            lambda s, e, x, g, dw, **o: weights_kernel(s, Less(e), x, g, dw, **o),
            "grouped_weights at",
        ),
    ],
    ids=["rows", "weights"],
)
def test_a_kernel_that_leaves_out_a_groups_last_row_is_named(monkeypatch, name, broken, says):
    monkeypatch.setattr(grouped, name, broken)
    found = check.wrong(SIZES, "float32", interpret=True)
    assert found.startswith(says), found


def test_padding_that_is_not_zero_is_found(monkeypatch):
    call = grouped._call

    def unwritten(kernel, name, *more):
        y = call(kernel, name, *more)
        return y.at[-1].set(jnp.nan) if name.startswith(ROWS) else y

    monkeypatch.setattr(grouped, "_call", unwritten)
    found = check.wrong(SIZES, "float32", interpret=True)
    assert found.startswith("grouped_rows at row 199, column "), found
