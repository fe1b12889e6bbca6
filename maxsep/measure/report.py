"""Measurements as tables, for people."""

QUIET = 0.1  # cores that other processes may keep busy


def train(results: list[dict]) -> str:
    """The figures as a table."""
    ours = results[0]
    lines = [f"\npeak: {ours['peak_flops'] / 1e9:,.0f} GFLOP/s in matrix products on these devices\n"]
    rows = [("system", "devices", "median s", "p10-p90", "fastest", "tokens/s", "of peak", "x maxsep", "other cores")]
    for result in results:
        if "error" in result:
            rows.append((result["system"], result["error"]))
            continue
        mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
        others = result["other_cpu"]
        rows.append(
            (
                result["system"],
                f"{result['devices']}" + (f" ({mesh})" if mesh else ""),
                f"{result['median_seconds']:.4f}",
                f"{result['p10_seconds']:.4f}-{result['p90_seconds']:.4f}",
                f"{result['min_seconds']:.4f}",
                f"{result['tokens_per_second']:,.0f}",
                f"{result['peak_share']:.1%}",
                f"{result['median_seconds'] / ours['median_seconds']:.2f}",
                "?" if others is None else f"{others:.2f}",
            )
        )
    lines += columns(rows)
    if ours.get("memory"):
        lines += [
            "",
            "MB per device, by the compiler: " + ", ".join(f"{k} {v / 1e6:.1f}" for k, v in ours["memory"].items()),
        ]
    if any((result.get("other_cpu") or 0) > QUIET for result in results):
        lines += ["", f"warning: other processes kept more than {QUIET} cores busy; these figures say little"]
    if "parts" in ours:
        shares = [(part, f"{share:.1%}") for part, share in ours["parts"].items()]
        lines += ["", *columns([("part of the step", "share"), *shares])]
        if any(part.startswith("communication") for part in ours["parts"]):
            lines += ["communication includes waiting for other devices"]
    return "\n".join(lines)


def growth(results: list[dict]) -> str:
    """The median of each system at each point, and the share of the peak that ours reaches."""
    systems = list(dict.fromkeys(result["system"] for result in results))
    rows = [("series", "value", *(f"{system} s" for system in systems), "tokens/s", "of peak", "temporaries MB")]
    points: dict[tuple, dict] = {}
    for result in results:
        points.setdefault((result["series"], result["value"]), {})[result["system"]] = result
    for (series, value), found in points.items():
        ours = found["maxsep"]
        times = ("-" if "error" in found[system] else f"{found[system]['median_seconds']:.3f}" for system in systems)
        more = f"{ours['tokens_per_second']:,.0f}", f"{ours['peak_share']:.1%}"
        rows.append((series, str(value), *times, *more, f"{ours['memory']['temporaries'] / 1e6:,.0f}"))
    errors = dict.fromkeys(f"{result['system']}: {result['error']}" for result in results if "error" in result)
    return "\n".join(["", *columns(rows), *(["", *errors] if errors else [])])


def decode(results: list[dict]) -> str:
    """The figures of decoding as a table."""
    rows = [
        (
            "system",
            "batch",
            "context",
            "TTFT ms",
            "TPOT ms",
            "p50",
            "p99",
            "tokens/s",
            "per device",
            "of floor",
            "cores",
        )
    ]
    for result in results:
        if "error" in result:
            rows.append((result["system"], result["error"]))
            continue
        shape, tpot, others = result["shape"], result["tpot_seconds"], result["other_cpu"]
        rows.append(
            (
                result["system"],
                str(shape["batch"]),
                str(shape["context"]),
                f"{result['ttft_seconds']['p50'] * 1e3:,.1f}",
                *(f"{tpot[name] * 1e3:.2f}" for name in ("mean", "p50", "p99")),
                f"{result['tokens_per_second']:,.1f}",
                f"{result['tokens_per_second_per_device']:,.1f}",
                f"{result['floor_share']:.0%}",
                "?" if others is None else f"{others:.2f}",
            )
        )
    lines = [
        "",
        *columns(rows),
        "",
        "of floor: the time to read weights and cache over TPOT (p50); cores: other processes'",
    ]
    return "\n".join(lines)


def experts(results: list[dict]) -> str:
    """Milliseconds of a layer's experts in each form; the chosen one is marked."""
    names = list(results[0]["seconds"])
    rows = [("experts, ms in blocks of", "rows", *names)]
    for result in results:
        cells = (
            f"{seconds * 1e3:.3f}{'*' if name == result['chosen'] else ' '}"
            for name, seconds in result["seconds"].items()
        )
        rows.append((f"batch {result['batch']}", str(result["rows"]), *cells))
    return "\n".join(["", *columns(rows), "", "*: chosen"])


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned lines, the first column to the left; a row shorter than the first is not aligned past its first cell."""
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    lines = []
    for name, *cells in rows:
        aligned = len(cells) + 1 == len(rows[0])
        cells = [f"{cell:>{width}}" if aligned else cell for cell, width in zip(cells, widths[1:], strict=False)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *cells]))
    return lines
