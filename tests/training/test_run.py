"""What a config makes on a mesh."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import config

from maxsep.config import ConfigError, cli
from maxsep.kernels import Sizes, check
from maxsep.parallel.mesh import make_mesh
from maxsep.training import run as of_runs
from maxsep.training.run import Run
from maxsep.training.step import Evaluation

ON_GPU = {"dtype": "bfloat16", "head_dim": 8}  # what cuDNN's attention takes


def run(platform=None, **model):
    c = config(model=model)
    with jax.set_mesh(make_mesh(c)):
        return Run(c, platform=platform)


def test_attention_is_that_of_the_platform_compiled_for():
    for platform, kernel in ((None, "xla"), ("gpu", "cudnn"), ("tpu", "xla")):
        made = run(platform, **ON_GPU)
        assert made.program.kernel == made.described()["attention kernel"] == kernel
        assert made.described()["model"].endswith(", dropless, bfloat16")
    assert run("gpu").program.kernel == "xla"  # float32
    assert run(float32_precision="tf32").described()["model"].endswith(", float32 (tf32 precision)")
    with pytest.raises(ConfigError, match=r"^model\.attention_kernel: got cudnn, but the platform is cpu; takes xla"):
        run(attention_kernel="cudnn", **ON_GPU)


@pytest.mark.parametrize(
    ("platform", "dtype", "product", "says"),
    [
        (None, "float32", None, "blocks of rows, as many as there are"),
        ("gpu", "float32", "grouped_rows", "grouped products (Pallas)"),
        ("gpu", "float64", "ragged_dot", "lax.ragged_dot (model.dtype is float64)"),
        ("tpu", "bfloat16", "ragged_dot", "lax.ragged_dot (the platform is tpu)"),
    ],
)
def test_experts_are_those_of_the_platform_compiled_for(platform, dtype, product, says):
    with jax.enable_x64(dtype == "float64"):
        made = run(platform, dtype=dtype)
        batch = jax.ShapeDtypeStruct(made.eval_shape, jnp.int32, sharding=made.batch_sharding)
        with jax.set_mesh(made.mesh):
            traced = str(jax.make_jaxpr(made.program.eval_step)(made.abstract_state.variables, batch))
    found = {name for name in ("grouped_rows", "ragged_dot") if name in traced}
    assert found == ({product} if product else set())
    assert made.described()["experts"] == says


def test_what_has_a_capacity_needs_no_kernel():
    assert "experts" not in run("gpu", capacity_factor=1.0).described()


def test_the_platform_is_that_of_the_meshs_devices(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert run(**ON_GPU).program.layout.platform == "cpu"


@pytest.mark.parametrize(
    ("stages", "accumulation", "remat", "share"), [(1, 2, "none", 0), (2, 2, "full", 1 / 3), (2, 8, "dots", 1 / 9)]
)
def test_a_pipeline_says_how_long_its_stages_are_idle_and_what_they_keep(stages, accumulation, remat, share):
    c = config((stages, 1, 1), "pp", train={"accumulation": accumulation}, model={"remat": remat})
    with jax.set_mesh(make_mesh(c)):
        made = Run(c)
    assert made.bubble == pytest.approx(share)
    assert made.eval_shape[0] == stages, "an evaluation keeps every stage busy"
    said = made.described()
    assert (f"idle for {share:.1%}" in said.get("pipeline", "")) == (stages > 1)
    kept = f"what model.remat={remat} keeps, of all {accumulation} micro-batches at once"
    assert (kept in said.get("activations", "")) == (stages > 1 and remat != "full")


@pytest.mark.parametrize(("remat", "products"), [("none", 6), ("full", 8), ("dots", 6)])
def test_a_grouped_product_is_repeated_only_where_rematerialisation_is_full(remat, products):
    """Three forward and three backward; of the first three the last is not needed again."""
    made = run("gpu", remat=remat, dtype="bfloat16", attention_kernel="xla")
    batch = jax.ShapeDtypeStruct(made.batch_shape, jnp.int32, sharding=made.batch_sharding)
    with jax.set_mesh(made.mesh):
        step = str(jax.make_jaxpr(made.program.train_step)(made.abstract_state, batch))
    assert step.count("name=grouped_rows") == products
    assert step.count("name=grouped_weights") == 3


def test_a_wrong_kernel_ends_the_run_with_its_name(monkeypatch):
    asked = []
    monkeypatch.setattr(check, "wrong", lambda *sizes: asked.append(sizes) or "grouped_weights at group 0")
    assert run().check_kernels() is None, "the CPU has none"
    assert run("gpu", capacity_factor=1.0).check_kernels() is None
    assert not asked
    with pytest.raises(
        cli.Exit, match=r"^a kernel is wrong on .*: grouped_weights at group 0; takes another driver"
    ) as e:
        run("gpu", **ON_GPU).check_kernels()
    assert e.value.status == cli.CRASHED
    ((sizes, dtype),) = asked
    assert sizes == Sizes(rows=2 * 16 * 32, filled=1.0, groups=16, d_model=16, d_ff=32) and dtype == "bfloat16"
    monkeypatch.setattr(check, "wrong", lambda *sizes: None)
    assert run("gpu", **ON_GPU).check_kernels().startswith("grouped products are exact on cpu (")


@pytest.mark.parametrize(("platform", "most"), [("cpu", 1), ("gpu", 4)])
def test_an_evaluation_counts_exactly_with_some_batches_under_way(monkeypatch, platform, most):
    targets, batches = 2**25 + 1, 6  # no float32
    held_out = batches * targets
    one = SimpleNamespace(eval=SimpleNamespace(targets=held_out))
    corpus = SimpleNamespace(corpora={"files": one}, held_out=held_out, named=False)
    made, begun, seen = run(platform, **(ON_GPU if platform == "gpu" else {})), [], []

    def evaluated(model, batch):
        begun.append(batch)
        return Evaluation(np.float32(2 * batch), np.int32(targets))

    def fetched(cost):
        seen.append(len(begun) - len(seen))
        return cost

    monkeypatch.setattr(made, "eval_step", evaluated)
    monkeypatch.setattr(jax, "device_get", fetched)
    monkeypatch.setattr(of_runs, "eval_batches", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(of_runs, "to_mesh", lambda *_: iter(range(batches)))
    scores = made.evaluate(None, corpus)
    assert scores["loss"] == 2 * sum(range(batches)) / (batches * targets)
    assert max(seen) == most and begun == list(range(batches))
