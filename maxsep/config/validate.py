"""The rules a config keeps: the range of each field, and which fields must fit each other."""

import math
import re
from operator import attrgetter
from pathlib import PurePath

from maxsep.config import layouts
from maxsep.config.schema import CHOICES, Config, ConfigError, ModelConfig, fields
from maxsep.config.segments import segments

SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # float32's; importing NumPy to ask it takes 0.1 s
WIDE = ("train.seed", "data.max_tokens", "data.eval_max_tokens")  # integers that never become int32
GPT2_IDS = 50_257
GPT2_FEWEST_IDS = 257  # a byte each, and the end of a text
MOST_DEVICES = 4096  # along an axis, where one is suggested


def validate(config: Config, training: bool = True, mesh: bool = True) -> None:
    """Checks everything about a config that needs neither a device nor a file.

    Not `training`: for inference, whose batches are made to fit the mesh. Not `mesh`: whatever layout and mesh are, as
    for training with `layout=auto`.

    Raises:
        ConfigError: the first rule that is broken, as one line.
    """
    _numbers(config)
    _run(config)
    _optimizer(config)
    _data(config)
    _model(config)
    if mesh and not (training and config.layout == layouts.AUTO):
        _mesh(config, training)


def _need(holds: bool, path: str, got, takes: str) -> None:
    if not holds:
        raise ConfigError(f"{path}: got {got!r}; takes {takes}")


def _at_least(config: Config, least: int, *paths: str) -> None:
    for path in paths:
        value = attrgetter(path)(config)
        _need(value is None or value >= least, path, value, f"an integer from {least} up")


def _between(config: Config, low: float, high: float, *paths: str) -> None:
    """Each field is in [low, high)."""
    for path in paths:
        value = attrgetter(path)(config)
        _need(low <= value < high, path, value, f"a number from {low} to below {high}")


def _positive(config: Config, *paths: str) -> None:
    for path in paths:
        value = attrgetter(path)(config)
        _need(value is None or value > 0, path, value, "a number above 0")


def _not_negative(config: Config, *paths: str) -> None:
    for path in paths:
        value = attrgetter(path)(config)
        _need(value >= 0, path, value, "a number from 0 up")


def _multiple(config: Config, path: str, of: str) -> None:
    value, size = attrgetter(path)(config), attrgetter(of)(config)
    _need(value % size == 0, path, value, f"a multiple of {of} ({size})")


def _numbers(config: Config) -> None:
    """The program holds numbers as float32 and as int32."""
    for field in fields():
        value = attrgetter(field.path)(config)
        if type(value) is int and field.path not in WIDE:
            _need(abs(value) < 2**31, field.path, value, "an integer below 2**31")
        if field.hint in (float, float | None) and value:
            holds = SMALLEST <= abs(value) <= LARGEST
            _need(holds, field.path, value, f"0, or a size from {SMALLEST:.1e} to {LARGEST:.1e} (float32)")


def _run(config: Config) -> None:
    name, train = config.name, config.train
    _need(name not in ("", "..") and PurePath(name).name == name, "name", name, "the name of a folder")
    for path, choices in CHOICES.items():
        value = attrgetter(path)(config)
        _need(value in choices, path, value, "one of " + ", ".join(choices) if len(choices) > 1 else choices[0])
    _at_least(config, 1, "train.steps", "train.batch_size", "train.accumulation", "train.nonfinite_limit")
    _positive(config, "train.heartbeat_seconds", "train.watchdog_seconds")
    _at_least(config, 0, "train.log_every", "train.eval_every", "train.checkpoint_every", "train.rollbacks")
    _need(0 <= train.seed < 2**32, "train.seed", train.seed, "an integer from 0 to 2**32 - 1")
    _multiple(config, "train.batch_size", "train.accumulation")
    if train.profile is not None:
        steps = re.fullmatch(r"(\d+):(\d+)", train.profile)
        holds = steps is not None and 1 <= int(steps[1]) <= int(steps[2])
        _need(holds, "train.profile", train.profile, "FIRST:LAST, steps from 1, as 10:12")
        takes = f"steps up to train.steps ({train.steps})"
        _need(int(steps[2]) <= train.steps, "train.profile", train.profile, takes)


