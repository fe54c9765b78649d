"""Whether a transformer does what the registry claims of its class, on one of its real calls."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ppcl.errors import UserError
from ppcl.transformer import blocks
from ppcl.transformer.blocks import Block, Streams


@torch.no_grad()
def verify(transformer: nn.Module, arguments: dict[str, Any]) -> None:
    """Checks the registry's claims on one real call. Every stream that a block returns must reach
    the next block of its list unchanged, bit by bit at real tokens. All other tensors that a block
    gets must be the same for all blocks of its list.

    Args:
        arguments: of the transformer's call, by name.

    Raises:
        UserError: a stream is missing, changes its shape, or is not where the registry says in what
            the block returns; or a block gets another tensor as an argument than the first block of
            its list: after pruning, a block would get the tensor that is meant for another.
    """
    returned: Streams = {}
    others: dict[str, dict[str, Any]] = {}
    name, of = type(transformer).__name__, blocks.family(transformer)
    firsts = {block_list.attribute for block_list in of.lists}

    def before(block: Block, bound: dict[str, Any]) -> None:
        streams = block.inputs(bound)
        if missing := set(block.list.inputs) - set(streams):
            raise UserError(f"{name}: block {block.index} got no {missing.pop()} stream")
        rest = {k: v for k, v in bound.items() if k not in block.list.inputs.values()}
        before_it = others.setdefault(block.list.attribute, rest)
        for argument, (one, other) in _pairs(before_it, rest).items():
            if not _same(one, other):
                raise UserError(
                    f"{name}: block {block.index} gets another '{argument}' than the first of its "
                    "list; blocks that get something of their own can't be removed"
                )
        if block.list.attribute in firsts:
            firsts.discard(block.list.attribute)
            return
        masks = blocks.token_masks(of, arguments, streams)
        for stream, value in streams.items():
            before = returned.get(stream)
            same = before is not None and before.shape == value.shape
            if before is not None and same and stream in masks:
                value, before = value[masks[stream]], before[masks[stream]]
            if before is None or not same or not torch.equal(value, before):
                raise UserError(
                    f"{name}: block {block.index - 1} does not return its {stream} stream "
                    "where the family registry says (workflow/scripts/ppcl/transformer/families.py)"
                )

    with blocks.watch(
        blocks.block_sequence(transformer), before, lambda _block, streams: returned.update(streams)
    ) as run:
        run(transformer, arguments)


def _pairs(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (one.get(name), other.get(name)) for name in {*one, *other}}


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments hold equal tensors; what is no tensor counts as equal."""
    ones, others = (
        [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in (one, other)
    )
    return len(ones) == len(others) and all(map(torch.equal, ones, others))
