"""Which of the teacher's blocks each block of a pruned model stands for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppcl.errors import UserError
from ppcl.pruning import pruned_class
from ppcl.storage import untrusted
from ppcl.transformer.family import Family


def read(folder: Path, count: int) -> list[list[int]]:
    """For every block of a pruned model, the teacher's blocks that it stands for.

    Args:
        folder: of the model (`transformer/` of an exported pipeline), which has block_map.json; or
            as `save_pretrained` of diffusers, or a download, leaves it: the config has it then.
        count: of blocks.

    Raises:
        UserError: neither has one, or it is not of `count` blocks.
    """
    path = folder / "block_map.json"
    try:
        if not path.exists() and (folder / "config.json").exists():
            path = folder / "config.json"
            block_map = untrusted.json_object(path)[pruned_class.BLOCK_MAP]
        else:
            block_map = json.loads(path.read_text(encoding="utf-8"))
        every = [block for members in block_map for block in members]
        ordered = every == [*range(len(every))] and all(block_map)
    except KeyError as error:
        raise UserError(
            f"{path} has no {error}; name the folder of a pruned pipeline, --model"
        ) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} can't be read ({error}); name the folder of a pruned pipeline, --model"
        ) from error
    if not ordered or len(block_map) != count:
        raise UserError(f"{path} is not of the {count} blocks beside it; export the model again")
    return block_map


def by_list(folder: Path, family: Family, config: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """The block map of each list of blocks, all counted within their own list.

    Args:
        folder: as for `read`.
        family: the entry of the pruned model's class.
        config: of the pruned model.

    Raises:
        UserError: as `read`, or the config does not say how many blocks the lists have.
    """
    depths: dict[str, int] = {}
    for listed in family.lists:
        depth = config.get(listed.depth_key)
        if type(depth) is not int or depth < 0:
            raise UserError(
                f"{folder / 'config.json'} does not say how many {listed.attribute} there are; "
                "export the model again"
            )
        depths[listed.attribute] = depth
    left = iter(read(folder, sum(depths.values())))
    lists = {attribute: [next(left) for _ in range(n)] for attribute, n in depths.items()}
    return {
        attribute: [[block - members[0][0] for block in each] for each in members]
        for attribute, members in lists.items()
    }
