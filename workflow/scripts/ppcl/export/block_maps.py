"""Which of the teacher's blocks each block of a pruned model stands for."""

import json
from pathlib import Path

from ppcl.errors import UserError
from ppcl.pruning import pruned_class
from ppcl.storage import untrusted


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
