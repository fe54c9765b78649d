"""A forecast as people read it: a table of text."""

import pandas as pd

from ppcl.planning import device_memory, durations


def _gib(value: float) -> str:
    return "?" if pd.isna(value) else f"{value / device_memory.GIB:,.1f}"


def of(table: pd.DataFrame) -> str:
    """The forecast for people: variants, then stages in GiB with what they fit on, then disk."""
    variants = table[table["item"] == "variant"].pivot(
        index="name", columns="measure", values="value"
    )
    lines = [f"{'variant':<24}{'blocks':>8}{'parameters':>18}{'GiB':>9}{'TFLOPs':>10}{'share':>8}"]
    for name in table[table["item"] == "variant"]["name"].unique():
        one = variants.loc[name]
        spent = "?" if pd.isna(one["flops"]) else f"{one['flops'] / 1e12:,.3f}"
        share = "?" if pd.isna(one["latency share"]) else f"{one['latency share']:.3f}"
        lines.append(
            f"{name:<24}{one['blocks']:>8.0f}{one['parameters']:>18,.0f}{_gib(one['size']):>9}"
            f"{spent:>10}{share:>8}"
        )
    gpus = sorted(table[table["item"] == "gpu"]["gpu_gib"].unique())
    heads = "".join(f"{f'{gpu:g} GiB':>12}" for gpu in gpus)
    lines += ["", f"{'peak GiB of':<14}{'resident':>10}{'offloaded':>11}{'least':>9}{heads}"]
    stages = table[table["item"] == "stage"].pivot(index="name", columns="measure", values="value")
    fits = table[table["item"] == "gpu"].set_index(["name", "gpu_gib", "measure"])["value"]
    for name in table[table["item"] == "stage"]["name"].unique():
        peaks = [_gib(stages.loc[name, f"peak {k}"]) for k in ("resident", "offloaded", "least")]
        cells = "".join(f"{_fit(fits[name][gpu]):>12}" for gpu in gpus)
        lines.append(f"{name:<14}{peaks[0]:>10}{peaks[1]:>11}{peaks[2]:>9}{cells}")
    lines += ["", f"{'on disk, at most':<40}{'GiB':>10}"]
    for row in table[table["item"] == "artifact"].itertuples():
        lines.append(f"{row.name:<40}{_gib(row.value):>10}")
    jobs = table[table["item"] == "job"].pivot(index="name", columns="measure", values="value")
    lines += ["", f"{'jobs':<14}{'hours':>10}{'limit':>9}"]
    for name in table[table["item"] == "job"]["name"].unique():
        spent = jobs.loc[name, "time"]
        limit = durations.minutes(spent) / 60
        lines.append(f"{name:<14}{spent / 3600:>10.2f}{limit:>9.2f}")
    return "\n".join(lines)


def _fit(fits: pd.Series) -> str:
    if fits.isna().any():
        return "?"
    if fits["fits resident"]:
        return "resident"
    return "offloaded" if fits["fits offloaded"] else "-"
