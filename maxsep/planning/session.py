"""The compilations of a plan: those that are kept are read, the others made, each in a process of its own."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from maxsep.cluster import child
from maxsep.cluster.signals import Stop
from maxsep.config import ConfigError, cli
from maxsep.planning import kept, target
from maxsep.planning.table import giga


def compile_all(
    asked: list[dict[str, Any]],
    versions: dict[str, str],
    store: kept.Kept,
    jobs: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """What `compilation.compiled` finds of each job; of one that does not compile, only an `error`.

    Args:
        asked: the jobs, as `compilation.job` makes them.
        versions: of what compiles for the cluster.
        store: what has been found before, and where the rest goes as it comes.
        jobs: how many to compile at a time.
        say: takes a line of progress.

    Raises:
        cli.Exit: a signal has stopped it.
        ConfigError: what was found cannot be kept, or there is no room to work in.
    """
    keys = [kept.key(job, versions) for job in asked]
    found = [store.read(key) for key in keys]
    missing = [at for at, facts in enumerate(found) if facts is None]
    if not missing:
        return found
    say(f"compiling {len(missing)} of {len(asked)} layouts, {jobs} at a time; stopped, the same command resumes")
    began = time.monotonic()
    # Leaving the pool waits for the processes, which `stop` ends.
    with Stop() as stop, tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        work = {pool.submit(_compile, asked[at], Path(scratch, str(at)), stop): at for at in missing}
        try:
            for done, future in enumerate(as_completed(work), 1):
                at, (facts, lasting) = work[future], future.result()
                if facts is None or (stop.asked and not lasting):
                    continue
                found[at] = facts
                if lasting:
                    store.write(keys[at], facts)
                told = facts.get("error") or f"{giga(facts['memory']['total'])} GB per device"
                say(f"[{done}/{len(missing)}, {time.monotonic() - began:.0f} s] {asked[at]['name']}: {told}")
        except BaseException:
            stop.asked = "an error"
            raise
    if stop.asked:
        raise cli.Exit(cli.STOPPED, f"{stop.asked}: stopped; the same command resumes")
    return found


def _compile(job: dict[str, Any], scratch: Path, stop: Stop) -> tuple[dict[str, Any] | None, bool]:
    """What was found, and whether it would be found again; None: it was stopped before it had begun."""
    if stop.asked:
        return None, False
    named, out, log = (scratch.with_suffix(suffix) for suffix in (".job", ".out", ".log"))
    environment = os.environ | target.ENVIRONMENT
    # Of a program from JAX's own cache XLA tells nothing.
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    command = ["-m", "maxsep.planning.compilation", str(named), str(out)]
    try:
        named.write_text(json.dumps(job), encoding="utf-8")
        status = child.run(command, log, environment, stop, shown=False)
        if status == cli.DONE:
            return json.loads(out.read_text(encoding="utf-8")), True
        return {"error": child.why(log, status)}, False
    except OSError as e:
        raise ConfigError(f"TMPDIR: cannot write in {scratch.parent}: {e.strerror or e}; takes a folder") from e
