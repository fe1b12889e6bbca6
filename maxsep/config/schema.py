"""Every setting of a run, once: its type, default, unit, and what it may be.

`Config` is the schema. `configs/*.py` are ml-collections views of it (`to_config_dict`), the command line overrides
fields of those, and `from_config_dict` brings them back here, checked. The rest of the package reads only `Config`.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import ml_collections
from ml_collections import config_dict

from maxsep.config import mixture
from maxsep.config.mixture import SOURCES, Shares

# What a field takes that has a few named values. Kept here, without JAX, so that a mistake is answered at once.
CHOICES = {
    "mesh.inner": ("auto", "attention", "expert"),
    "data.source": SOURCES,
    "model.activation": ("swiglu", "gelu"),
    "model.qk_norm": ("none", "head", "all"),
    "model.router_score": ("softmax", "sigmoid"),
    "model.balance_over": ("micro_batch", "sequence", "batch"),
    "model.remat": ("none", "full", "dots"),
    "model.attention_kernel": ("auto", "xla", "cudnn"),
    "model.dtype": ("float32", "bfloat16", "float64"),
    "model.float32_precision": ("highest", "tf32"),
}


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the field, what it got, what it takes."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; their product is the number of devices."""

    stage: int = 1  # pipeline stages (pp, tp_pp, or l=stage in your own row); a third axis for zero
    attention: int = 1  # devices per sequence: they split heads in attention, and positions between blocks
    expert: int = 1  # devices that split the experts, and the batch (expert parallelism)
    inner: str = "auto"  # mesh axis inside a node: attention, expert, auto (sends the least between nodes)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.stage, self.attention, self.expert)

    @property
    def sizes(self) -> dict[str, int]:
        return {"stage": self.stage, "attention": self.attention, "expert": self.expert}

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"stage {self.stage} x attention {self.attention} x expert {self.expert}"


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # optimizer steps in all
    batch_size: int = 16  # sequences per optimizer step (global batch size)
    accumulation: int = 1  # micro-batches per optimizer step (gradient accumulation); at least as many as stages
    seed: int = 0  # seeds initial weights, data order and expert dropout
    log_every: int = 10  # steps between rows of metrics.jsonl; 0: only at the end
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    checkpoint_every: int = 0  # steps between checkpoints; 0: only at the end
    init_from: str | None = None  # run whose latest weights to start from, with a fresh optimizer
    profile: str | None = None  # steps to record with jax.profiler, as "10:12" (first:last)
    nonfinite_limit: int = 10  # consecutive skipped steps (loss or gradients not finite) before a rollback, or a halt
    rollbacks: int = 1  # times a run returns to its latest good checkpoint and skips the data since, before it halts
    heartbeat_seconds: float = 30.0  # several processes: the job ends if one is silent for this long
    watchdog_seconds: float = 600.0  # several processes: the job ends if no step or save ends for this long
    deterministic: bool = False  # GPUs: use only kernels that repeat bit for bit (slower)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay."""

    learning_rate: float = 1e-3  # peak learning rate
    warmup_steps: int = 100  # steps of linear warm-up; 0: the first step has the peak rate
    decay_steps: int | None = None  # step at which the cosine decay ends; default: train.steps of the first start
    final_fraction: float = 0.1  # learning rate after the decay, as a fraction of the peak (min_lr_ratio)
    b1: float = 0.9  # Adam's beta1, decay of the first moment
    b2: float = 0.95  # Adam's beta2, decay of the second moment
    eps: float = 1e-8  # Adam's epsilon
    weight_decay: float = 0.1  # decoupled weight decay of matrices; norms have none
    clip_norm: float = 1.0  # clip gradients to this global norm (max_grad_norm)
    zero1: bool = False  # ZeRO-1: shard the optimizer state over mesh axes that replicate the weights