def _optimizer(config: Config) -> None:
    optimizer = config.optimizer
    _positive(config, "optimizer.learning_rate", "optimizer.eps", "optimizer.clip_norm")
    _not_negative(config, "optimizer.weight_decay")
    _at_least(config, 0, "optimizer.warmup_steps")
    if optimizer.decay_steps is not None:
        holds = optimizer.decay_steps >= max(1, optimizer.warmup_steps)
        takes = f"None, or an integer from optimizer.warmup_steps ({optimizer.warmup_steps}) up"
        _need(holds, "optimizer.decay_steps", optimizer.decay_steps, takes)
    fraction = optimizer.final_fraction
    _need(0 <= fraction <= 1, "optimizer.final_fraction", fraction, "a number from 0 to 1")
    _between(config, 0, 1, "optimizer.b1", "optimizer.b2")


def _data(config: Config) -> None:
    data = config.data
    _at_least(config, 1, "data.sequence_length", "data.max_tokens", "data.eval_max_tokens")
    if data.mixture:
        for path, default in (("data.source", "docstrings"), ("data.path", None), ("data.name", None)):
            value = attrgetter(path)(config)
            _need(value == default, path, value, f"{default}, as data.mixture names the sources")
    elif data.source == "docstrings":
        for path in ("data.path", "data.name"):
            value = attrgetter(path)(config)
            _need(value is None, path, value, "None where data.source is docstrings; other text: tfds, files, tokens")
    else:
        what = {
            "tfds": "the folder of a prepared dataset",
            "files": "a glob of .parquet, .jsonl or .txt files, or a dataset's folder",
            "tokens": "a glob of .bin or .npy files, or a folder of them",
        }[data.source]
        _need(bool(data.path), "data.path", data.path, f"{what}, as data.source is {data.source}")
    ids = tokenizer_ids(data.tokenizer)
    if ids is not None:
        takes = f"at least {ids}, as data.tokenizer is {data.tokenizer}"
        _need(config.model.vocab_size >= ids, "model.vocab_size", config.model.vocab_size, takes)


def tokenizer_ids(tokenizer: str) -> int | None:
    """Number of ids of the tokenizer that `data.tokenizer` names; None for a file, which must be opened to know."""
    if tokenizer == "bytes":
        return GPT2_FEWEST_IDS
    if tokenizer == "gpt2":
        return GPT2_IDS
    if tokenizer.startswith("ids:"):
        found = re.fullmatch(r"ids:([1-9]\d*)(?::(\d+(?:,\d+)*))?", tokenizer)
        holds = found is not None and all(int(end) < int(found[1]) for end in (found[2] or "0").split(","))
        takes = "ids:N, or ids:N:E where E, below N, ends a text, or ids:N:E,F where F ends a completion too"
        _need(holds, "data.tokenizer", tokenizer, takes)
        return int(found[1])
    if not tokenizer.startswith("gpt2:"):
        takes = "gpt2, gpt2:N, bytes, ids:N, or the path of a tokenizer.json"
        _need(tokenizer.endswith(".json"), "data.tokenizer", tokenizer, takes)
        return None
    ids = tokenizer.removeprefix("gpt2:")
    holds = ids.isdecimal() and GPT2_FEWEST_IDS <= int(ids) <= GPT2_IDS
    _need(holds, "data.tokenizer", tokenizer, f"gpt2:N with N from {GPT2_FEWEST_IDS} to {GPT2_IDS}")
    return int(ids)


