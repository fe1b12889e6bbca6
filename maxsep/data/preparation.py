"""Brings a config's text into records: opened where that is done, else tokenised and packed below data.cache.

What is finished is kept when it is interrupted; the next attempt goes on from there.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from maxsep.cluster.job import ALONE, Job
from maxsep.config import Config, ConfigError, cli
from maxsep.config.checksum import checksum
from maxsep.config.mixture import ratio
from maxsep.data import cache, packing, sources, splits, tokenizer
from maxsep.data.base_tokenizer import NO_END
from maxsep.data.mixture import Mixture
from maxsep.data.records import FORMAT, Corpus, Damaged
from maxsep.data.splits import BYTES_A_TOKEN, Sides
from maxsep.output.durable import write_json
from maxsep.output.ticker import seldom

LARGE = 300_000_000  # tokens that training does not prepare on the way: minutes of work
RATE = 2_000_000  # tokens/s that a process prepares, roughly
HASH_RATE = 500_000_000  # bytes/s that are read for a file's hash, roughly
MOST_UNKNOWN = 0.5  # share of a text that its tokenizer may lack


def ensure(config: Config, log: Callable[[str], None], job: Job = ALONE) -> Mixture:
    """The config's corpus or corpora: opened where they are prepared, else prepared now if they are small.

    Of several processes the first prepares them; then each opens them, or prepares them where its cache is on another
    disk.

    Raises:
        ConfigError: data that is not there or cannot be read, or so much that it has to be prepared ahead, or is not
            the same in all processes.
    """
    job.at("preparing data")

    def opened() -> Mixture:
        return mixed(config, log, lambda one: one.open_or_prepare(1, seldom(log, 5), LARGE))

    corpus = opened() if job.first else None
    if job.count > 1:
        with told_later(f"process {job.index} waits for process 0, which prepares the data", unless=job.first):
            job.agree(None)
        corpus = corpus or opened()
        found = job.agree(corpus.fingerprint)
        for member, fingerprint in zip(job.members, found, strict=True):
            if fingerprint != found[0]:
                raise ConfigError(
                    f"data.source: got another corpus in {member} than in {job.members[0]}; takes the same"
                )
    return corpus


def mixed(config: Config, log: Callable[[str], None], prepared: Callable[["Preparation"], Corpus]) -> Mixture:
    """What `prepared` makes of each source of the config.

    Raises:
        ConfigError: with the name of the source, where there are several.
    """
    if config.data.mixture is None:
        return Mixture({config.data.source: prepared(Preparation(config, log))}, (1,), named=False)
    corpora = {}
    for share in config.data.mixture:
        own = dataclasses.replace(config.data, mixture=None, source=share.source, path=share.path)
        try:
            corpora[share.name] = prepared(Preparation(dataclasses.replace(config, data=own), log))
        except ConfigError as error:
            raise ConfigError(f"data.mixture: {share.name}: {error}") from error
    return Mixture(corpora, tuple(ratio(config.data.mixture)), named=True)


def check(config: Config) -> str:
    """Opens what the config names as data and tokenizer; reads no text. Returns the tokenizer's fingerprint.

    Raises:
        ConfigError: one of them is not there, or of no known kind.
    """

    def checked(preparation: Preparation) -> None:
        if config.data.split or config.data.eval_split:
            preparation.sides()

    mixed(config, lambda line: None, checked)
    return tokenizer.of(config).fingerprint


class Preparation:
    """Text, tokenizer and cache of a config.

    Raises:
        ConfigError: text or tokenizer is not there, or of no known kind, or the model has too few ids.
    """

    def __init__(self, config: Config, log: Callable[[str], None]):
        data = config.data
        self.config, self.log = config, log
        self.tokenizer = tokenizer.of(config)
        if self.tokenizer.end_of_text == NO_END:
            takes = f"{data.tokenizer}:E, with the id E that ends a text, which separates documents"
            raise ConfigError(f"data.tokenizer: got {data.tokenizer}; takes {takes}")
        self.cache = cache.root(data.cache)
        self.source = sources.find(data, self.tokenizer, self.cache)

    def open_or_prepare(self, workers: int, progress: Callable[[str], None], limit: float) -> Corpus:
        """The corpus, prepared if it is missing, damaged, and has at most about `limit` tokens."""
        if self.source.bytes > limit * BYTES_A_TOKEN and not self.source.quick_fingerprint():
            raise self.too_large()
        folder = self.folder()
        if corpus := self.open(folder):
            return corpus
        if self.estimate() > limit:
            raise self.too_large()
        with cache.writing(self.cache), cache.locked(folder, self.log):
            corpus = self.open(folder)  # another process may have prepared it meanwhile
            if corpus is None:
                self.prepare(folder, workers, progress)
                corpus = self.opened(folder)
        return corpus

    @functools.cached_property
    def source_fingerprint(self) -> str:
        return self.source.fingerprint(self.log)

    def folder(self) -> Path:
        """Where the corpus belongs, named by a hash of all that decides its records."""
        data = self.config.data
        limits = (data.sequence_length, data.split, data.eval_split, data.max_tokens, data.eval_max_tokens)
        key = (FORMAT, self.tokenizer.fingerprint, self.source_fingerprint, limits)
        return self.cache / "records" / hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    def open(self, folder: Path) -> Corpus | None:
        if not folder.exists():
            return None
        try:
            return self.opened(folder)
        except Damaged as error:
            self.log(f"{error}; preparing it anew")
            return None

    def opened(self, folder: Path) -> Corpus:
        return Corpus(folder, self.tokenizer, self.source.description)

    def prepare(self, folder: Path, workers: int, progress: Callable[[str], None]) -> None:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(folder, ignore_errors=True)  # what is there is damaged
        partial.mkdir(parents=True, exist_ok=True)
        _drop_begun(partial)  # by a process that was killed
        try:
            manifest = self.pack(partial, workers, progress)
            self.check(manifest["train"]["tokens"], manifest["eval"]["tokens"])
            self.check_known(manifest)
            manifest = self.describe(manifest)
            write_json(partial / "manifest.json", manifest | {"checksum": checksum(manifest)})
        except ConfigError:
            if not (partial / packing.PROGRESS).exists():  # nothing worth keeping
                shutil.rmtree(partial)
            raise
        finally:
            _drop_begun(partial)
        packing.clean(partial)
        partial.rename(folder)

    def sides(self) -> dict[str, Sides]:
        """Of each split of the source, what is trained on and what is held out."""
        data, sizes = self.config.data, self.source.sizes()
        if data.max_tokens:  # little of the text is read, which then has little to hold out
            sizes = {name: min(size, data.max_tokens * BYTES_A_TOKEN) for name, size in sizes.items()}
        return splits.sides(data.split, data.eval_split, sizes, data.eval_max_tokens)

    def pack(self, folder: Path, workers: int, progress: Callable[[str], None]) -> dict:
        """Packs both splits into shards in `folder`. Returns what `packing.pack` tells of each."""
        data = self.config.data
        self.source.prepare(self.log)
        sides = self.sides()
        self.log(f"preparing {self.source.description}, with the tokenizer {data.tokenizer}")
        how = packing.Packing(data.tokenizer, data.sequence_length, data.max_tokens, data.eval_max_tokens)

        def packed(sides: dict[str, Sides]) -> dict:
            self.log(f"held out: {splits.described(sides, data.eval_max_tokens)}")
            parts = [(part, its) for name, its in sides.items() for part in self.source.parts(name)]
            return packing.pack(folder, self.source.read, parts, how, workers, progress)

        found = packed(sides)
        nothing = not found["eval"]["tokens"] and data.eval_split is None
        if nothing and "train" in sides and found["top"] is not None:
            packing.clean(folder)
            for path in folder.glob("*.array_record"):
                path.unlink()
            # So few documents that none lies so high: the highest of them then
            found = packed(splits.above(found["top"], sides))
        return {name: found[name] for name in ("train", "eval")}

    def check(self, train_tokens: int, eval_tokens: int) -> None:
        data = self.config.data
        for field in ("max_tokens", "eval_max_tokens"):
            if getattr(data, field) == 1:
                raise ConfigError(f"data.{field}: got {getattr(data, field)}; takes None, or at least 2 tokens")
        if train_tokens + eval_tokens < 2 and data.split is None and data.eval_split is None:
            raise ConfigError(f"data.path: got {data.path!r}, which holds no text; takes text")
        for field, tokens in (("split", train_tokens), ("eval_split", eval_tokens)):
            if tokens < 2:
                why = "a document is not cut, and its copies stay with it"
                got = f"got {getattr(data, field)}, which holds no text ({why})"
                raise ConfigError(f"data.{field}: {got}; takes a larger slice, or data.path more documents")
        if train_tokens <= data.sequence_length:
            takes = f"less than the {train_tokens} tokens of the training split"
            raise ConfigError(f"data.sequence_length: got {data.sequence_length}; takes {takes}")

    def check_known(self, splits: dict) -> None:
        """Tells how much of the packed splits' text has no token; refuses a tokenizer that was made for other text."""
        name = self.config.data.tokenizer
        unknown = sum(split.pop("unknown") for split in splits.values())
        tokens = sum(split["tokens"] - split["documents"] for split in splits.values())
        share = unknown / max(1, tokens if self.tokenizer.unknown else tokens + unknown)
        what = self.tokenizer.lacks(unknown, f"the text ({share:.2%})")
        if share > MOST_UNKNOWN:
            raise ConfigError(f"data.tokenizer: got {name!r}; {what}; takes one that was made for such text")
        if unknown:
            self.log(f"WARNING: data.tokenizer: {name}: {what}")

    def describe(self, splits: dict) -> dict:
        """The manifest of the packed splits, without its checksum."""
        data = self.config.data
        train, held_out = splits["train"].pop("counts"), splits["eval"].pop("counts")
        identity = {"tokenizer": self.tokenizer.fingerprint, "sequence_length": data.sequence_length}
        shards = [[shard["sha256"] for shard in splits[name]["shards"]] for name in ("train", "eval")]
        source = {"kind": data.source, "description": self.source.description}
        return identity | {
            "format": FORMAT,
            "fingerprint": checksum(identity | {"shards": shards}),
            "source": source | {"fingerprint": self.source_fingerprint},
            "split": data.split,
            "eval_split": data.eval_split,
            "unigram_entropy": unigram_entropy(train, held_out),
            **splits,
        }

    def estimate(self) -> int:
        """Tokens to prepare, roughly."""
        data = self.config.data
        tokens = self.source.bytes // (1 if data.tokenizer == "bytes" else BYTES_A_TOKEN)
        held_out = tokens // 10
        return min(tokens - held_out, data.max_tokens or tokens) + min(held_out, data.eval_max_tokens or tokens)

    def too_large(self) -> ConfigError:
        tokens, workers = self.estimate(), os.cpu_count()
        # Whatever max_tokens says, files are read to their end once, for their hash.
        hashing = 0 if self.source.quick_fingerprint() else self.source.bytes / HASH_RATE
        minutes = max(1, round((tokens / RATE / workers + hashing) / 60))
        gigabytes = tokens * packing.id_dtype(self.tokenizer.vocab_size).itemsize / 1e9
        command = ["python", "-m", "maxsep.prepare", *cli.config_arguments(sys.argv)]
        return ConfigError(
            f"data.path: {self.source.description} ({self.source.bytes / 1e9:.1f} GB) is not prepared: about "
            f"{tokens / 1e6:,.0f} M tokens, {gigabytes:.1f} GB of disk, {minutes} minutes on {workers} cores; "
            f"first run: {shlex.join(command)}"
        )


def _drop_begun(folder: Path) -> None:
    """Removes files that were not written to their end."""
    for file in folder.glob("*.partial"):
        file.unlink()


def unigram_entropy(train_counts: np.ndarray, eval_counts: np.ndarray) -> float:
    """Nats a token of the held-out tokens, under the training tokens' frequencies with one added to every count.

    Args: int64 [vocab_size] each, how often an id is predicted.
    """
    share = (train_counts + 1) / (train_counts.sum() + len(train_counts))
    return float(-(eval_counts * np.log(share)).sum() / eval_counts.sum())


@contextlib.contextmanager
def told_later(text: str, unless: bool, seconds: float = 5.0) -> Iterator[None]:
    """Says `text` on standard error where what is inside takes long."""
    timer = threading.Timer(seconds, lambda: print(text, file=sys.stderr, flush=True))
    if not unless:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