@dataclass(frozen=True)
class DataConfig:
    source: str = "docstrings"  # where text comes from: docstrings, tfds, files, or tokens (files of ids)
    path: str | None = None  # files, tokens: a glob, or a dataset's folder; tfds: data_dir or a prepared version
    name: str | None = None  # tfds: dataset below path, as c4/en or c4/en:3.1.0; files: a config_name of its README.md
    text_column: str = "text"  # files: the column of .parquet, or key of .jsonl, that has the text
    mixture: Shares | None = None  # several sources, as web:0.7:DIR1,code:0.3:DIR2; weights are shares of tokens
    split: str | None = None  # training split, as train[:90%]; default: all of train that is not held out
    eval_split: str | None = None  # held-out split; default: validation if there is one, else up to 10 % of train
    sequence_length: int = 1024  # tokens per sequence (context length)
    tokenizer: str = "gpt2"  # gpt2, gpt2:N (its first N ids), bytes, ids:N[:END] (numbers), a tokenizer.json's path
    begin_prompts: bool = False  # begin prompts and scored texts as the tokenizer.json does (add_bos_token)
    cross_document_attention: bool = True  # let tokens attend to earlier documents in their sequence
    max_tokens: int | None = None  # prepare at most this many training tokens
    eval_max_tokens: int | None = 2_000_000  # hold out at most this many tokens
    cache: str | None = None  # folder of prepared records; default: maxsep in the user's cache folder


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder: each layer has attention and a Mixture of Experts, or in the first ones a dense MLP."""

    layers: int = 4  # transformer blocks (num_hidden_layers)
    d_model: int = 256  # width of the residual stream (hidden_size)
    heads: int = 8  # query heads (num_attention_heads)
    kv_heads: int | None = None  # key/value heads (GQA, num_key_value_heads); default: as many as heads
    head_dim: int | None = None  # size of a head; default: d_model / heads
    qk_norm: str = "none"  # RMS norm of queries and keys: none, head (each head by itself), all (over all heads)
    clip_qkv: float | None = None  # clip queries, keys and values to ± this value; default: off
    dense_layers: int = 0  # first layers with a dense MLP instead of experts (first_k_dense_replace)
    dense_d_ff: int | None = None  # hidden size of the dense MLP (intermediate_size); to be set with dense_layers
    experts: int = 16  # experts per layer (num_experts, num_local_experts)
    top_k: int = 2  # experts per token (num_experts_per_tok); 1 and normalized: only auxiliary losses train routers
    router_score: str = "softmax"  # what scores experts: softmax over all, or sigmoid of each (scoring_func)
    router_bias_rate: float = 0.0  # balance by a bias that moves by so much per step (expert bias, noaux_tc); 0: none
    router_groups: int = 1  # groups of experts of which a token takes the best (n_group); 1: all are one
    router_top_groups: int = 1  # groups that a token's experts come from (topk_group)
    router_scale: float = 1.0  # factor of the weights of a token's experts (routed_scaling_factor)
    normalize_top_k: bool = True  # scale the weights of a token's experts to sum to 1 (norm_topk_prob)
    d_ff: int = 512  # hidden size of an expert (moe_intermediate_size)
    shared_experts: int = 0  # experts of that size that every token goes to (n_shared_experts)
    shared_gate: bool = False  # multiply what shared experts make by a sigmoid of the token (Qwen2-MoE)
    vocab_size: int = 50_257  # rows of the embedding that stand for an id; more rows only pad it for sharding
    mask_unused_ids: bool = True  # give ids that the tokenizer lacks no probability
    activation: str = "swiglu"  # swiglu (three matrices per expert) or gelu (two)
    capacity_factor: float | None = None  # slots per expert, relative to a balanced load; default: dropless
    capacity_group: int | None = None  # consecutive tokens that share a capacity; default: the tokens of a device
    exchange_factor: float = 1.5  # dropless: rows per all-to-all, relative to a balanced load; others take more rounds
    expert_dropout: float = 0.0  # dropout rate of experts' outputs in training
    load_balancing_coefficient: float = 0.01  # weight of the load-balancing loss (router_aux_loss_coef)
    balance_over: str = "micro_batch"  # the load-balancing loss is over each sequence, each micro_batch, or the batch
    router_z_coefficient: float = 0.001  # weight of the router's z-loss (router_z_loss_coef)
    rope_theta: float = 10_000.0  # base of the rotary position embedding
    norm_eps: float = 1e-5  # epsilon of the RMS norms (rms_norm_eps)
    tied_embedding: bool = False  # share one matrix between embedding and output head (tie_word_embeddings)
    scan_layers: bool = True  # compile one layer and loop over it (compiles faster); False: unroll (faster on CPUs)
    remat: str = "none"  # recomputed in the backward pass: none, full (every block), dots (all but products)
    attention_kernel: str = "auto"  # auto, xla, cudnn (NVIDIA GPUs, bfloat16)
    dtype: str = "float32"  # type of activations and products: float32, bfloat16 (both with float32 weights), float64
    float32_precision: str = "highest"  # float32 products: highest, tf32 (NVIDIA GPUs: faster, 10 bits of mantissa)

    @property
    def products(self) -> str:
        """What matrix products are made in: bfloat16, tf32, float32 or float64."""
        return "tf32" if self.dtype == "float32" and self.float32_precision == "tf32" else self.dtype

    @property
    def n_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 128, so that any usual axis divides it."""
        return -(-self.vocab_size // 128) * 128


@dataclass(frozen=True)
class Config:
    name: str = "base"  # run name; the default workdir is runs/NAME
    layout: str = "ma"  # what mesh axes split: ma, ma_folded, tp, pp, tp_pp, zero, your row; auto: the plan's best
    cluster: str | None = None  # what layout=auto plans for, as a100-80gb:4x4; default: this machine's accelerators
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class Field:
    """One setting of the schema, for the checks below, `--help` and the README's reference."""

    path: str  # section.name
    hint: object  # its type: int, float | None, ...
    default: object
    comment: str


@functools.cache
def fields() -> tuple[Field, ...]:
    """Every setting in order; the comment is the one beside it in this file."""
    source = inspect.getsource(sys.modules[__name__])

    def of(node, prefix: str) -> Iterator[Field]:
        hints = typing.get_type_hints(node)
        # Cut out by hand: inspect parses all of this file for the source of one class, and in Python 3.11 a parse
        # fails when the garbage collector prints a traceback in its midst (SystemError: AST constructor ...).
        own = re.search(rf"^class {node.__name__}:\n(.*?)^\S", source, re.MULTILINE | re.DOTALL)[1]
        for f in dataclasses.fields(node):
            if dataclasses.is_dataclass(hints[f.name]):
                yield from of(hints[f.name], f"{prefix}{f.name}.")
            else:
                comment = re.search(rf"^    {f.name}: .*?(?:  # (.*))?$", own, re.MULTILINE)[1]
                yield Field(prefix + f.name, hints[f.name], f.default, comment or "")

    return tuple(of(Config, ""))


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The schema as a locked ConfigDict. Fields that may be None are placeholders: they take both None and a value."""

    def convert(node):
        out = ml_collections.ConfigDict()
        hints = typing.get_type_hints(type(node))
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            if dataclasses.is_dataclass(value):
                out[f.name] = convert(value)
            elif _optional(hints[f.name]):
                # Numbers: a placeholder(float) would refuse the word None on the command line. Strings: a
                # placeholder(object) would read the path 12 as a number.
                out[f.name] = config_dict.placeholder(str if hints[f.name] == str | None else object)
                out[f.name] = value
            else:
                out[f.name] = value
        return out.lock()

    return convert(config)


def from_config_dict(values: Mapping) -> Config:
    """`values` (a ConfigDict, or nested dicts as in a run's config.json) as a `Config`; fields left out are defaults.

    Raises:
        ConfigError: a field that does not exist or has another type. Ranges are `maxsep.config.validate`'s.
    """

    def convert(node, values, prefix):
        if not isinstance(values, Mapping | ml_collections.ConfigDict):
            raise ConfigError(f"{prefix.rstrip('.') or 'config'}: got {values!r}; takes the fields of {node.__name__}")
        hints = typing.get_type_hints(node)
        for name in values:
            if name not in hints:
                raise unknown_field(f"{prefix}{name}")
        return node(
            **{
                name: convert(hints[name], value, f"{prefix}{name}.")
                if dataclasses.is_dataclass(hints[name])
                else _typed(f"{prefix}{name}", hints[name], value)
                for name, value in values.items()
            }
        )

    return convert(Config, values, "")


def unknown_field(path: str) -> ConfigError:
    """The error for a setting that does not exist, with the nearest that does."""
    paths = [f.path for f in fields()]
    inside = [p for p in paths if p.startswith(f"{path}.")]
    if inside:
        return ConfigError(f"{path}: is a section; takes its fields, as {inside[0]}")
    leaf = path.rpartition(".")[2]
    near = [p for p in paths if p.rpartition(".")[2] == leaf] or difflib.get_close_matches(path, paths, 1)
    return ConfigError(f"{path}: no such field; " + (f"did you mean {near[0]}?" if near else "--help lists them"))


def _typed(path: str, hint, value):
    """`value` as the type `hint`, where it is one: an int is a float, a bool is no number."""
    if _optional(hint):
        if value is None or value in ("None", "none"):  # a command line has only the word
            return None
        (hint,) = (t for t in typing.get_args(hint) if t is not type(None))
        also = " or None"
    else:
        also = ""
    if hint == Shares:
        try:
            return mixture.parse(value)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise mistyped(path, value, hint, also)
    return value


def mistyped(path: str, value, hint: type, also: str = "") -> ConfigError:
    """The error for a value of another type than the field's."""
    names = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string"}
    return ConfigError(f"{path}: got {value!r}; takes {names[hint]}{also}")


def _optional(hint) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
