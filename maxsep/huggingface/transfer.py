"""Weights on their way: from a model's files into the checkpoint of a run, and back."""

from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from maxsep.config import Config, ConfigError
from maxsep.huggingface.model import HuggingFaceModel
from maxsep.model.transformer import Transformer
from maxsep.output.checkpoint import Checkpoints, NotFinite, SaveError
from maxsep.output.workdir import CHECKPOINTS
from maxsep.parallel.layout import Layout
from maxsep.parallel.mesh import make_mesh
from maxsep.parallel.sharding import on_mesh

SHARD_BYTES = 4e9  # of an exported file


def abstract_params(config: Config) -> dict:
    """The parameters of the config's model on its mesh, which must be set; matrices in `model.dtype`."""

    def made() -> Transformer:
        return Transformer(nnx.Rngs(0), config.model, Layout.of(config), config.model.vocab_size, config.model.dtype)

    return on_mesh(nnx.to_pure_dict(nnx.state(nnx.eval_shape(made), nnx.Param)))


def load(model: HuggingFaceModel, config: Config, folder: Path, progress: Callable[[str], None]) -> None:
    """Saves a model's parameters as the checkpoint of step 0 in a run's folder.

    Raises:
        ConfigError: a tensor cannot be read or is not finite, or the checkpoint cannot be written.
    """
    with jax.set_mesh(make_mesh(config)):
        params = model.parameters(abstract_params(config), progress)
        progress("saving")
        try:
            with Checkpoints(folder / CHECKPOINTS) as checkpoints:
                checkpoints.save(0, {"params": params}, {})
        except NotFinite as e:
            raise model.folder.refuse(f"*.safetensors: {e}; takes finite weights") from None
        except SaveError as e:
            raise ConfigError(f"--workdir: {e}") from e
