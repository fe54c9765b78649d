"""How a whole variant is made ready to be trained."""

from accelerate import Accelerator
from torch import nn

from ppcl.settings import FinetuneSettings
from ppcl.training import fsdp
from ppcl.transformer import blocks, diffusers_model


def trainable(model: nn.Module, options: FinetuneSettings, accelerator: Accelerator) -> nn.Module:
    """The model in float32 with gradients, on the device or shared out over the processes."""
    shared_out = options.sharding == "fsdp" and (
        accelerator.num_processes > 1 or options.cpu_offload
    )
    if not shared_out:  # first, so that main memory need not hold it in float32
        model.to(accelerator.device)
    # In evaluation mode, as the teacher was: some classes answer in another shape in training.
    model = model.float().eval().requires_grad_(True)
    if options.gradient_checkpointing:
        diffusers_model.of(model).enable_gradient_checkpointing()
    if shared_out:
        every = [block.module for block in blocks.block_sequence(model)]
        fsdp.shard(model, every, accelerator, options.cpu_offload)
    return model
