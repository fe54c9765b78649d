"""How long the blocks take, and what removing them or making them narrow saves.

    python workflow/scripts/latency.py --config config/digits.yaml \
        --calls results/digits/record/calls.parquet --table results/digits/latency/blocks.parquet

Only needed for variants with a latency budget. One batch of recorded calls; some blocks of each
list, whole and narrow in each way, and the transformer without its blocks run in turn, round after
round, until the least time of each has settled: other work on a machine only ever adds. Blocks of
one list do the same work, so each is given the median over its list. The transformer's own time is
the sum, and all are rounded, so that a run on the same machine gives the same shares
(latencies.py). Reads of the config: seed, device, teacher, evaluate.batch_size and
evaluate.latency_repeats.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.evaluation import latencies, timing
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock
from ppcl.runtime import devices, stopping
from ppcl.storage import schemas, tables
from ppcl.teacher import pipelines, teacher_identity
from ppcl.training import teaching
from ppcl.transformer import blocks, calls
from ppcl.transformer.family import TEXT

log = logging.getLogger(__name__)


def narrow_parts(block: blocks.Block) -> dict[str, NewBlock]:
    """What of a block can go -> the new block without it."""
    here, width = (block.index, block.index), block.width
    new_blocks = {f"ffn_{stream}": NewBlock(*here, (stream,)) for stream in width.ffn}
    if width.text:
        new_blocks[TEXT] = NewBlock(*here, text="borrow", source=here)
    return new_blocks


def _sharing(module: nn.Module) -> nn.Module:
    """A copy that shares all weights: to make a block narrow only replaces what goes."""
    return copy.deepcopy(module, {id(w): w for w in [*module.parameters(), *module.buffers()]})


def blocks_by_list(sequence: Sequence[blocks.Block]) -> list[list[int]]:
    """Blocks that do the same work: those of each list."""
    lists: dict[str, list[int]] = {}
    for block in sequence:
        lists.setdefault(block.list.attribute, []).append(block.index)
    return list(lists.values())


def least_seconds(
    runs: Mapping[str, Callable[[], object]], most: int, device: torch.device, table: Path
) -> dict[str, float]:
    """The least time of each run, by name, in seconds. Warns if times still fell at the end.

    Args:
        most: number of rounds, at most.
        table: the file that the warning says to delete.
    """
    with torch.no_grad():
        seconds, settled = latencies.least_times(timing.timed_rounds(runs, most, device))
    if not settled:
        log.warning(
            "times of blocks still fell after %d rounds. If another program used the machine "
            "meanwhile, delete %s and run again: budgets of latency go by it. Else raise "
            "evaluate.latency_repeats",
            most,
            table,
        )
    return seconds


def main() -> None:
    args = program.parser(
        __doc__, "config", reads=("calls",), writes=("table",), table="latency/blocks.parquet"
    ).parse_args()
    settings = config.load(args.config)
    options = settings.evaluate

    device = devices.choose(settings.device)
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    transformer = pipelines.load_transformer(teacher, device)
    rows = reader.draw(reader.heldout_rows("select"), options.batch_size, (settings.seed,))
    arguments = reader.batch(rows).to(device).arguments
    sequence = blocks.block_sequence(transformer)
    alike = blocks_by_list(sequence)
    parts = {
        block.index: {latencies.WHOLE: NewBlock(block.index, block.index), **narrow_parts(block)}
        for block in sequence
    }
    timed = latencies.timed(parts, alike)
    # One kind after the other: right after itself, a block would find its weights in the cache.
    timed.sort(key=lambda one: one[1])
    needed = [parts[block][kind] for block, kind in timed]
    lessons = teaching.teacher_states(transformer, needed, arguments)
    runs = {"around": partial(blocks.emptied(transformer), **arguments)}
    for (block, kind), part in zip(timed, needed, strict=True):
        module = students.shaped(transformer, part, _sharing(sequence[block].module))
        runs[f"{block} {kind}"] = partial(module, **lessons[part].bound)
    most = latencies.ROUNDS * options.latency_repeats
    seconds = least_seconds(runs, most, device, args.table)
    least = {(block, kind): seconds[f"{block} {kind}"] for block, kind in timed}
    saved = latencies.savings(least, seconds["around"], parts, alike)
    table_rows = [
        {"block": block, "part": part, "seconds": value}
        for (block, part), value in sorted(saved.parts.items())
    ]
    stamp = provenance.stamp(settings.given, rows=len(rows))
    stamp["transformer_seconds"] = repr(saved.transformer)
    stopping.ignore()
    tables.write(args.table, pd.DataFrame(table_rows), schemas.LATENCY, stamp)


if __name__ == "__main__":
    program.run(main)
