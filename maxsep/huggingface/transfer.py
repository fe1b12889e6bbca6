"""Weights on their way: from a model's files into the checkpoint of a run, and back."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from maxsep.config import Config, ConfigError, ModelConfig
from maxsep.config.matrices import sizes
from maxsep.huggingface import weights
from maxsep.huggingface.families import Family, Tensors, numbers, tensors
from maxsep.huggingface.folder import INDEX, WHOLE
from maxsep.huggingface.model import HuggingFaceModel
from maxsep.inference.load import restored
from maxsep.model.parameters import declared
from maxsep.model.transformer import Transformer
from maxsep.output import tree
from maxsep.output.checkpoint import Checkpoints, NotFinite, SaveError
from maxsep.output.durable import write_json
from maxsep.output.workdir import CHECKPOINTS
from maxsep.parallel.layout import Layout
from maxsep.parallel.mesh import make_mesh
from maxsep.parallel.sharding import fetched, on_mesh

FILE_BYTES = 2_000_000_000  # of tensors in an exported file, which is held in memory


def abstract_variables(config: Config) -> dict[str, dict]:
    """`params` and `buffers` of the config's model on its mesh, which must be set; matrices in `model.dtype`."""
    model = config.model
    return on_mesh(declared(Transformer(model, Layout.of(config), model.vocab_size, model.dtype)))


def load(model: HuggingFaceModel, config: Config, folder: Path, progress: Callable[[str], None]) -> None:
    """Saves a model's parameters as the checkpoint of step 0 in a run's folder.

    Raises:
        ConfigError: a tensor cannot be read or is not finite, or the checkpoint cannot be written.
    """
    with jax.set_mesh(make_mesh(config)):
        abstract = abstract_variables(config)["params"]
        leaves, loaded = tree.named(abstract), {}
        assert leaves.keys() == model.tensors.keys()
        for number, (path, entry) in enumerate(model.tensors.items()):
            progress(f"parameter {number + 1} of {len(leaves)}: {'.'.join(path)}")
            loaded[path] = weights.parameter(entry, config.model, leaves[path], model.read)
        params = tree.like(abstract, loaded)
        progress("saving")
        try:
            with Checkpoints(folder / CHECKPOINTS) as checkpoints:
                checkpoints.save(0, {"params": params}, {})
        except NotFinite as e:
            raise model.folder.refuse(f"*.safetensors: {e}; takes finite weights") from None
        except SaveError as e:
            raise ConfigError(f"--workdir: {e}") from e


class Written(NamedTuple):
    """One tensor of an export."""

    name: str
    entry: Tensors
    path: tuple[str, ...]  # of the parameter
    numbers: tuple[int, ...]  # of layer and expert
    bytes: int


def store(
    config: Config, family: Family, model: ModelConfig, run: Path, step: str, out: Path, progress: Callable[[str], None]
) -> tuple[int, int]:
    """Writes a run's parameters as safetensors: one file, or several and their index.

    Args:
        config: the run's; weights are written in its `model.dtype`.
        family: which the model is of.
        model: the config's, with as many ids as are to be written.
        run: the run's folder.
        step: of the checkpoint: a number, `latest` or `best`.
        out: the folder to write into.
        progress: told how far it is.

    Returns:
        The step, and the bytes of all tensors.

    Raises:
        ConfigError: the checkpoint cannot be read, or a file cannot be written.
    """
    dtype = jnp.dtype(config.model.dtype)
    with jax.set_mesh(make_mesh(config)):
        progress("reading the checkpoint")
        found = restored(abstract_variables(config), run, step)
        arrays = {path: fetched(array) for path, array in tree.named(found.state["params"]).items()}

    def tensor(written: Written) -> np.ndarray:
        return weights.tensor(written.entry, model, arrays[written.path], written.numbers, dtype)

    all_written = _in_order(family, model, dtype.itemsize)
    files = _files(all_written)
    where = {}
    for number, written in enumerate(files):
        name = WHOLE if len(files) == 1 else f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        progress(f"writing {name}")
        _save({w.name: made for w, made in zip(written, weights.each(tensor, written), strict=True)}, out / name)
        where |= dict.fromkeys((w.name for w in written), name)
    size = sum(written.bytes for written in all_written)
    if len(files) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    return found.step, size


def _in_order(family: Family, model: ModelConfig, itemsize: int) -> list[Written]:
    """All tensors, a layer's together, as they are used."""
    of = sizes(model)

    def all_of() -> Iterator[Written]:
        for path, entry in tensors(family, model).items():
            count = int(np.prod(entry.shape(of))) * itemsize
            for at in numbers(entry, of):
                yield Written(entry.named(at), entry, path, at, count)

    last = ("final_norm", "head_vd")

    def place(written: Written) -> int:
        return written.numbers[0] if written.numbers else model.layers if written.path[0] in last else -1

    return sorted(all_of(), key=place)


def _files(all_written: list[Written]) -> list[list[Written]]:
    """The tensors in files of `FILE_BYTES` at most, or of one tensor."""
    files: list[list[Written]] = [[]]
    size = 0
    for written in all_written:
        if files[-1] and size + written.bytes > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(written)
        size += written.bytes
    return files


def _save(contents: dict[str, np.ndarray], path: Path) -> None:
    """Writes one file, which is on disk when this returns.

    Raises:
        OSError: it is not.
    """
    try:
        save_file(contents, path, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(" ".join(str(e).split())) from e
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes it for its owner alone
    with path.open("rb") as file:
        os.fsync(file.fileno())
