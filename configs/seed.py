"""The study's run, field by field: 13.57 B parameters on 16 x A100 80 GB, 50,000 steps of 2 M tokens of C4.

    python train.py --config=configs/seed.py --config.data.path=DIR

DIR is the TFDS data_dir in which c4/en is prepared (as array_record or tfrecord). GPT-2's tokenizer has 50,257 ids;
the study's vocabulary has 50,265, of which the last 8 are never used. Expected: the study reports a perplexity of 12.8.

Layout, mesh and remat are, within 0.3 %, the fastest that `maxsep.plan` finds for this hardware (docs/plan.md). They
take 19.9 GB per device, the study's own layout (--config.layout=ma) 47.6 GB. A pipeline needs
--config.model.remat=full.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "seed"
    config.layout = "ma_folded"
    config.mesh.attention = 4
    config.mesh.expert = 4
    config.train.steps = 50_000
    config.train.batch_size = 1024  # 2 M tokens
    config.train.accumulation = 64  # the load-balancing loss is of a micro-batch, 16 sequences
    config.train.eval_every = 1000
    config.train.checkpoint_every = 500
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 5000
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.optimizer.zero1 = True
    config.data.source = "tfds"
    config.data.path = "tensorflow_datasets"  # the folder that holds c4/en/3.1.0
    config.data.name = "c4/en"
    config.data.split = "train[:90%]"
    config.data.eval_split = "train[90%:]"
    config.data.sequence_length = 2048
    config.data.eval_max_tokens = 10_000_000  # of some 16 B: an evaluation takes minutes, not longer than training
    config.data.tokenizer = "gpt2"
    config.model.layers = 4
    config.model.d_model = 4096
    config.model.heads = 32
    config.model.experts = 16
    config.model.top_k = 2
    config.model.d_ff = 16_384
    config.model.vocab_size = 50_265
    config.model.activation = "swiglu"
    config.model.capacity_factor = 1.0
    config.model.capacity_group = 128  # fixes which tokens are dropped, whatever the layout
    config.model.expert_dropout = 0.1
    config.model.load_balancing_coefficient = 0.01
    config.model.router_z_coefficient = 0.001
    config.model.remat = "dots"
    config.model.dtype = "bfloat16"
    return config
