"""Completes prompts with a run's model, or with --score prints the log-probability of texts.

Without flags: the newest run under runs/, its latest checkpoint, one device where there are no accelerators, prompts
from standard input. Several processes may hold one model: docs/multihost.md.
"""

from maxsep.parallel import huge_pages

if __name__ == "__main__":
    huge_pages.ensure()  # before what is slow to import

import sys
from functools import partial

from absl import flags

from maxsep.cluster import join
from maxsep.config import ConfigError, cli, paths
from maxsep.inference import texts
from maxsep.output import workdir
from maxsep.parallel.start import start

# The config: the run's own.
FOUND = cli.Found(partial(cli.config_of_run, newest=workdir.newest), workdir.INFERENCE_TAKES)


def define(values: flags.FlagValues) -> None:
    def integer(name, default, least, text):
        flags.DEFINE_integer(name, default, text, lower_bound=least, flag_values=values)

    def string(name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=values)

    string("workdir", None, "folder of the run (default: the newest under runs/)")
    string("step", "latest", "checkpoint: a step's number, latest, or best (lowest held-out loss)")
    flags.DEFINE_multi_string("prompt", [], "text to complete; may be given again", flag_values=values)
    string("prompts", None, 'file of prompts: .txt, one per line; .jsonl, {"prompt": …} or {"tokens": […]} per line')
    integer("max_new_tokens", 64, 1, "most new tokens per prompt")
    flags.DEFINE_float("temperature", 0.8, "sampling temperature; 0: greedy", flag_values=values)
    integer("top_k", None, 1, "sample from this many of the likeliest tokens")
    flags.DEFINE_float(
        "top_p",
        1.0,
        "sample from the likeliest tokens that have this probability together (nucleus)",
        flag_values=values,
    )
    integer("seed", 0, 0, "seed of the samples")
    integer("batch_size", 16, 1, "prompts or texts per batch")
    string("score", None, 'file of texts to score: {"text": …} or {"tokens": […]} per line')
    string("json", None, "JSON Lines file to write, an object per prompt or text")
    join.define(values)


def main(args: cli.Args) -> None:
    options, config = args.flags, args.config
    check(options)
    folder = paths.run_folder(options.workdir, exists=True, written=False)
    workdir.check_inference(folder, config, options.step)
    from maxsep.data import tokenizer  # imports NumPy, which would double the time that --help takes

    words, context = tokenizer.of(config), config.data.sequence_length
    workdir.check_tokenizer(folder, config, words.fingerprint)
    with join.joined(args, folder) as job:
        given = None
        if job.first:  # which alone has a standard input
            if options.score:
                given = texts.to_score(options.score, words, context)
            else:
                given = texts.prompts(options.prompt, options.prompts, words, context)
        given = job.agree(given)[0]
        config = start(config, args.fit_mesh, training=False, job=job)
        from maxsep.inference.sampling import Sampling  # imports JAX, which must wait until the flags are right
        from maxsep.inference.session import Session

        session = Session(config, folder, options.step, words, job)
        if options.score:
            session.score(given, options.batch_size, options.json)
        else:
            given = [texts.Prompt(*prompt) for prompt in given]
            sampling = Sampling.of(options.temperature, options.top_k, options.top_p, options.seed)
            session.generate(given, options.max_new_tokens, sampling, options.batch_size, options.json)


def check(options: flags.FlagValues) -> None:
    """The rules of the flags that absl cannot hold.

    Raises:
        ConfigError: one is broken.
    """
    if not options.temperature >= 0 or options.temperature == float("inf"):
        raise ConfigError(f"--temperature: got {options.temperature}; takes a number from 0 up")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top_p: got {options.top_p}; takes a number above 0, up to 1")
    if options.seed >= 2**32:
        raise ConfigError(f"--seed: got {options.seed}; takes an integer from 0 to 2**32 - 1")
    if options.score is not None and (options.prompt or options.prompts):
        raise ConfigError("--score: got beside prompts; takes one of the two")
    if options.json is not None:
        paths.to_write("--json", options.json)


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__, found=FOUND))
