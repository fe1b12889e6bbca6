"""A pytree as files keep it: its leaves by the path of their names, whatever classes the program keeps them in."""

import jax


def named(tree) -> dict[tuple[str, ...], object]:
    """The leaves by their path: names of fields and keys, numbers of list entries."""

    def name(entry) -> str:
        (value,) = (getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a))
        return str(value)

    return {tuple(map(name, path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def nested(leaves: dict[tuple[str, ...], object]) -> dict:
    """Leaves by their path, as nested dicts."""
    out: dict = {}
    for path, leaf in leaves.items():
        node = out
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return out


def like(tree, leaves: dict[tuple[str, ...], object]):
    """Leaves by their path, in the structure of `tree`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[path] for path in named(tree)])
