"""What every transformer has as a diffusers model, for the type checker: functions here pass
transformers around as torch Modules, whose type does not have these members.
"""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn


class DiffusersModel(Protocol):
    """Some of diffusers' ModelMixin and ConfigMixin."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def register_to_config(self, **changes: Any) -> None: ...

    def enable_gradient_checkpointing(self) -> None: ...

    def disable_gradient_checkpointing(self) -> None: ...

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> nn.Module: ...


def class_of(made_by: type[nn.Module]) -> type[DiffusersModel]:
    """A transformer's class, typed as the class of a diffusers model."""
    return cast(type[DiffusersModel], made_by)


def of(transformer: nn.Module) -> DiffusersModel:
    """A transformer, typed as a diffusers model."""
    return cast(DiffusersModel, transformer)
