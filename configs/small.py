"""A useful model for 1 to 8 GPUs: 12 layers of 768 with 8 experts, 520 M parameters of which 180 M work on a token.

    python train.py --config=configs/small.py --config.data.source=files --config.data.path='text/*.jsonl'
    python train.py --config=configs/small.py --config.mesh.expert=8      # on 8 GPUs

Expected: one H100 fits it with the batch below. Text of your own is what makes it useful; without any, it trains on
the default corpus (about a million tokens), which it soon knows by heart.

`remat` is full: on one H100, dots would be 1 % faster, but need 22.2 GB instead of 12.8 (`maxsep.plan`).

Its experts have a capacity until dropless ones have been timed on a GPU: their kernels have been compiled, not run. One
H100 would take 0.68 s per step and 11.6 GB without a capacity, 0.78 s and 12.8 GB with it (`maxsep.plan`, a roofline):

    --config.model.capacity_factor=None --config.model.capacity_group=None
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "small"
    config.train.steps = 20_000
    config.train.batch_size = 256
    config.train.accumulation = 8
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 1000
    config.data.sequence_length = 1024
    config.data.tokenizer = "gpt2"
    config.model.layers = 12
    config.model.d_model = 768
    config.model.heads = 12
    config.model.experts = 8
    config.model.top_k = 2
    config.model.d_ff = 2048
    config.model.vocab_size = 50_257
    config.model.capacity_factor = 1.25
    config.model.capacity_group = 128  # fixes which tokens are dropped, whatever the mesh
    config.model.tied_embedding = True
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    return config
