"""config.json, read into a `ModelConfig` and written from one. What would make another model is refused by name."""

import sys
from typing import Any

from maxsep.config import ConfigError, ModelConfig
from maxsep.huggingface.families import FAMILIES, Family

# Sizes that a file has to have.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok")
CONTEXT = "max_position_embeddings"
EXPERTS = ("num_local_experts", "num_experts")  # either, in any family

# Fields of all families, with the values that leave the model as it is here.
NEUTRAL = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0,),
}

# What no class reads, or not for the scores of a token: how it is trained there, generated from, saved, labelled.
HARMLESS = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
    *("use_cache", "initializer_range", "output_router_logits", "router_aux_loss_coef", "max_window_layers"),
    *("output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate", "torchscript"),
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "prefix", "pretraining_tp"),
    *("chunk_size_feed_forward", "is_decoder", "is_encoder_decoder", "unsloth_version", "unsloth_fixed"),
}


def read(fields: dict[str, Any]) -> tuple[Family, ModelConfig, int]:
    """The family, the model, and the longest context in tokens, of the content of a config.json.

    Raises:
        ConfigError: it is of another architecture, or has a field that would change the model; the field comes first.
    """
    kind = fields.get("model_type", "nothing")
    if kind not in list(FAMILIES):
        _refuse("model_type", kind, ", ".join(FAMILIES))
    family = FAMILIES[kind]
    classes = fields.get("architectures") or [family.architecture]
    if not isinstance(classes, list) or family.architecture not in classes:
        _refuse("architectures", classes, family.architecture)
    reader = _Reader(fields)
    vocab_size, d_model, layers, heads, top_k = map(reader.size, SIZES)
    model = ModelConfig(
        layers=layers,
        d_model=d_model,
        heads=heads,
        kv_heads=reader.size("num_key_value_heads", null=heads),
        head_dim=reader.size("head_dim", null=0) or None,
        qk_norm=family.qk_norm,
        clip_qkv=reader.number("clip_qkv") if family.clips and fields.get("clip_qkv") is not None else None,
        experts=reader.experts(),
        top_k=top_k,
        normalize_top_k=family.top_k_is_normalized or reader.flag("norm_topk_prob"),
        d_ff=reader.size(family.d_ff),
        vocab_size=vocab_size,
        mask_unused_ids=False,
        rope_theta=reader.rope_theta(family.rope_theta),
        norm_eps=reader.number("rms_norm_eps"),
        tied_embedding=reader.flag("tie_word_embeddings"),
    )
    context = reader.size(CONTEXT)
    reader.check_neutral(NEUTRAL | family.neutral)
    reader.known.update(family.unread, ["clip_qkv"] * family.clips)
    reader.check_unknown(family)
    return family, model, context


