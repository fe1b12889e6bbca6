"""Models of Hugging Face's transformers, in and out: Mixtral, Qwen3-MoE, OLMoE.

    python -m maxsep.convert import --checkpoint=HF_DIR --workdir=DIR
    python -m maxsep.convert export --workdir=DIR --checkpoint=HF_DIR

An imported model is used as a run's: infer.py completes and scores texts with it, train.py starts from it with
--config.train.init_from=DIR. Of an exported one, transformers' AutoModelForCausalLM makes the same model.
"""

import os
import sys
import time
from dataclasses import replace

from absl import flags

from maxsep.cluster import process
from maxsep.cluster.signals import interrupting
from maxsep.config import Config, ConfigError, cli, paths
from maxsep.config.matrices import parameters
from maxsep.config.stored import at_home
from maxsep.output import workdir
from maxsep.output.durable import write_json
from maxsep.output.staged import check_new, staged
from maxsep.output.ticker import Ticker
from maxsep.parallel.start import start

COMMANDS = ("import", "export")


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("checkpoint", None, "folder of a Hugging Face model", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("step", "latest", "checkpoint to export: a step's number, latest, or best", flag_values=values)


def config_of(argv: list[str]) -> tuple[Config, list[str]]:
    """The config of what is converted: of the model to import, or of the run to export."""
    command = next((argument for argument in argv if argument in COMMANDS), None)
    if command == "import" and (path := cli.take("checkpoint", argv)[0]):
        from maxsep.huggingface.model import HuggingFaceModel  # imports NumPy, which would double the time of --help

        return HuggingFaceModel(path).config, argv
    if command == "export" and cli.take("workdir", argv)[0]:
        return cli.config_of_run(argv)
    return Config(), argv  # something is missing, or mistyped: that is found next


FOUND = cli.Found(config_of, ("layout", "mesh.stage", "mesh.attention", "mesh.expert", "mesh.inner", "model.dtype"))


def main(args: cli.Args) -> None:
    process.refuse_several("convert")
    checkpoint, folder = (_needed(flag, getattr(args.flags, flag)) for flag in ("checkpoint", "workdir"))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed, and a model may not fit into accelerators
    try:
        with interrupting():
            if args.command == "import":
                import_model(args.config, checkpoint, folder)
            else:
                export_model(args.config, folder, checkpoint, args.flags.step)
    except KeyboardInterrupt:
        raise cli.Exit(cli.STOPPED, "interrupted; nothing is left of it") from None


def _needed(flag: str, value: str | None) -> str:
    if not value:
        raise ConfigError(f"--{flag}: none given; takes the folder of a {'model' if flag == 'checkpoint' else 'run'}")
    return value


def import_model(config: Config, checkpoint: str, named: str) -> None:
    """Makes a run's folder of a model: its config, its parameters as the checkpoint of step 0, its tokenizer."""
    from maxsep.data import tokenizer
    from maxsep.huggingface import tokenizer_files
    from maxsep.huggingface.model import HuggingFaceModel

    begin = time.monotonic()
    folder = paths.run_folder(named, exists=False)
    check_new("--workdir", folder)
    model = HuggingFaceModel(checkpoint)
    config = replace(config, name=folder.name)
    ticker = Ticker()
    with staged("--workdir", folder) as partial:
        tokenizer_files.write(model.tokenizer_files, partial)
        words = tokenizer.of(at_home(config, partial))
        config = start(config, fit_mesh=False, training=False)
        from maxsep.huggingface.transfer import load

        load(model, config, partial, ticker.progress)
        origin = {"checkpoint": str(model.folder.path), "family": model.family.name, "dtype": model.dtype}
        workdir.write_config(partial, config, None, words.fingerprint, imported=origin)
    ticker.clear()
    seconds = time.monotonic() - begin
    print(
        f"{model.folder.path}: {model.family.architecture}, {parameters(config.model):,} parameters, "
        f"{model.dtype}, {model.bytes / 1e9:.2f} GB in {seconds:.1f} s ({model.bytes / 1e9 / seconds:.2f} GB/s)"
    )
    prompt = "--prompt=Return the"
    if not model.tokenizer_files:
        print("without a tokenizer.json: it takes ids alone, as numbers")
        prompt = "--prompt=1 2 3"
    if words.stops:
        print(f"a text ends with id {words.end_of_text}; a completion also with {', '.join(map(str, words.stops))}")
    here = paths.shown(folder)
    print(f"complete a text: {paths.command('infer.py', f'--workdir={here}', prompt)}")
    print(f"train it: {paths.command('train.py', '--workdir=NEW', f'--config.train.init_from={here}')}")


def export_model(config: Config, named: str, checkpoint: str, step: str) -> None:
    """Writes a run's model as transformers reads it: config.json, safetensors, tokenizer."""
    begin = time.monotonic()
    folder = paths.run_folder(named, exists=True, written=False)
    out = paths.named("--checkpoint", checkpoint)
    check_new("--checkpoint", out)
    workdir.check_inference(folder, config, step)
    from maxsep.data import tokenizer
    from maxsep.huggingface import model_config, tokenizer_files

    family = model_config.family_of(config.model)
    words = tokenizer.of(config)
    workdir.check_tokenizer(folder, config, words.fingerprint)
    files = tokenizer_files.written(words, config.data.tokenizer)
    # Rows that never had a probability are not written: transformers would give them one.
    model = replace(config.model, vocab_size=words.vocab_size) if config.model.mask_unused_ids else config.model
    ticker = Ticker()
    with staged("--checkpoint", out) as partial:
        config = start(config, fit_mesh=False, training=False)
        from maxsep.huggingface.transfer import store

        number, size = store(config, family, model, folder, step, partial, ticker.progress)
        begins, ends = tokenizer_files.beginning(words, files), words.ends
        fields = model_config.write(family, model, config.data.sequence_length, begins, ends)
        write_json(partial / "config.json", fields)
        tokenizer_files.write(files, partial)
    ticker.clear()
    seconds = time.monotonic() - begin
    print(
        f"{paths.shown(out)}: {family.architecture}, step {number} of {paths.shown(folder)}, {config.model.dtype}, "
        f"{size / 1e9:.2f} GB in {seconds:.1f} s"
    )
    if model.vocab_size < config.model.vocab_size:
        print(f"without the ids from {model.vocab_size} on, which the tokenizer lacks: they never had a probability")
    if not files:
        print(f"without a tokenizer: {config.data.tokenizer} has no tokenizer.json; ids are the run's own")


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__, commands=COMMANDS, found=FOUND))
