"""The families of models of Hugging Face's transformers that this transformer can be: their names and their tensors.

A family is what `model_type` names in a config.json. How its class reads that file, and what it calls its weights on
disk, are facts of transformers 4 and 5.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from maxsep.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    name: str
    architecture: str  # the class in transformers
    qk_norm: str  # as `model.qk_norm`
    experts: str  # the field of their number; transformers 5 writes num_local_experts for Qwen3 too
    d_ff: str  # the field of an expert's hidden size
    rope_theta: float  # where the file has none
    top_k_is_normalized: bool  # always; else `norm_topk_prob` says it
    moe: str  # of the experts' layer in a tensor's name
    gate_up_down: tuple[str, str, str]  # of an expert's matrices
    neutral: dict[str, tuple] = field(default_factory=dict)  # fields, and the values that leave the model as it is here
    unread: tuple[str, ...] = ()  # fields that mean nothing where the neutral ones are neutral
    clips: bool = False  # has `clip_qkv`


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="mixtral",
            architecture="MixtralForCausalLM",
            qk_norm="none",
            experts="num_local_experts",
            d_ff="intermediate_size",
            rope_theta=1_000_000.0,
            top_k_is_normalized=True,
            moe="block_sparse_moe",
            gate_up_down=("w1", "w3", "w2"),
            neutral={"router_jitter_noise": (0.0,), "sliding_window": ()},
        ),
        Family(
            name="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            qk_norm="head",
            experts="num_experts",
            d_ff="moe_intermediate_size",
            rope_theta=10_000.0,
            top_k_is_normalized=False,
            moe="mlp",
            gate_up_down=("gate_proj", "up_proj", "down_proj"),
            neutral={"decoder_sparse_step": (1,), "mlp_only_layers": ([],), "use_sliding_window": (False,)},
            unread=("intermediate_size", "sliding_window"),  # of layers without experts, and of windows
        ),
        Family(
            name="olmoe",
            architecture="OlmoeForCausalLM",
            qk_norm="all",
            experts="num_experts",
            d_ff="intermediate_size",
            rope_theta=10_000.0,
            top_k_is_normalized=False,
            moe="mlp",
            gate_up_down=("gate_proj", "up_proj", "down_proj"),
            clips=True,
        ),
    )
}


@dataclass(frozen=True)
class Tensors:
    """Where one of our parameters lies in a checkpoint: in a tensor, or in one for each layer, or layer and expert."""

    name: str  # with {l} and {e} for their numbers
    dims: tuple[str, ...]  # of each of them, by letters; where two are joined, as hq, the first is the outer one
    letters: str  # of the parameter

    @property
    def numbered(self) -> str:
        """The letters that the name has numbers of; the parameter begins with them."""
        return "".join(letter for letter in "le" if f"{{{letter}}}" in self.name)

    @property
    def own(self) -> str:
        """The parameter's other letters."""
        return self.letters[len(self.numbered) :]

    def named(self, numbers: tuple[int, ...]) -> str:
        """The name of the tensor with these numbers of layer and expert."""
        return self.name.format(**dict(zip(self.numbered, numbers, strict=True)))

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Of each tensor, where letters have these `sizes`."""
        return tuple(math.prod(sizes[letter] for letter in dim) for dim in self.dims)


def numbers(tensors: Tensors, of: dict[str, int]) -> Iterator[tuple[int, ...]]:
    """The numbers of the tensors that a parameter lies in, where letters have the sizes `of`, whatever these are."""

    def of_letters(letters: str) -> Iterator[tuple[int, ...]]:
        if not letters:
            yield ()
            return
        for number in range(of[letters[0]]):
            for others in of_letters(letters[1:]):
                yield number, *others

    return of_letters(tensors.numbered)


def tensors(family: Family, model: ModelConfig) -> dict[tuple[str, ...], Tensors]:
    """Of each parameter, by its path in ours. torch keeps matrices as (out, in), we as (in, out)."""
    return dict(_tensors(family, model))


def _tensors(family: Family, model: ModelConfig) -> Iterator[tuple[tuple[str, ...], Tensors]]:
    def of(path: str, name: str, dims: str, letters: str) -> tuple[tuple[str, ...], Tensors]:
        return tuple(path.split(".")), Tensors(f"model.{name}.weight", tuple(dims.split()), letters)

    def block(path: str, name: str, dims: str, letters: str) -> tuple[tuple[str, ...], Tensors]:
        return of(f"segments.moe.{path}", f"layers.{{l}}.{name}", dims, letters)

    yield of("embedding.table_vd", "embed_tokens", "v d", "vd")
    yield block("attention_norm.scale", "input_layernorm", "d", "ld")
    yield block("attention.wq_dhq", "self_attn.q_proj", "hq d", "ldhq")
    yield block("attention.wk_dkq", "self_attn.k_proj", "kq d", "ldkq")
    yield block("attention.wv_dkq", "self_attn.v_proj", "kq d", "ldkq")
    yield block("attention.wo_hqd", "self_attn.o_proj", "d hq", "lhqd")
    if family.qk_norm != "none":
        heads = {"head": ("", ""), "all": ("h", "k")}[family.qk_norm]
        for what, letter in zip("qk", heads, strict=True):
            yield block(f"attention.{what}_norm.scale", f"self_attn.{what}_norm", f"{letter}q", f"l{letter}q")
    yield block("feed_forward_norm.scale", "post_attention_layernorm", "d", "ld")
    yield block("feed_forward.router.w_de", f"{family.moe}.gate", "e d", "lde")
    gate, up, down = (f"{family.moe}.experts.{{e}}.{name}" for name in family.gate_up_down)
    yield block("feed_forward.experts.w_gate_edf", gate, "f d", "ledf")
    yield block("feed_forward.experts.w_in_edf", up, "f d", "ledf")
    yield block("feed_forward.experts.w_out_efd", down, "d f", "lefd")
    yield of("final_norm.scale", "norm", "d", "d")
    if not model.tied_embedding:
        yield ("head_vd",), Tensors("lm_head.weight", ("v", "d"), "vd")
