"""Compares layouts and meshes: trains the same model on each, one run after the other, and writes one report.

    python -m maxsep.ablate --config=configs/ablations/study.py --workdir=runs/ablation
    python -m maxsep.ablate --config=configs/tiny.py --runs=ma:4x4,ma:2x8,tp:8x2

A run is layout:attention x expert, or layout:stage x attention x expert; without --runs they are the config's RUNS.
Each is a train.py of its own. The same command resumes where it was stopped: what has finished is kept. A run that
fails is a row that says why, and the command ends with its status. The report is ablation.md, ablation.json,
ablation.html, and pictures with the extra viz.
"""

import json
import os
import shlex
import sys
import time

from absl import flags

from maxsep.cluster import process
from maxsep.config import ConfigError, cli, files, paths, runs
from maxsep.config.paths import REPOSITORY

DEFAULT = "configs/ablations/study.py"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "runs/ablation", "folder of the ablation", flag_values=values)
    flags.DEFINE_list(
        "runs",
        None,
        "layouts and meshes to compare, as ma:4x4,pp:2x1x8 (default: the config's RUNS)",
        flag_values=values,
    )
    flags.DEFINE_string("size", None, "size of a config that has several: tiny, study", flag_values=values)
    flags.DEFINE_string(
        "plan", None, "JSON file of maxsep.plan, of the same config: the report has its speed-ups", flag_values=values
    )
    flags.DEFINE_boolean("decode", True, "also time decoding of the study's strategies", flag_values=values)


def main(args: cli.Args) -> None:
    from maxsep.ablation import trial
    from maxsep.data import preparation
    from maxsep.output import workdir
    from maxsep.output.lock import Lock

    process.refuse_several("ablate")
    named = args.flags.workdir
    folder = paths.run_folder(named, exists=False)
    if (folder / "config.json").exists():
        raise ConfigError(f"--workdir: got {named}, which is the folder of a run; takes one for the ablation's runs")
    config_path = cli.take("config", args.argv)[0]
    asked = files.listed(config_path, "RUNS") if args.flags.runs is None else args.flags.runs
    if args.flags.runs is None and not asked:
        raise ConfigError(f"--runs: none given, and {config_path} has no RUNS; takes {runs.TAKES}")
    shared = cli.config_arguments(args.argv)
    runs.check_free(shared)
    planned = {} if args.flags.plan is None else planned_seconds(args.flags.plan, args.config.name)
    trials = trial.trials(asked, args.config, folder)
    for one in trials:
        if (one.folder / "config.json").exists():
            workdir.check_resume(one.folder, one.config, may_change=trial.MAY_CHANGE)
        workdir.check_start(one.folder, one.config, training=True)
    tokenizer = preparation.check(args.config)
    for one in trials:
        workdir.check_tokenizer(one.folder, one.config, tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--workdir: cannot write to {named}: {e.strerror}") from e

    from maxsep.ablation.session import Session

    began = time.monotonic()
    session = Session(trials, folder, shared, args.flags.decode, planned)
    with Lock(folder):
        session.run()
        try:
            chosen = [] if args.flags.runs is None else [f"--runs={','.join(args.flags.runs)}"]
            chosen += [] if args.flags.plan is None else [f"--plan={args.flags.plan}"]
            again = ["python", "-m", "maxsep.ablate", *shared, *chosen, f"--workdir={named}"]
            written = session.report(shlex.join(again))
        except OSError as e:
            why = f"cannot write the report in {named}: {e.strerror}; with room for it the same command writes it"
            raise cli.Exit(cli.SAVE_FAILED, why) from e
    print(f"{time.monotonic() - began:.0f} s; written: {paths.shown(folder)}: {written}", flush=True)
    if session.stopped:
        raise cli.Exit(cli.STOPPED, f"{session.stopped}: stopped; the same command resumes from there")
    if session.status:
        failed = [*session.failed, *(f"decoding of {name}" for name in session.not_decoded)]
        raise cli.Exit(session.status, f"{len(failed)} failed, of {len(trials)} runs: {', '.join(failed)}; see above")


def planned_seconds(file: str, config: str) -> dict[str, float]:
    """Seconds of a step by run, as `maxsep.plan --json` has written them; of two orders of the devices the faster.

    Raises:
        ConfigError: the file is no plan of that config.
    """
    try:
        plan = json.loads(paths.named("--plan", file).read_text(encoding="utf-8"))
        planned, rows = plan["config"], [row for row in plan["layouts"] if row["error"] is None]
        seconds = {row["name"]: row["step_seconds"] for row in reversed(rows)}
    except (OSError, ValueError, KeyError, TypeError) as e:
        got = f"got {file} ({type(e).__name__}: {e})"
        raise ConfigError(f"--plan: {got}; takes a file that maxsep.plan --json has written") from e
    if planned != config:
        raise ConfigError(f"--plan: got a plan of {planned}; takes one of {config}, which the ablation trains")
    return seconds


def run(argv: list[str] | None = None) -> int:
    return cli.run(main, define, __doc__, default_config=DEFAULT, argv=argv, prepared=with_config)


def with_config(argv: list[str]) -> list[str]:
    """The command line with --config, which is always there, and --size as its argument."""
    path, others = cli.take("config", argv)
    size, _ = cli.take("size", argv)
    path = str(paths.shown(REPOSITORY / DEFAULT)) if path is None else path
    return [*others, f"--config={path}" + (f":{size}" if size else "")]


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(run())
