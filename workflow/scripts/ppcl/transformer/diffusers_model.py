"""What every transformer has as a model of diffusers, which torch's Module does not tell a type
checker: those here are Modules, as are the blocks and the models in their place.
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
    """A transformer's class, likewise."""
    return cast(type[DiffusersModel], made_by)


def of(transformer: nn.Module) -> DiffusersModel:
    """A transformer, as what it is beside a Module."""
    return cast(DiffusersModel, transformer)
