"""How stages that work with the recorded teacher begin."""

from ppcl.runtime import processes
from ppcl.settings import Settings
from ppcl.teacher import pipelines, teacher_identity
from ppcl.transformer import calls
from ppcl.transformer.context import Context


def opened(
    settings: Settings,
    reader: calls.Reader,
    mixed_precision: str = "no",
    gradients: bool = False,
    compiled: bool = False,
) -> Context:
    """The context of a stage: its processes and, loaded, the teacher whose calls were recorded.

    Args:
        settings: uses seed, device and teacher.
        reader: the recorded calls, whose provenance says which teacher was asked.
        mixed_precision: as in a training's settings.
        gradients, compiled: as in `pipelines.load_transformer`.

    Raises:
        UserError: that teacher is gone, changed, or can't be loaded; or there is no such device.
    """
    accelerator = processes.accelerator(settings.device, mixed_precision)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    transformer = pipelines.load_transformer(
        teacher, accelerator.device, gradients=gradients, compiled=compiled
    )
    return Context(transformer, reader, settings.seed, accelerator)
