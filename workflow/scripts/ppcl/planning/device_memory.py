"""What a stage of the run needs on one device, in bytes.

What only a device knows (its context, fragmentation) is left to `RESERVED`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ppcl.planning.planner import Planner

GIB = 1 << 30
# Bytes of every GPU for its context, and for what the allocator can't use.
RESERVED = 1 * GIB


@dataclass
class Stage:
    """What a stage needs on one device.

    Attributes:
        parts: bytes by what they are for; None where they can't be told.
        resident: peak bytes with the whole teacher on the device; None if unknown.
        offloaded: with one block of the teacher at a time there (teacher.offload: stream), if the
            stage can run so.
        least: as `offloaded`, with gradient_checkpointing and optimizer: adamw8bit, too.
        note: what the numbers rest on.
    """

    name: str
    parts: dict[str, float | None]
    resident: float | None
    offloaded: float | None
    least: float | None
    note: str = ""

    def fits(self, gib: float, offloaded: bool) -> bool | None:
        """Whether a GPU of this size is enough; None if unknown."""
        peak = self.offloaded if offloaded else self.resident
        return None if peak is None else peak + RESERVED <= gib * GIB


def of_parts(
    planner: Planner,
    name: str,
    parts: Mapping[str, float | None],
    beside: float | None,
    least: float | None = None,
    note: str = "",
) -> Stage:
    """A stage with the teacher on the device.

    Args:
        parts: bytes by what they are for, the teacher's aside.
        beside, least: peak bytes beside the teacher's, as configured and with all savings; None if
            they can't be told.
    """
    every = {"teacher": planner.weights, "teacher offloaded": planner.offloaded, **parts}
    if beside is None:
        return Stage(name, every, None, None, None, note)
    least = beside if least is None else least
    return Stage(
        name,
        every,
        planner.weights + beside,
        planner.offloaded + beside,
        planner.offloaded + least,
        note,
    )
