"""Layouts: which axis of the device mesh splits which dimension. The one table; all else follows from its rows.

A row gives each dimension, by its letter, the axes that split it: `b=expert s=attention`. Of several axes, as in
`e=attention+expert`, the first is the outermost. A dimension that a row does not name stays whole. docs/layouts.md says
what each row is good for.
"""

from maxsep.config.schema import ConfigError

AXES = ("stage", "attention", "expert")
AUTO = "auto"  # no row: the plan's best for config.cluster, which training settles first (planning/auto.py)

LETTERS = {
    "l": "layers",  # a pipeline: micro-batches go from part to part
    "b": "batch",
    "s": "sequence, between layers",
    "h": "heads",
    "e": "experts",
    "f": "hidden size of an expert",
    "m": "hidden size of dense layers and of shared experts",
    "v": "vocabulary",
    "w": "weights at rest",  # no dimension: matrices are stored in further parts over these axes, gathered where used
}

LAYOUTS = {
    # Heads and dense MLPs over `attention`, experts over `expert`, tokens over both.
    "ma": "b=expert s=attention h=attention e=expert m=attention v=attention",
    # Attention as in `ma`, and the experts over the whole mesh: no expert is held twice.
    "ma_folded": "b=expert s=attention h=attention e=attention+expert m=attention v=attention",
    # Every matrix over `attention`, as Megatron-LM; `expert` splits the batch alone.
    "tp": "b=expert s=attention h=attention f=attention m=attention v=attention",
    # Layers over `stage`, a pipeline; the other axes split the batch alone.
    "pp": "l=stage b=attention+expert v=stage",
    # The same, and inside a stage every matrix over `attention`.
    "tp_pp": "l=stage b=expert s=attention h=attention f=attention m=attention v=stage+attention",
    # The batch over everything; weights are gathered a layer at a time (ZeRO-3, FSDP), experts stay over `expert`.
    "zero": "b=stage+attention+expert e=expert v=attention w=stage+attention+expert",
}

# Letters that meet in one tensor cannot share an axis.
TOGETHER = {
    "bs": "tokens are split by both",
    "bh": "queries are split by both",
    "ef": "an expert's weights are split by both",
    "lb": "all tokens go through all layers",
    "ls": "all tokens go through all layers",
    "lh": "a layer's weights are split by both",
    "le": "a layer's weights are split by both",
    "lf": "a layer's weights are split by both",
    "lm": "a layer's weights are split by both",
}


def row(layout: str) -> dict[str, tuple[str, ...]]:
    """The axes of each letter, of the table's row `layout` or of one written out.

    Raises:
        ConfigError: there is no such row, or it cannot work on any mesh.
    """
    axes = _parsed(LAYOUTS.get(layout, layout))
    for (one, other), why in TOGETHER.items():
        if shared := set(axes.get(one, ())) & set(axes.get(other, ())):
            raise _error(f"{_part(axes, one)} and {_part(axes, other)}", f"{min(shared)} in one of them: {why}")
    if set(axes.get("s", ())) - set(axes.get("h", ())):
        raise _error(_part(axes, "s"), "axes of h alone, as attention needs whole sequences")
    if set(axes.get("e", ())) - set(axes.get("b", ()) + axes.get("s", ())):
        raise _error(_part(axes, "e"), "axes of b and s alone: along others all devices have the same tokens")
    return axes


def _parsed(text: str) -> dict[str, tuple[str, ...]]:
    axes: dict[str, tuple[str, ...]] = {}
    if "=" not in text:
        raise _error(text, f"{', '.join(LAYOUTS)}, or a row of your own, as '{LAYOUTS['ma']}'")
    for part in text.split():
        letter, _, names = part.partition("=")
        if letter not in LETTERS:
            raise _error(part, "the letters " + ", ".join(f"{letter} ({what})" for letter, what in LETTERS.items()))
        if letter in axes:
            raise _error(f"{letter} twice", "each letter once")
        axes[letter] = tuple(names.split("+"))
        for axis in axes[letter]:
            if axis not in AXES:
                raise _error(part, f"after {letter}= the axes {', '.join(AXES)}, joined by +")
            if axes[letter].count(axis) > 1:
                raise _error(part, f"{axis} once")
    return axes


def _part(axes: dict[str, tuple[str, ...]], letter: str) -> str:
    return f"{letter}={'+'.join(axes.get(letter, ()))}"


def _error(got: str, takes: str) -> ConfigError:
    return ConfigError(f"layout: got {got!r}; takes {takes}")