def _model(config: Config) -> None:
    model = config.model
    _at_least(config, 1, "model.layers", "model.d_model", "model.heads", "model.kv_heads", "model.head_dim")
    _at_least(config, 1, "model.experts", "model.top_k", "model.d_ff", "model.vocab_size", "model.capacity_group")
    _positive(config, "model.capacity_factor", "model.exchange_factor", "model.rope_theta")
    _positive(config, "model.norm_eps", "model.clip_qkv")
    _not_negative(config, "model.load_balancing_coefficient", "model.router_z_coefficient")
    _between(config, 0, 1, "model.expert_dropout")
    holds = model.heads % model.n_kv_heads == 0
    _need(holds, "model.kv_heads", model.kv_heads, f"a divisor of model.heads ({model.heads})")
    if model.head_dim is None:
        _multiple(config, "model.d_model", "model.heads")
    path = "model.d_model / model.heads" if model.head_dim is None else "model.head_dim"
    _need(model.head_size % 2 == 0, path, model.head_size, "an even number, as rotary positions turn pairs")
    _need(model.top_k <= model.experts, "model.top_k", model.top_k, f"at most model.experts ({model.experts})")
    _router(config)
    _at_least(config, 0, "model.dense_layers", "model.shared_experts")
    takes = f"an integer below model.layers ({model.layers})"
    _need(model.dense_layers < model.layers, "model.dense_layers", model.dense_layers, takes)
    if model.dense_layers:
        takes = f"an integer from 1 up, as model.dense_layers is {model.dense_layers}"
        _need((model.dense_d_ff or 0) >= 1, "model.dense_d_ff", model.dense_d_ff, takes)
    else:
        _need(model.dense_d_ff is None, "model.dense_d_ff", model.dense_d_ff, "None where model.dense_layers is 0")
    if model.attention_kernel == "cudnn":
        _need(model.dtype == "bfloat16", "model.dtype", model.dtype, "bfloat16 where model.attention_kernel is cudnn")


