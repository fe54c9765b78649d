"""How each method of the ablation chooses what goes: `SELECTIONS`, which `methods` names."""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from ppcl.ablation import learned_masks, own_selections, rivals
from ppcl.ablation.material import Chosen, Material, blocks_to_remove
from ppcl.ablation.rivals import Starts

# Groups of Amber-Image's scores. For TinyFusion's masks: blocks in a local group, rank of the
# update that is learned beside the masks, and the learning rate.
TIMESTEP_GROUPS, LOCAL_GROUP, RANK, MASKS_LR = 4, 4, 8, 0.01


def choose(material: Material, select: Mapping) -> Chosen:
    """What a method removes. Raises UserError if so much can't go."""
    fraction = material.settings.ablation.removed_fraction
    removed = blocks_to_remove(material.transformer, fraction)
    options = {key: value for key, value in select.items() if key != "by"}
    chosen = SELECTIONS[select["by"]](material, removed, **options)
    return chosen if isinstance(chosen, Chosen) else Chosen(chosen)


def _deleting(gone: Callable[[Material, int], Collection[int]]) -> Callable:
    return lambda material, removed: rivals.merged(gone(material, removed), material.runs)


def _by_score(score: Callable[[Material], np.ndarray]) -> Callable:
    return _deleting(lambda m, removed: rivals.lowest(score(m), removed, m.runs))


def _skipped(m: Material, groups: list[np.ndarray]) -> np.ndarray:
    """rivals.skip_errors on groups of rows."""
    size, state = m.settings.sensitivity.batch_size, m.state.within("skipped")
    return rivals.skip_errors(m.context, m.runs, groups, size, state)


def _over_timesteps(m: Material, removed: int) -> Starts:
    """Amber-Image: blocks that go by their score, and local averaging of an interval's weights."""
    reader = m.context.reader
    levels = len(np.unique(reader.index["timestep"][m.judged]))
    groups = rivals.timestep_groups(reader, m.judged, min(TIMESTEP_GROUPS, levels))
    scores = rivals.over_timesteps(_skipped(m, groups))
    gone = rivals.lowest(scores, removed, m.runs)
    return dict.fromkeys(rivals.merged(gone, m.runs), "average")


def _learned_masks(m: Material, removed: int) -> list[int]:
    options = m.settings.subsets.replace(
        batch_size=m.settings.ablation.batch_size,
        steps=m.steps["masks"],
        warmup_steps=0,
        lr=MASKS_LR,
    )
    groups = learned_masks.local_groups(removed, m.runs, LOCAL_GROUP)
    return m.once(
        "masks", lambda: learned_masks.learned_masks(m.context, groups, RANK, options, m.state)
    )


SELECTIONS: dict[str, Callable[..., Chosen | Starts]] = {
    "nothing": lambda m, removed: {},
    "ppcl": own_selections.ppcl,
    "depth_and_width": own_selections.depth_and_width,
    "every_nth": _deleting(lambda m, removed: rivals.every_nth(removed, m.runs)),
    "random_blocks": _deleting(
        lambda m, removed: rivals.random_blocks(removed, m.runs, m.context.seed)
    ),
    "random_run": lambda m, removed: rivals.random_run(removed, m.runs, m.context.seed),
    "block_influence": _by_score(lambda m: rivals.block_influence(m.tokens, m.streams)),
    "cka_change": _by_score(
        lambda m: rivals.cka_change(m.tokens, m.streams, m.settings.similarity.estimator)
    ),
    "one_out": _by_score(lambda m: _skipped(m, [m.judged])[0]),
    "over_timesteps": _over_timesteps,
    "learned_masks": _deleting(_learned_masks),
    "streamline": lambda m, removed: rivals.streamline(m.tokens, m.streams, removed, m.runs),
    "cka_threshold": lambda m, removed: rivals.cka_threshold(
        own_selections.similarities(m, {})[0], removed, m.runs
    ),
}
