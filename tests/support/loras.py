"""LoRA files of stock pipelines, random ones: wiring only."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

ATTENTION = ("to_q", "to_k", "to_v")


def save(
    pipe: DiffusionPipeline,
    path: Path,
    targets: tuple[str, ...] = ATTENTION,
    component: str = "transformer",
    seed: int = 0,
    **config,
) -> Path:
    """Writes a random LoRA of a pipeline's transformer as diffusers' own training scripts do.

    config: further arguments of LoraConfig, such as use_dora.
    """
    torch.manual_seed(seed)
    model = getattr(pipe, component)
    _add(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **config))
    path.parent.mkdir(parents=True, exist_ok=True)
    type(pipe).save_lora_weights(
        path.parent,
        transformer_lora_layers=get_peft_model_state_dict(model),
        weight_name=path.name,
        **_collate_lora_metadata({"transformer": model}),
    )
    model.delete_adapters("default")
    model.unload_lora()
    return path


def save_with_text_encoders(pipe: DiffusionPipeline, path: Path, names: tuple[str, ...]) -> Path:
    """Writes a random LoRA of the transformer and of text encoders, as diffusers' training scripts
    that train both do."""
    torch.manual_seed(0)
    layers = {}
    for name in ("transformer", *names):
        model = getattr(pipe, name)
        targets = ATTENTION if name == "transformer" else ("q_proj", "out_proj", "fc1")
        _add(model, LoraConfig(r=4, lora_alpha=4, target_modules=list(targets)))
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
    type(pipe).save_lora_weights(path.parent, weight_name=path.name, **layers)
    return path


@torch.no_grad()
def _add(model: torch.nn.Module, config: LoraConfig) -> None:
    model.add_adapter(config, adapter_name="default")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
        elif "magnitude" in name:
            parameter.mul_(1.1)
