"""Quantised transformers: made and saved by stock diffusers, from weights of full precision.

Of torchao's and bitsandbytes' weights diffusers makes .safetensors files, which it loads by the
`quantization_config` that it leaves in config.json.
"""

import importlib.metadata
import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ppcl.errors import UserError
from ppcl.pruning import quantisable
from ppcl.pruning.quantisation import METHODS
from ppcl.runtime import devices
from ppcl.teacher.weights import STEMS
from ppcl.transformer import diffusers_model


def refuse_missing(method: str | None) -> None:
    """Raises UserError if what a method needs is not here; None needs nothing."""
    if method is None:
        return
    how = METHODS[method]
    try:
        importlib.import_module(how.package)
    except ImportError as error:
        raise UserError(
            f"quantise: {method} needs the package {how.package} ({error}); install it (pip "
            f"install {how.package}=={how.version})"
        ) from error
    if how.cuda and not torch.cuda.is_available():
        raise UserError(
            f"quantise: {method} needs CUDA, as diffusers runs {how.package} there alone, and "
            "there is none here; use int8, or a machine with a GPU"
        )


def quantised(
    transformer: nn.Module, source: Path, target: Path, method: str, dtype: torch.dtype
) -> nn.Module:
    """Writes a transformer's folder with its weights quantised, and returns the model.

    Args:
        transformer: as it is without, of the class that it was saved as.
        source: its folder.
        target: where the quantised one goes; may be the same folder.
        method: a name of METHODS.
        dtype: what it computes in, and what the other weights are.

    Raises:
        UserError: the method's package is missing, or needs CUDA; the blocks have no Linears; or
            others would be quantised than are meant to.
    """
    refuse_missing(method)
    chosen = quantisable.names(transformer)
    if not chosen:
        raise UserError(
            f"quantise: the blocks of a {type(transformer).__name__} have no Linear layers that "
            f"{method} could quantise; leave quantise out"
        )
    others = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
    kept = _named(method, sorted(set(others) - set(chosen)), chosen)
    made: Any = diffusers_model.class_of(type(transformer))
    model = made.from_pretrained(
        source, quantization_config=_config(method, kept, dtype), dtype=dtype, use_safetensors=True
    )
    refuse_other(model, chosen, kept)
    for path in target.glob(f"{STEMS['diffusers']}*"):
        path.unlink()  # an index of shards would be read, and there may be none any more
    model.save_pretrained(target, safe_serialization=True)
    return cast(nn.Module, model).requires_grad_(False).eval()


def told(model: nn.Module, method: str | None) -> dict[str, Any]:
    """What the card says of a model's weights: their bytes as stored, and how they are
    quantised."""
    facts: dict[str, Any] = {"bytes": quantisable.stored_bytes(model)}
    if method is not None:
        package = METHODS[method].package
        version = importlib.metadata.version(package)
        facts |= {"quantised": method, "package": f"{package} {version}"}
    return facts


def places(model: nn.Module) -> list[str]:
    """Folder of the package that a quantised model needs, for a process that does not look where
    this one did."""
    if getattr(model, "hf_quantizer", None) is None:
        return []
    specs = (importlib.util.find_spec(name) for name in {m.package for m in METHODS.values()})
    return sorted({str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin})


def is_quantised(module: nn.Module) -> bool:
    """Whether a Linear's weight is quantised, by torchao or by bitsandbytes."""
    weight: Any = getattr(module, "weight", None)
    return len(devices.plain(weight)) > 1 or not weight.is_floating_point()


def refuse_other(model: nn.Module, chosen: Collection[str], kept: Collection[str]) -> None:
    """Raises UserError if a Linear that should be quantised is not."""
    left = [name for name in chosen if not is_quantised(model.get_submodule(name))]
    if left:
        raise UserError(
            f"quantise: {len(left)} layers, such as {left[0]}, were not quantised, though "
            f"only {len(kept)} others should be kept"
        )


def _config(method: str, kept: list[str], dtype: torch.dtype) -> object:
    """diffusers' config of a method."""
    import diffusers

    if method == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        one = Int8WeightOnlyConfig(version=2, set_inductor_config=False)
        return diffusers.TorchAoConfig(one, modules_to_not_convert=kept)
    if method == "nf4":
        four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        four["bnb_4bit_compute_dtype"] = dtype
        return diffusers.BitsAndBytesConfig(llm_int8_skip_modules=kept, **four)
    return diffusers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)


def _named(method: str, kept: list[str], chosen: Collection[str]) -> list[str]:
    """How a method's config names Linears that are kept, so that none of the others is, too.

    diffusers compares names as a part of the path: for torchao, only a weight's full name is never
    part of another one's. For bitsandbytes, what can't be told from one that is to be quantised is
    quantised (FLUX: the last projection, which has the name of one in each block).
    """
    if method == "int8":
        return [f"{name}.weight" for name in kept]
    return [name for name in kept if not any(_skips(name, other) for other in chosen)]


def _skips(key: str, path: str) -> bool:
    """Whether bitsandbytes' config would keep the Linear at a path because of this key."""
    return path.split(".")[-1] == key or f"{key}." in path or key == path
