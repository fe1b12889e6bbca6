"""Prepares text for training: tokenised in several processes and packed into records below data.cache.

    python -m maxsep.prepare --config=configs/NAME.py [--workers=N] [--config.data.max_tokens=N]

What is finished is kept when it is interrupted: the same command resumes from there. train.py prepares small texts by
itself.
"""

import json
import os
import signal
import sys
import time

from absl import flags

from maxsep.cluster import process
from maxsep.cluster.signals import stopping
from maxsep.config import cli, paths
from maxsep.data import preparation
from maxsep.data.records import Corpus
from maxsep.output.durable import write_asked
from maxsep.output.ticker import Ticker


def define(values: flags.FlagValues) -> None:
    takes = "processes that tokenise; the records do not depend on it (default: one a core)"
    flags.DEFINE_integer("workers", None, takes, lower_bound=1, flag_values=values)
    flags.DEFINE_string("workdir", None, "prepare the text of this run, instead of --config", flag_values=values)
    flags.DEFINE_string("json", None, "file to write the figures to", flag_values=values)


def main(args: cli.Args) -> None:
    process.refuse_several("prepare")
    started = time.monotonic()
    if args.flags.json:
        paths.to_write("--json", args.flags.json)
    console = Ticker()
    asked = False

    def interrupt(*_) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def progress(text: str) -> None:
        if asked:  # and the exception was lost: Python ignores one that comes up in a destructor
            raise KeyboardInterrupt
        console.progress(text)

    for number in stopping():
        signal.signal(number, interrupt)
    try:
        workers = args.flags.workers or os.cpu_count()
        mixture = preparation.mixed(
            args.config, console.line, lambda one: one.open_or_prepare(workers, progress, float("inf"))
        )
    except KeyboardInterrupt:
        raise cli.Exit(cli.STOPPED, "interrupted; the same command resumes from here") from None
    seconds = time.monotonic() - started
    figures = {}
    for name, corpus in mixture.corpora.items():
        console.line(f"{corpus.source}: prepared in {corpus.folder} ({seconds:.1f} s)")
        figures[name] = show(f"{name} " if mixture.named else "", corpus)
    figures = figures if mixture.named else figures.popitem()[1]
    figures |= {"fingerprint": mixture.fingerprint, "seconds": seconds}
    if args.flags.json:
        write_asked("--json", args.flags.json, json.dumps(figures) + "\n")


def show(name: str, corpus: Corpus) -> dict:
    """Prints a corpus's figures, which are returned."""
    figures = {"folder": str(corpus.folder)}
    for split, records in (("train", corpus.train), ("eval", corpus.eval)):
        figures[split] = {"tokens": records.targets + 1, "documents": records.documents, "records": len(records)}
        print(f"{name}{split:<6}" + "".join(f"{count:>16,} {what}" for what, count in figures[split].items()))
    print(f"{name}unigram cross-entropy of the held-out tokens: {corpus.unigram_entropy:.4f} nats")
    return figures | {"unigram_entropy": corpus.unigram_entropy}


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__, default_config="configs/tiny.py"))
