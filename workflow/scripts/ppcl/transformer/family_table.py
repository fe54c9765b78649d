"""The registry as Markdown, for docs/families.md."""

from ppcl.transformer.families import FAMILIES, REFUSED
from ppcl.transformer.family import Family, Width


def table() -> str:
    """The registry as Markdown: what works on which class, and what does not and why."""
    lines = [
        "| transformer class | blocks, in order of data flow | streams | width "
        "| low-rank modulation | ControlNet | limits |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, family in sorted(FAMILIES.items()):
        lists = [f"`{listed.attribute}` (`{listed.depth_key}`)" for listed in family.lists]
        streams = dict.fromkeys(", ".join(listed.inputs) for listed in family.lists)
        limits = [f"{where[0]}[{where[1]}]: {why}" for where, why in family.untouchable.items()]
        limits += [family.limits] if family.limits else []
        limits += [f"{family.fixed}: record.renoised_per_sample must be 0"] if family.fixed else []
        cells = [f"`{name}`", " + ".join(lists), "; ".join(streams)]
        cells += [_width_words(family), _modulation_words(family)]
        cells += [f"`{family.control.model}`" if family.control else "none", "; ".join(limits)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| refused | because |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in sorted(REFUSED.items())]
    return "\n".join(lines) + "\n"


def _width_words(family: Family) -> str:
    words = []
    for listed in family.lists:
        width = listed.width or Width({})
        words += [f"{stream} FFN" for stream in width.ffn]
        words += ["text runs"] if width.text else []
    return ", ".join(words) or "none"


def _modulation_words(family: Family) -> str:
    words = [f"`{path}`" for listed in family.lists for path in listed.modulations]
    words += [f"last `{family.last_modulation}`"] if family.last_modulation else []
    return ", ".join(dict.fromkeys(words)) or "none: one table serves all blocks"