def _router(config: Config) -> None:
    model = config.model
    _at_least(config, 1, "model.router_groups", "model.router_top_groups")
    _not_negative(config, "model.router_bias_rate")
    _positive(config, "model.router_scale")
    holds = not model.router_bias_rate or model.top_k < model.experts
    takes = f"0 where every token goes to all experts (model.top_k is model.experts, {model.experts})"
    _need(holds, "model.router_bias_rate", model.router_bias_rate, takes)
    groups, top = model.router_groups, model.router_top_groups
    holds = model.experts % groups == 0 and (groups == 1 or model.experts // groups > 1)
    takes = f"1, or a divisor of model.experts ({model.experts}) that leaves two or more in a group"
    _need(holds, "model.router_groups", groups, takes)
    _need(top <= groups, "model.router_top_groups", top, f"at most model.router_groups ({groups})")
    size = model.experts // groups
    takes = f"groups of together model.top_k ({model.top_k}) experts or more; a group has {size}"
    _need(top * size >= model.top_k, "model.router_top_groups", top, takes)
    holds = model.shared_experts > 0 or not model.shared_gate
    _need(holds, "model.shared_gate", model.shared_gate, "False where model.shared_experts is 0")


def _mesh(config: Config, training: bool) -> None:
    """Every rule follows from the layout's row."""
    model, dimensions = config.model, _dimensions(config)
    work = dimensions.keys() - {"v"}
    if not training:
        del dimensions["b"], dimensions["s"]
    row, sizes = layouts.row(config.layout), config.mesh.sizes
    _at_least(config, 1, "mesh.stage", "mesh.attention", "mesh.expert")

    def ways(letter: str) -> int:
        return math.prod(sizes[axis] for axis in row.get(letter, ()))

    working = {axis for letter in work for axis in row.get(letter, ())}
    for axis, size in sizes.items():
        takes = f"1, as layout {config.layout} splits no work over it"
        if axis == "stage":
            takes += " (pp, tp_pp, and your own rows with l=stage split layers)"
        _need(size == 1 or axis in working, f"mesh.{axis}", size, takes)
    _divide(config.layout, row, sizes, dimensions)
    if ways("l") > 1 and len(segments(model)) > 1:
        got = " x ".join(f"{axis} {sizes[axis]}" for axis in row["l"])
        fits = ", ".join(f"mesh.{axis}=1" for axis in row["l"])
        why = f"the stages of layout {config.layout} must be alike, and the first ones would have the dense layers"
        raise ConfigError(f"mesh: got {got}; takes {fits}, or model.dense_layers=0, as {why}")
    kv_heads, parts = model.n_kv_heads, ways("h")
    takes = f"a multiple or a divisor of {parts}, the parts of model.heads on this mesh"
    _need(kv_heads % parts == 0 or parts % kv_heads == 0, "model.kv_heads", kv_heads, takes)
    if not training:
        return
    accumulation, stages = config.train.accumulation, ways("l")
    takes = f"at least {stages}, as layout {config.layout} has as many stages, each with a micro-batch to work on"
    _need(accumulation >= stages, "train.accumulation", accumulation, takes)
    own = config.data.sequence_length // ways("s")
    if model.capacity_group is not None:
        group = model.capacity_group
        holds = model.capacity_factor is not None
        _need(holds, "model.capacity_group", group, "None where model.capacity_factor is None (nothing is dropped)")
        _need(own % group == 0, "model.capacity_group", group, f"a divisor of a device's part of a sequence ({own})")
    joined = math.prod(sizes[axis] for axis in row.get("f", ()) if axis in row.get("b", ()) + row.get("s", ()))
    micro_batch_path, micro_batch = dimensions["b"]
    tokens = micro_batch // ways("b") * own * joined
    holds = tokens * model.top_k * (model.experts + 1) < 2**31
    takes = f"fewer: a device's {tokens} tokens x model.top_k x (model.experts + 1) is 2**31 or more, too many to sort"
    _need(holds, micro_batch_path, micro_batch, takes)


def _dimensions(config: Config) -> dict[str, tuple[str, int]]:
    """The field and the size of what each letter of a layout splits."""
    model, train = config.model, config.train
    return {
        "l": ("model.layers", model.layers),
        "b": ("train.batch_size / train.accumulation", train.batch_size // train.accumulation),
        "s": ("data.sequence_length", config.data.sequence_length),
        "h": ("model.heads", model.heads),
        "e": ("model.experts", model.experts),
        "f": ("model.d_ff", model.d_ff),
        **({"m": hidden} if (hidden := _dense(model)) else {}),
        "v": ("model.vocab_size, rounded up to 128s,", model.padded_vocab_size),
    }


def _dense(model: ModelConfig) -> tuple[str, int] | None:
    """The field and the size of what `m` splits: of dense layers, of shared experts, or what divides both."""
    shared = model.shared_experts * model.d_ff
    if model.dense_layers and shared:
        found = math.gcd(model.dense_d_ff, shared)
        return "the largest divisor of model.dense_d_ff and model.shared_experts x model.d_ff", found
    if model.dense_layers:
        return "model.dense_d_ff", model.dense_d_ff
    return ("model.shared_experts x model.d_ff", shared) if shared else None


def _divide(
    layout: str, row: dict[str, tuple[str, ...]], sizes: dict[str, int], dimensions: dict[str, tuple[str, int]]
) -> None:
    """Every dimension divides by the axes that split it; where one does not, the error says which sizes would do."""

    def undivided(sizes: dict[str, int]) -> list[str]:
        ways = {letter: math.prod(sizes[axis] for axis in axes) for letter, axes in row.items()}
        return [letter for letter, (_, size) in dimensions.items() if size % ways.get(letter, 1)]

    def near(axis: str, numbers: range) -> list[str]:
        return [f"mesh.{axis}={n}" for n in numbers if not undivided(sizes | {axis: n})][:1]

    for letter in undivided(sizes):
        path, size = dimensions[letter]
        axes = [axis for axis in row[letter] if sizes[axis] > 1]
        fits = []
        for axis in axes:
            most = min(size, MOST_DEVICES)
            fits += near(axis, range(min(sizes[axis] - 1, most), 0, -1)) + near(axis, range(sizes[axis] + 1, most + 1))
        takes = " or ".join(fits) or f"sizes whose product divides {size}"
        got = " x ".join(f"{axis} {sizes[axis]}" for axis in axes)
        raise ConfigError(f"mesh: got {got}; takes {takes}, as layout {layout} splits {path} ({size}) over it")
