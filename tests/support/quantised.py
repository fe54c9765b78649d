"""Quantised models, made in a process of its own: diffusers looks for torchao and bitsandbytes when
it is imported, and `make test` keeps them where other tests don't find them.

    PYTHONPATH=... python tests/support/quantised.py FOLDER
    PYTHONPATH=... python tests/support/quantised.py PIPELINE COPY

The latter quantises one pipeline to int8, without its proof. The former prints JSON: of each model
and method, what came of it. Of bitsandbytes, diffusers' check for a GPU is left out: the package
itself computes on a CPU, too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# What one is: name -> (family's specimen, or none for the embedded teacher; method).
CASES = {
    "depth int8": (None, {"merged": True}, "int8"),
    "narrow int8": (None, {"narrowed": True}, "int8"),
    "narrow nf4": (None, {"narrowed": True}, "nf4"),
    "narrow bnb-int8": (None, {"narrowed": True}, "bnb-int8"),
    "flux int8": ("flux", {}, "int8"),
    "flux nf4": ("flux", {}, "nf4"),
    "sd3 int8": ("sd3", {}, "int8"),
}


def place() -> Path:
    """The folder in which `make test` puts the packages."""
    return Path(sys.prefix) / "alone"


def environment() -> dict[str, str]:
    """Variables of a process that finds them."""
    return os.environ | {"PYTHONPATH": str(place()), "OMP_NUM_THREADS": "1"}


def copy(source: Path, target: Path) -> None:
    """Quantises a pruned pipeline of the embedded teacher, but for the proof of the folder."""
    sys.path[:0] = [str(TESTS.parent / "workflow" / "scripts")]
    from ppcl.runtime import quiet

    quiet.start()
    from diffusers import DiffusionPipeline

    from ppcl.export import assembly

    model = DiffusionPipeline.from_pretrained(source, trust_remote_code=True).transformer
    assembly.prove = lambda *_args: None
    assembly.requantise(model, source, target, "transformer", {}, "int8")


def for_the_page(workplace: Path) -> None:
    """What a page's code on quantised variants needs; skips the test without torchao."""
    import pytest

    if not (place() / "torchao").is_dir():
        pytest.skip("make test installs torchao")
    models = workplace / "results/digits/models"
    paths = [models / "p50", models / "p50-int8"]
    subprocess.run([sys.executable, __file__, *paths], env=environment(), check=True)
    for found in place().glob("torchao*"):  # Python looks in the folder that it is started in
        (workplace / found.name).symlink_to(found)


def digits_call() -> dict:
    """A call of the embedded teacher's transformer."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 64, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 8, 64, generator=generator),
        "timestep": torch.tensor([0.2, 0.7]),
        "img_shapes": [[(1, 8, 8)]] * 2,
    }


def main(folder: Path) -> None:
    sys.path[:0] = [str(TESTS.parent / "workflow" / "scripts"), str(TESTS)]
    from ppcl.runtime import quiet

    quiet.start()
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    from ppcl.export import assembly, quantising
    from ppcl.pruning import quantisable
    from ppcl.transformer import blocks
    from support import pruned, zoo_images

    for quantizer in (
        bnb_quantizer.BnB4BitDiffusersQuantizer,
        bnb_quantizer.BnB8BitDiffusersQuantizer,
    ):
        quantizer.validate_environment = lambda self, *args, **kwargs: None
        quantizer.update_device_map = lambda self, device_map: {"": "cpu"}
    quantising.refuse_missing = lambda method: None
    say = {}
    for name, (specimen, kind, method) in CASES.items():
        source = folder / name.split()[0]
        if not source.exists() and specimen is None:
            how = {"merged": pruned.MERGED} if "merged" in kind else {"narrowed": pruned.NARROW}
            pruned.folder(source, **how)
        elif not source.exists():
            zoo_images.SPECIMENS[specimen].make(2).save_pretrained(source)
        pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
        model = pipe.transformer.eval()
        chosen = quantisable.names(model)
        inventory = quantisable.inventory(model, chosen)
        target = folder / name.replace(" ", "-")
        target.mkdir()
        made = quantising.quantised(model, source / "transformer", target, method, torch.float32)
        again = type(model).from_pretrained(target, dtype=torch.float32, use_safetensors=True)
        other = {
            path
            for path, module in made.named_modules()
            if isinstance(module, torch.nn.Linear) and quantising.is_quantised(module)
        }
        say[name] = {
            "others": sorted(other - set(chosen)),
            "inventory": inventory.stored(method),
            "matrices": inventory.matrices,
            "before": inventory.stored(None),
            "stored": quantisable.stored_bytes(made),
            "parameters": [blocks.parameter_count(model), blocks.parameter_count(made)],
            "same": assembly.reload_gate.digests(made) == assembly.reload_gate.digests(again),
            "files": sorted(file.name for file in target.iterdir()),
        }
        if specimen is None:
            with torch.no_grad():
                wanted, given = (blocks.answer(each, digits_call()) for each in (model, made))
            say[name]["error"] = float((given - wanted).norm() / wanted.norm())
    print(json.dumps(say))


if __name__ == "__main__":
    {1: main, 2: copy}[len(sys.argv) - 1](*map(Path, sys.argv[1:]))
