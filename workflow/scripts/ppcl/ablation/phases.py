"""The trainings of a method, in short: which there are, how long they take, and each of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ppcl.ablation.material import Material
from ppcl.settings import AblationSettings, TrainingSettings
from ppcl.storage import tensors
from ppcl.training import loop


def steps_of(select: Mapping, train: Mapping, options: AblationSettings) -> dict[str, int]:
    """Steps of each phase of a method; their sum is the same for all, apart from those of masks.

    Masks are learned before the students are trained, in additional steps, as many as the
    any-subset phase has: no other method's selection takes steps from its training either. A staged
    schedule spends a quarter of distillation on narrow blocks, as the paper does (6000 and 2000
    steps).

    Args:
        options: the config's `ablation`.
    """
    distill, subsets = options.distill_steps, options.subsets_steps
    masks = subsets if select["by"] == "learned_masks" else 0
    if not train.get("subsets", True):
        distill, subsets = distill + subsets, 0
    if "share" in train:
        total = distill + subsets
        subsets = round(train["share"] * total)
        distill = total - subsets
    staged = train.get("schedule") == "staged" and select["by"] == "depth_and_width"
    narrow = distill // 4 if staged else 0
    return {"masks": masks, "distill": distill - narrow, "narrow": narrow, "subsets": subsets}


def train(
    material: Material,
    name: str,
    modules: Mapping[str, nn.Module],
    losses: Callable,
    options: TrainingSettings,
    scales: Mapping[str, float] | None = None,
) -> None:
    """One training, in place; what a killed run had finished is read instead.

    options: as of `stage_options`.
    """
    path = material.state.folder / f"{name}.safetensors"
    identity = f"{material.state.identity} {name}"
    if path.exists():
        state, metadata = tensors.read(path)
        if metadata["identity"] == identity:
            for key, module in modules.items():
                start = f"{key}/"
                own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
                module.load_state_dict(own)
            return
    for module in modules.values():
        module.train()
    rows = loop.train(
        modules,
        losses,
        dataclasses.replace(loop.Optimisation.from_settings(options), lr_scales=scales or {}),
        material.context.accelerator,
        path.with_name(f"{name}-checkpoint.safetensors"),
        identity,
    )
    state = {f"{key}/{k}": v for key, m in modules.items() for k, v in m.state_dict().items()}
    seconds = rows[-1]["seconds"] if rows else 0.0
    tensors.write(path, state, {"identity": identity, "seconds": repr(seconds)})


def seconds_of(material: Material, *names: str) -> float:
    """Seconds that these trainings took, of those that this run has finished, also before it was
    killed."""
    paths = [material.state.folder / f"{name}.safetensors" for name in names]
    kept = [tensors.metadata(path) for path in paths if path.exists()]
    mine = [each for each in kept if each["identity"].startswith(f"{material.state.identity} ")]
    return sum(float(each["seconds"]) for each in mine)


def stage_options(material: Material, stage: str, steps: int, **changed) -> Any:
    """Settings of a stage for a phase of the ablation: its own steps and batch_size, and, as phases
    are short, a warm-up of at most a quarter of the steps."""
    if material.ema is not None:
        changed = {"ema": material.ema, **changed}
    options = getattr(material.settings, stage).replace(**changed)
    warmup = min(options.warmup_steps, steps // 4)
    size = material.settings.ablation.batch_size
    return options.replace(steps=steps, warmup_steps=warmup, batch_size=size)
