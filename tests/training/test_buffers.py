"""What is not trained by gradients: a router's bias is used, kept, saved and read."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from completions import END_OF_TEXT
from small import config, text

from maxsep.inference.load import restored
from maxsep.inference.program import Program
from maxsep.inference.score import score
from maxsep.model.router import Router
from maxsep.output.checkpoint import Checkpoints
from maxsep.output.workdir import CHECKPOINTS
from maxsep.parallel.mesh import make_mesh
from maxsep.parallel.sharding import on_mesh
from maxsep.training.run import Run


@pytest.fixture
def biased(monkeypatch):
    """Routers add a bias to the weights of choices."""
    init, topk = Router.__init__, Router.topk

    def with_bias(self, parameters, model):
        init(self, parameters, model)
        self.bias_e = parameters.buffer("e", jnp.float32)

    def with_biased_weights(self, x_td):
        routing = topk(self, x_td)
        return routing._replace(weights_tn=routing.weights_tn + self.bias_e[...][routing.ids_tn])

    monkeypatch.setattr(Router, "__init__", with_bias)
    monkeypatch.setattr(Router, "topk", with_biased_weights)


@pytest.mark.slow  # that buffers are saved and read is held by output/test_checkpoint.py too
def test_a_buffer_is_used_kept_saved_and_read_and_not_trained(biased, tmp_path):
    c = config(model={"layers": 1, "dtype": "float64"})
    with jax.enable_x64(True), jax.set_mesh(make_mesh(c)):
        run, batch = Run(c), text(c, 1)[0]
        new, batch = run.new_state(), jax.device_put(batch, run.batch_sharding)
        (bias_le,) = jax.tree.leaves(new.buffers)
        assert bias_le.shape == (1, 16) and not bias_le.any()
        moments = jax.tree.leaves(new.optimizer[1].mu)
        assert len(moments) == len(jax.tree.leaves(new.params)), "it has none"

        bias = jax.tree.map(lambda x: x + jnp.arange(16, dtype=jnp.float32) / 16, new.buffers)
        state, step = replace(new, buffers=bias), run.compile_train_step()
        losses = [float(run.eval_step(of.variables, batch).cross_entropy) for of in (new, state)]
        assert abs(losses[0] - losses[1]) > 1e-3
        state, _ = step(jax.tree.map(jnp.copy, state), batch)
        after = float(run.eval_step(state.variables, batch).cross_entropy)
        assert jax.tree.all(jax.tree.map(np.array_equal, state.buffers, bias))
        with Checkpoints(tmp_path / CHECKPOINTS) as checkpoints:
            checkpoints.save(1, state, {})
            read = checkpoints.restore(run.abstract_state).state
        assert jax.tree.all(jax.tree.map(np.array_equal, read, state))

        program = Program(c, END_OF_TEXT)
        found = restored(on_mesh(program.abstract), tmp_path, "latest").state
        texts = np.asarray(batch).reshape(-1, batch.shape[-1]).tolist()
        scores = score(program, program.weights(found), texts, 16)
    assert -sum(map(sum, scores)) == pytest.approx(after, rel=1e-12)
