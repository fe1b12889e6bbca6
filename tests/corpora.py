"""Small corpora: their text, their config, and preparing them, as a run does or by the command."""

import json
import os

from maxsep import prepare
from maxsep.config import Config, DataConfig, ModelConfig, cli
from maxsep.data import preparation, splits

ENVIRONMENT = os.environ | {"PYTHONPATH": str(cli.REPOSITORY)}  # also where the package is not installed
TEXTS = [f"text {i} " * (i % 9 + 1) for i in range(200)]


def config(text, folder, vocab=50304, **data):
    defaults = {"source": "files", "path": str(text), "sequence_length": 16, "tokenizer": "bytes"}
    return Config(data=DataConfig(**defaults | {"cache": str(folder)} | data), model=ModelConfig(vocab_size=vocab))


def ensure(text, folder, log=None, **data):
    """The one prepared corpus."""
    mixture = preparation.ensure(config(text, folder, **data), (log if log is not None else []).append)
    (corpus,) = mixture.corpora.values()
    return corpus


def read(source, train=None, held_out=None, most=None):
    """The texts of a source that are trained on and that are held out, each in the order in which it is read."""
    found, begun = {"train": [], "eval": []}, False
    for split, sides in splits.sides(train, held_out, source.sizes(), most).items():
        for part in source.parts(split):
            for document in source.read(part):
                if (side := sides.of(document.place)) and len(document.content):
                    if begun:
                        found[side][-1] += document.content
                    else:
                        found[side].append(document.content)
                begun = side == "train" == sides.of(document.following)
    return list(found.values())


def mixed(folder):
    """The fields of a mixture of three small sources of different kinds, by section__field."""
    for name, count in (("a", 60), ("b", 40), ("c", 20)):
        lines = [json.dumps({"text": f"{name} has the text {i * i} {name * (i % 7)}"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    mixture = f"a:0.5:{folder}/a.jsonl,b:0.2:{folder}/b.jsonl,c:0.3:{folder}/c.jsonl"
    return {"data__source": "docstrings", "data__path": None, "data__mixture": mixture}


def run(path, cache, *flags):
    """The command in this process. Returns its status."""
    data = {"source": "files", "path": path, "sequence_length": 16, "tokenizer": "bytes", "cache": cache}
    argv = ["prepare", *(f"--config.data.{name}={value}" for name, value in data.items()), *flags]
    return cli.run(prepare.main, prepare.define, prepare.__doc__, "configs/tiny.py", argv=argv)
