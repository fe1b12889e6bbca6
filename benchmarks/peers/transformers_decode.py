"""Times decoding of Hugging Face transformers: a Mixtral of the given shape, greedy, on all cores of a CPU."""

import os

import common
import mixtral


def main() -> None:
    parser = common.flags(__doc__, common.DECODE)
    variants = ["grouped_mm", "batched_mm", "eager"]
    parser.add_argument(
        "--variant", choices=variants, default="grouped_mm", help="transformers' experts_implementation"
    )
    args = parser.parse_args()
    out = common.claim_stdout()
    os.environ["HF_HUB_OFFLINE"] = "1"

    import torch

    facts = mixtral.transformers_facts(f"transformers {args.variant}")
    with torch.inference_mode():
        common.run_decode(args, out, facts, *decoder(args))


def decoder(args):
    """Prefill and step: the model's own forward pass with a cache, which is less work than its `generate`."""
    import torch
    from transformers import DynamicCache, MixtralForCausalLM

    torch.manual_seed(0)
    config = mixtral.transformers_config(args, args.context + args.new, args.variant)
    model = MixtralForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    prompts = torch.randint(0, args.vocab, (args.batch, args.context))
    cache = token = None

    def forward(ids):
        nonlocal token
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)

    def prefill():
        nonlocal cache
        cache = DynamicCache(config=config)
        forward(prompts)

    return prefill, lambda: forward(token)


if __name__ == "__main__":
    main()
