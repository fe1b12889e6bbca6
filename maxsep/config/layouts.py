"""Layouts: which mesh axis splits which dimension. The one table; maxsep/parallel/mesh.py turns it into shardings.

A row says, for the dimensions that shape letters name (B batch, S sequence between layers, H heads, E experts,
V vocabulary), over which axes of the device mesh they are split. What a row does not name stays whole.
"""

AXES = ("stage", "attention", "expert")

LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    # Attention: heads over `attention`, batch over `expert`. Experts over `expert`, tokens over both axes.
    "ma": {
        "b": ("expert",),
        "s": ("attention",),
        "h": ("attention",),
        "e": ("expert",),
        "v": ("attention",),
    },
}
