"""What a config makes on the current mesh: compiled steps, states, batches, and the figures of a step."""

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from maxsep.cluster.job import ALONE, Job
from maxsep.config import Config, cli, segments
from maxsep.config.matrices import parameters
from maxsep.config.stored import read_config
from maxsep.data.feed import host_rows, to_mesh
from maxsep.data.loader import eval_batches, train_batches
from maxsep.data.mixture import Mixture
from maxsep.data.records import Records
from maxsep.measure import flops, memory
from maxsep.model import experts
from maxsep.model.parameters import jitted_init
from maxsep.output import metrics
from maxsep.output.checkpoint import Checkpoints
from maxsep.output.workdir import init_checkpoints
from maxsep.parallel import pipeline
from maxsep.parallel.mesh import describe, neighbours
from maxsep.parallel.sharding import on_mesh
from maxsep.parallel.start import of_gpus
from maxsep.training.step import Evaluation, Program, TrainState

UNDER_WAY = 4  # batches of an evaluation on accelerators, so that they never wait for the next


class Run:
    """A config's program on the mesh that `jax.set_mesh` has set.

    Args:
        config: a checked config.
        end_of_text: the tokenizer's id of it, for attention that stays within documents.
        ids: number of ids of the tokenizer; the others have no probability. None: all of `model.vocab_size`.
        platform: of the devices to compile for: cpu, gpu, tpu. None: that of the mesh's devices.
    """

    def __init__(
        self,
        config: Config,
        end_of_text: int | None = None,
        ids: int | None = None,
        platform: str | None = None,
    ):
        train, length = config.train, config.data.sequence_length
        self.config, self.mesh = config, jax.sharding.get_mesh()
        self.program = Program(config, end_of_text, ids, platform or self.mesh.devices.flat[0].platform)
        self.abstract_state = on_mesh(jax.eval_shape(self.program.init))
        micro_batch = train.batch_size // train.accumulation
        self.batch_shape = (train.accumulation, micro_batch, length + 1)
        self.stages = self.program.layout.ways("l")
        self.eval_shape = (self.stages, micro_batch, length + 1)
        self.batch_sharding = NamedSharding(self.mesh, self.program.batch_spec)
        self.tokens = train.batch_size * length  # a step
        self.flops = self.tokens * flops.flops_per_token(config.model, length)  # a step
        self.bubble = pipeline.bubble(self.stages, train.accumulation)
        self.init = jitted_init(self.program.init, self.program.layout.platform)
        self.eval_step = jax.jit(self.program.eval_step)

    @property
    def filled(self) -> float:
        """Share of a grouped product's rows that there are at a balanced load."""
        return self.program.grouped().filled

    @property
    def state_bytes(self) -> int:
        """Of a checkpoint, before it is compressed."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract_state))

    def check_kernels(self, job: Job = ALONE) -> str | None:
        """Checks the kernels of our own that the step uses on the devices here; what was checked, None: there is none.

        Raises:
            cli.Exit: one is wrong in some process of the job.
        """
        model, platform = self.config.model, self.program.layout.platform
        if model.capacity_factor is not None or experts.kernel(model, platform) != experts.GROUPED:
            return None
        from maxsep.kernels import check  # here, as Pallas is slow to import

        started = time.monotonic()
        device = jax.local_devices()[0].device_kind
        wrong = check.wrong(self.program.grouped(), model.dtype)
        for member, found in zip(job.members, job.agree(wrong and f"{device}: {wrong}"), strict=True):
            if found:
                takes = "another driver or JAX, or model.capacity_factor, which needs no such kernel"
                raise cli.Exit(cli.CRASHED, f"a kernel is wrong on {member}, {found}; takes {takes}")
        return f"grouped products are exact on {device} ({time.monotonic() - started:.1f} s)"

    def lower_train_step(self):
        """The train step, which takes and donates a state, and takes a batch; before it is compiled."""
        batch = jax.ShapeDtypeStruct(self.batch_shape, jnp.int32, sharding=self.batch_sharding)
        return jax.jit(self.program.train_step, donate_argnums=0).lower(self.abstract_state, batch)

    def compile_train_step(self):
        """The compiled train step.

        Raises:
            ConfigError: an accelerator has less memory than it needs.
        """
        takes = f"what {memory.plan_command()} shows to fit, a larger train.accumulation, or model.remat=full"
        return memory.fitting(self.lower_train_step(), "the train step", takes)

    def new_state(self, job: Job = ALONE) -> TrainState:
        """Step 0, with weights drawn from the seed or those that `train.init_from` names."""
        source = init_checkpoints(self.config)
        if source is None:
            return self.init()
        with Checkpoints(source, read_only=True, job=job) as checkpoints:
            wanted = self.abstract_state.variables
            if not read_config(source.parent)[0].model.router_bias_rate:
                wanted["buffers"] = {}  # a run that begins to balance by a bias
            found = checkpoints.restore_model(wanted, cast=True)
            return jax.jit(self.program.fresh)(**found.state)

    def train_batches(self, corpus: Mixture, position: int):
        """This host's part of the batches from `position` on; `to_mesh` makes them global."""
        train, rows = self.config.train, host_rows(self.batch_shape, self.batch_sharding)
        return train_batches(corpus, train.batch_size, train.seed, position, rows)

    def evaluate(
        self,
        variables: dict[str, dict],
        corpus: Mixture,
        stop: Callable[[], bool] = lambda: False,
        waiting: Callable[[], AbstractContextManager] = nullcontext,
    ) -> dict | None:
        """Held-out loss, nats per token, every token counted once; its perplexity; the seconds it took.

        Of a mixture also `losses`, of each source. None where `stop`, asked after each batch, says to give up. While
        devices are waited for, `waiting` is entered.
        """
        start, found = time.monotonic(), {}
        for name, one in corpus.corpora.items():
            found[name] = self._cross_entropy(variables, one.eval, stop, waiting)
            if found[name] is None:
                return None
        loss = sum(found.values()) / corpus.held_out
        losses = {name: total / corpus.corpora[name].eval.targets for name, total in found.items()}
        scores = {"loss": loss, "perplexity": metrics.perplexity(loss), "seconds": time.monotonic() - start}
        return scores | ({"losses": losses} if corpus.named else {})

    def _cross_entropy(
        self,
        variables: dict[str, dict],
        records: Records,
        stop: Callable[[], bool],
        waiting: Callable[[], AbstractContextManager],
    ) -> float | None:
        """The sum over all targets of the records, in nats; None if `stop` returned true."""
        rows = host_rows(self.eval_shape, self.batch_sharding)
        cross_entropy, targets = 0.0, 0
        under_way: deque[Evaluation] = deque()

        def fetch() -> None:
            nonlocal cross_entropy, targets
            with waiting():
                one = jax.device_get(under_way.popleft())
            cross_entropy, targets = cross_entropy + float(one.cross_entropy), targets + int(one.targets)

        # Unlike train steps these do not wait for each other: with many at a time simulated devices hang.
        most = 1 if self.program.layout.platform == "cpu" else UNDER_WAY
        with closing(eval_batches(records, math.prod(self.eval_shape[:2]), rows)) as batches:
            for batch in to_mesh(batches, self.eval_shape, self.batch_sharding):
                under_way.append(self.eval_step(variables, batch))
                if len(under_way) == most:
                    fetch()
                if stop():
                    return None
        while under_way:
            fetch()
        assert targets == records.targets, "a held-out token was counted twice or not at all"
        return cross_entropy

    def figures(self, device_metrics: dict, seconds: float, peak: float | None, shares: bool = False) -> dict:
        """A row of `metrics.jsonl` from what the train step returned and the seconds it took.

        With `shares` also each expert's of the choices.
        """
        values = jax.device_get(device_metrics)
        load_le, dropped_l, skipped = (values.pop(name) for name in ("load_le", "dropped_l", "skipped"))
        load = metrics.expert_load(load_le)
        choices_l = np.maximum(load_le.sum(axis=1), 1)
        load["layers"]["dropped_fraction"] = (dropped_l / choices_l).tolist()
        if (norm_l := values.pop("router_bias_norm_l", None)) is not None:
            load["layers"]["router_bias_norm"] = norm_l.tolist()
        speed = self.tokens / seconds
        return {
            **{name: float(value) for name, value in values.items()},
            "perplexity": metrics.perplexity(float(values["loss"])),
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / self.mesh.size,
            "mfu": flops.mfu(speed, self.flops / self.tokens, peak),
            "dropped_fraction": float(dropped_l.sum() / choices_l.sum()),
            "skipped_steps": int(skipped[0]),
            **load,
            **({"expert_shares": metrics.expert_shares(load_le)} if shares else {}),
            **metrics.device_memory(),
        }

    def described(self) -> dict[str, str]:
        """What runs, for the console."""
        config, model, devices = self.config, self.config.model, self.mesh.devices.ravel()
        micro = f" in {config.train.accumulation} micro-batches" if config.train.accumulation > 1 else ""
        state = memory.of_state(self.abstract_state)
        capacity = "dropless" if model.capacity_factor is None else f"capacity {model.capacity_factor}"
        precision = f" ({model.float32_precision} precision)" if model.dtype == "float32" else ""
        return {
            "layout": f"{config.layout}: {config.mesh}",
            "devices": describe(devices) + neighbours(config, devices),
            "model": f"{segments.described(model)}, top {model.top_k}, {capacity}, {model.dtype}{precision}",
            "parameters": f"{parameters(model):,}",
            "state per device": ", ".join(f"{kind} {_size(count)}" for kind, count in state.items()),
            **({"XLA on GPUs": of_gpus()} if devices[0].platform == "gpu" else {}),
            "attention kernel": self.program.kernel,
            **({} if model.capacity_factor else {"experts": experts.described(model, self.program.layout.platform)}),
            "batch": f"{config.train.batch_size} sequences of {config.data.sequence_length} tokens{micro}",
            **({"balance": "over the batch: a forward pass more per step"} if self.program.looks_ahead else {}),
            **self._pipeline(),
        }

    def _pipeline(self) -> dict[str, str]:
        if self.stages == 1:
            return {}
        bubble = f"{self.bubble:.1%} of the layers' time (the larger train.accumulation, the less)"
        lines = {"pipeline": f"{self.stages} stages, each idle for {bubble}"}
        if (remat := self.config.model.remat) != "full":
            kept = f"what model.remat={remat} keeps, of all {self.config.train.accumulation} micro-batches at once"
            lines["activations"] = f"{kept} (model.remat=full: only the inputs of blocks)"
        return lines


def _size(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
