"""The opening of the stages that work with the recorded teacher."""

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
    """The processes of a stage, and on their device the teacher whose calls were recorded.

    Args:
        settings: seed, device, teacher.
        mixed_precision: as of a training's settings.
        gradients, compiled: as of `pipelines.load_transformer`.

    Raises:
        UserError: the teacher is not there any more or can't be loaded, or the device is not there.
    """
    accelerator = processes.accelerator(settings.device, mixed_precision)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    transformer = pipelines.load_transformer(
        teacher, accelerator.device, gradients=gradients, compiled=compiled
    )
    return Context(transformer, reader, settings.seed, accelerator)
