"""Products by kernels of our own. What programs, plans and profiles know them by is here: Pallas is slow to import."""

from typing import NamedTuple

ROWS, WEIGHTS = "grouped_rows", "grouped_weights"  # the kernels' names
HIGHEST = "_highest"  # after the name where float32 products are exact
DTYPES = ("bfloat16", "float32")  # that they take


class Sizes(NamedTuple):
    """Of the grouped products of a run, on one device."""

    rows: int  # places for rows
    filled: float  # the share of them that has one, at a balanced load
    groups: int
    d_model: int
    d_ff: int
