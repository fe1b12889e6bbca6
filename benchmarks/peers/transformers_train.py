"""Times a training step of Hugging Face transformers: a dropless Mixtral of the given shape, on all cores of a CPU."""

import os

import common
import mixtral


def main() -> None:
    args = common.flags(__doc__).parse_args()
    out = common.claim_stdout()
    os.environ["HF_HUB_OFFLINE"] = "1"
    facts = mixtral.transformers_facts("transformers") | {"capacity_factor": None}
    common.run(args, out, facts, train_step(args))


def train_step(args):
    """Forward, backward, clipping and AdamW on one batch of random ids that is used again."""
    import torch
    from transformers import MixtralForCausalLM

    torch.manual_seed(0)
    config = mixtral.transformers_config(args, args.sequence, "grouped_mm")  # the fastest of its three on a CPU
    model = MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = torch.randint(0, args.vocab, (args.batch, args.sequence + 1))
    inputs, targets = batch[:, :-1], batch[:, 1:].flatten()

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


if __name__ == "__main__":
    main()
