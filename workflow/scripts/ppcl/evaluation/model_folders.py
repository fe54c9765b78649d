"""Models under evaluation: the teacher and its variants, each a complete pipeline folder.

All are loaded as stock diffusers loads them.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ppcl import provenance
from ppcl.errors import UserError
from ppcl.evaluation import metrics
from ppcl.export import assembly
from ppcl.runtime import devices
from ppcl.settings import TeacherSettings
from ppcl.teacher import hub, pipelines, teacher_identity


@dataclass(frozen=True)
class Model:
    """A pipeline under evaluation: its name in the tables, and how to load it."""

    name: str
    source: TeacherSettings

    @property
    def key(self) -> str:
        """What names the model's folder in messages."""
        return "teacher.path" if self.name == metrics.TEACHER else f"variant {self.name}"

    def digest(self) -> str:
        """Changes when a file of the model's folder does (by size and time; weights are large)."""
        return provenance.digest(
            [dataclasses.asdict(self.source), teacher_identity.stamp(self.source)]
        )

    def pipeline(self, device: torch.device) -> DiffusionPipeline:
        """The whole pipeline. Raises UserError if it can't be loaded."""
        return pipelines.load(self.source, device, key=self.key)

    def transformer(self, device: torch.device) -> nn.Module:
        """The transformer alone. Raises UserError if it can't be loaded."""
        return pipelines.load_transformer(self.source, device, key=self.key)


def models(teacher: TeacherSettings, folders: list[Path]) -> list[Model]:
    """The teacher, then one model per folder, named after it.

    Raises:
        UserError: a folder is not a pipeline, or two have one name.
    """
    models = [Model(metrics.TEACHER, teacher)]
    for folder in folders:
        if not (folder / "model_index.json").is_file():
            raise UserError(f"--models: {folder} is not a pipeline folder; run assemble first")
        assembly.verify(folder)
        if folder.name in {model.name for model in models}:
            raise UserError(f"--models: two models are named '{folder.name}'; rename the folder")
        trusted = assembly.may_run(folder, hub.component(teacher), teacher.trust_remote_code)
        source = teacher.replace(
            path=str(folder),
            revision=None,
            variant=None,
            subfolder=None,
            trust_remote_code=trusted,
            fingerprint=None,  # which is the teacher's, as are those below, which exports hold
            loras=(),
            scheduler={},
        )
        models.append(Model(folder.name, source))
    return models


def refuse_changed(models: list[Model], digests: list[str]) -> None:
    """Raises UserError if a model's folder is not what it was when these digests were taken.

    Another run of the same config may delete its files one by one, and a pipeline loads without
    some of them.
    """
    for model, digest in zip(models, digests, strict=True):
        if model.digest() != digest:
            raise UserError(
                f"{model.key}: {model.source.path} was changed while it was evaluated; see that "
                "nothing else works on these results, and rerun"
            )


def side_by_side(models: list[Model], device: torch.device) -> list[Model]:
    """The models, to be on the device at once: where teacher.offload is auto, all their
    transformers stay there or all are streamed, so that times compare."""
    if models[0].source.offload != "auto":
        return models
    sizes = {model.name: pipelines.transformer_size(model.source) for model in models}
    how = "none" if devices.offload("auto", sizes, device) == "none" else "stream"
    return [Model(model.name, model.source.replace(offload=how)) for model in models]


def broken(name: str, what: str) -> UserError:
    """The error of a model that gives NaN or infinity; what: its output that holds them."""
    return UserError(
        f"variant '{name}': {what} holds NaN or infinity; its weights are numerically broken "
        "in this dtype: try teacher.dtype float32, or a lower learning rate for its training"
    )
