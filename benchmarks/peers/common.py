"""What the peers' scripts share: their flags, and how they are told to time steps.

A script builds one training step and hands it to `run`. Alone it times `--steps` steps and prints one JSON line. With
`--serve` it answers requests on standard input, each a line, with JSON lines: its facts when it is warm; to `go N` the
times of N steps (`seconds`, `other_cpu`); `quit` or the end of the input ends it. Between requests it sleeps, so that
systems can take turns on one machine.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the repository, at the end: it must shadow nothing

from maxsep.measure.timing import OtherCPU, decoding, measurement, timed

SHAPE = {  # the bench shape, configs/bench.py
    "layers": 4,
    "d_model": 256,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 32,
    "experts": 16,
    "top_k": 2,
    "d_ff": 512,
    "vocab": 8192,
    "sequence": 256,
    "batch": 16,
}


DECODE = {name: size for name, size in SHAPE.items() if name != "sequence"} | {"context": 128, "new": 64}


def flags(doc: str, shape: dict[str, int] = SHAPE) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, value in shape.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, metavar="N", help="shape")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before the first that is timed")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps, without --serve")
    parser.add_argument("--serve", action="store_true", help="take requests on standard input")
    return parser


def claim_stdout():
    """Standard output for JSON lines alone: whatever the peer prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def run(args: argparse.Namespace, out, facts: dict, step) -> None:
    """Warms up, then times.

    Args:
        args: parsed `flags`.
        out: what `claim_stdout` returned.
        facts: `system`, `version`, `devices`, `mesh` and whatever else belongs in the result.
        step: runs one training step and returns when it is done.
    """
    facts = {"task": "train", "shape": {name: getattr(args, name) for name in SHAPE}, "dtype": args.dtype} | facts
    for _ in range(args.warmup):
        step()
    if args.serve:
        serve(out, facts, lambda count: timed(step, count))
    else:
        print(json.dumps(measurement(facts, [timed(step, args.steps)])), file=out, flush=True)


def run_decode(args: argparse.Namespace, out, facts: dict, prefill, step) -> None:
    """As `run`, of decoding: `prefill` takes the prompts and returns when the first tokens are there; `step` makes one
    more token of each. A step that is asked for is `args.new` tokens of a batch."""
    facts = {"task": "decode", "shape": {name: getattr(args, name) for name in DECODE}, "dtype": args.dtype} | facts

    def turn(count: int) -> dict:
        others, firsts, seconds = OtherCPU(), [], []
        for _ in range(count):
            firsts += timed(prefill, 1)["seconds"]
            seconds += timed(step, args.new - 1)["seconds"]
        return {"prefill": firsts, "seconds": seconds, "other_cpu": others.cores()}

    turn(args.warmup)
    if args.serve:
        serve(out, facts, turn)
    else:
        print(json.dumps(decoding(facts, [turn(args.steps)])), file=out, flush=True)


def serve(out, facts: dict, turn) -> None:
    """Answers requests with what `turn` makes of a number of steps."""

    def say(line: dict) -> None:
        print(json.dumps(line), file=out, flush=True)

    say(facts)
    for line in sys.stdin:
        match line.split():
            case ["go", count]:
                say(turn(int(count)))
            case ["quit"]:
                break
            case _:
                sys.exit(f"got {line.strip()!r}; takes go N or quit")
