"""The study's comparison: one model under TP=8, PP=2, both, MA separation; `ma`, `ma_folded` on more meshes; `zero`.

    python -m maxsep.ablate --config=configs/ablations/study.py --workdir=runs/ablation

Size tiny, the default, is for two CPU cores: float64, so that the losses of all runs can be compared to rounding, and
20 steps. Size study (`--size=study`) is configs/seed.py on 16 GPUs, with fewer steps and `model.remat=full`, without
which pipelines do not fit.

Expected of tiny: some 14 minutes on 2 cores, and losses that agree to 1e-9.
"""

from configs import seed
from maxsep.config import ConfigError

# layout:[stage x]attention x expert. The first of tp, pp, tp_pp and ma are the columns of the study's tables.
RUNS = [
    "tp:8x2",
    "pp:2x1x8",
    "tp_pp:2x8x1",
    "ma:4x4",
    "ma:1x16",
    "ma:2x8",
    "ma:8x2",
    "ma:16x1",
    "ma_folded:4x4",
    "ma_folded:1x16",
    "ma_folded:2x8",
    "ma_folded:8x2",
    "ma_folded:16x1",
    "zero:4x4",
]


def get_config(size="tiny"):
    """`size`: tiny, study."""
    config = seed.get_config()
    config.name = f"ablation-{size}"
    config.train.log_every = 1
    config.train.checkpoint_every = 0
    config.train.eval_every = 0
    config.data.eval_max_tokens = 1_000_000
    if size == "study":
        config.train.steps = 100  # of 50,000: enough for its times
        config.model.remat = "full"  # under dots, pipelines need 147 to 193 GB per device
        return config
    if size != "tiny":
        raise ConfigError(f"--size: got {size!r}; takes tiny or study")
    config.mesh.attention = 4
    config.mesh.expert = 4
    config.train.steps = 20
    config.train.batch_size = 32
    config.train.accumulation = 2  # as many as pp:2 has stages
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 5
    config.data.source = "docstrings"
    config.data.path = None
    config.data.name = None
    config.data.split = None
    config.data.eval_split = None
    config.data.sequence_length = 64
    config.data.eval_max_tokens = 20_000
    config.data.tokenizer = "gpt2:2048"
    config.model.d_model = 64
    config.model.heads = 16
    config.model.d_ff = 128
    config.model.vocab_size = 2048
    config.model.capacity_group = 4  # a device's part of a sequence on 16x1
    config.model.remat = "none"
    config.model.dtype = "float64"
    return config