class _Reader:
    """Typed access to a file's fields; it remembers which it was asked for."""

    def __init__(self, fields: dict[str, Any]):
        self.fields, self.known = fields, set(HARMLESS)

    def _get(self, name: str) -> Any:
        self.known.add(name)
        return self.fields.get(name)

    def size(self, name: str, null: int | None = None) -> int:
        """An integer from 1 up; `null` for null, or where there is none."""
        value = self._get(name)
        if value is None and null is not None:
            return null
        if type(value) is not int or not 1 <= value < 2**31:
            _refuse(name, "nothing" if value is None else value, "an integer from 1 to below 2**31")
        return value

    def number(self, name: str) -> float:
        return _number(name, self._get(name))

    def flag(self, name: str) -> bool:
        value = self._get(name)
        if value not in (None, True, False) or type(value) is int:
            _refuse(name, value, "true or false")
        return bool(value)

    def experts(self) -> int:
        found = {name: self.size(name) for name in EXPERTS if self._get(name) is not None}
        if len(set(found.values())) != 1:
            _refuse(" or ".join(EXPERTS), found or "nothing", "one number")
        return next(iter(found.values()))

    def rope_theta(self, default: float) -> float:
        """In the spelling of transformers 5, `rope_parameters`, or of 4, `rope_theta` and `rope_scaling`."""
        thetas = {}
        for name in ("rope_parameters", "rope_scaling"):
            rope = self._get(name)
            if rope is None:
                continue
            if not isinstance(rope, dict):
                _refuse(name, rope, "an object")
            for key, value in rope.items():
                if key == "rope_theta":
                    thetas[f"{name}.{key}"] = _number(f"{name}.{key}", value)
                elif value is not None and (key, value) not in (
                    ("rope_type", "default"),
                    ("type", "default"),
                    ("partial_rotary_factor", 1),
                ):
                    _refuse(f"{name}.{key}", value, "rotary positions as they are (rope_type default)")
        if self._get("rope_theta") is not None:
            thetas["rope_theta"] = _number("rope_theta", self._get("rope_theta"))
        if len(set(thetas.values())) > 1:
            _refuse(" and ".join(thetas), list(thetas.values()), "one number")
        return next(iter(thetas.values()), default)

    def check_neutral(self, neutral: dict[str, tuple]) -> None:
        for name, values in neutral.items():
            value = self._get(name)
            if value is None or value in values:
                continue
            if name == "sliding_window" and type(value) is int and value >= self.fields[CONTEXT]:
                continue  # no text is longer
            takes = "null" if not values else " or ".join(map(repr, values))
            _refuse(name, value, f"{takes}: another value makes another model")

    def check_unknown(self, family: Family) -> None:
        for name, value in self.fields.items():
            if name not in self.known and not name.startswith("_") and value is not None:
                takes = f"fields of which it is known what they mean for {family.name}: without it, if it means nothing"
                _refuse(name, value, takes)


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        _refuse(name, "nothing" if value is None else value, "a finite number")
    return float(value)


def _refuse(name: str, got: Any, takes: str) -> None:
    shown = got if got == "nothing" else repr(got)
    raise ConfigError(f"{name}: got {shown if len(shown) <= 80 else shown[:77] + '…'}; takes {takes}")


# What none of the families has, but at its default.
UNKNOWN_THERE = ("dense_layers", "router_score", "router_bias_rate", "router_groups", "router_scale", "shared_experts")


def family_of(model: ModelConfig) -> Family:
    """The family that has a model of ours.

    Raises:
        ConfigError: none has.
    """
    for field in UNKNOWN_THERE:
        got, takes = getattr(model, field), getattr(ModelConfig(), field)
        if got != takes:
            raise ConfigError(f"model.{field}: got {got!r}; takes {takes!r}, as the families of export have")
    if model.activation != "swiglu":
        raise ConfigError(f"model.activation: got {model.activation!r}; takes swiglu, as the families of export have")
    (family,) = (family for family in FAMILIES.values() if family.qk_norm == model.qk_norm)
    if family.top_k_is_normalized and not model.normalize_top_k:
        takes = f"True, or a model with model.qk_norm head or all: {family.name} has weights that sum to 1"
        raise ConfigError(f"model.normalize_top_k: got False; takes {takes}")
    if model.clip_qkv is not None and not family.clips:
        takes = "None, or a model with model.qk_norm all: only olmoe cuts them"
        raise ConfigError(f"model.clip_qkv: got {model.clip_qkv}; takes {takes}")
    if family.qk_norm == "all" and model.head_size * model.heads != model.d_model:
        takes = f"{model.d_model / model.heads:g} (model.d_model / model.heads), as olmoe has"
        raise ConfigError(f"model.head_dim: got {model.head_size}; takes {takes}")
    return family


def write(family: Family, model: ModelConfig, context: int, bos: int | None, ends: list[int]) -> dict:
    """The content of a config.json, which transformers 4 and 5 read.

    Args:
        family: `family_of` the model.
        model: with as many ids and of the dtype that are written.
        context: the longest, in tokens.
        bos: id that begins a text; None: there is none.
        ends: ids of which each ends a text.
    """
    fields = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "torch_dtype": model.dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "intermediate_size": model.d_ff,
        family.d_ff: model.d_ff,
        family.experts: model.experts,
        "num_experts_per_tok": model.top_k,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        CONTEXT: context,
        "tie_word_embeddings": model.tied_embedding,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": None,
    }
    if not family.top_k_is_normalized:
        fields["norm_topk_prob"] = model.normalize_top_k
    if family.clips:
        fields["clip_qkv"] = model.clip_qkv
    return fields | {name: values[0] if values else None for name, values in family.neutral.items()}
