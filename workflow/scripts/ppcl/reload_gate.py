"""Run in a fresh process by `assembly.prove`: loads a folder with diffusers alone and checks it.

It imports nothing of this package, so that what it proves holds on a machine without it. Only a
transformer that model_index.json does not name as diffusers' own is loaded with its code.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from safetensors import safe_open


def filled(skeleton, file):
    """The arguments of a call, from their skeleton and the file of their tensors."""
    if isinstance(skeleton, list):
        return [filled(item, file) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if "tensor" in skeleton:
        return file.get_tensor(skeleton["tensor"])
    if "tuple" in skeleton:
        return tuple(filled(item, file) for item in skeleton["tuple"])
    return {key: filled(item, file) for key, item in skeleton["mapping"].items()}


def check(folder: Path, probe: Path) -> list[str]:
    """What is wrong with a pipeline's folder; nothing if it answers a call as it should.

    Args:
        probe: the call, the expected answer, and which component and dtype they are of.
    """
    with safe_open(probe, framework="pt") as file:
        about = file.metadata()
        call = filled(json.loads(about["arguments"]), file)
        expected = file.get_tensor("expected")
    component, dtype = about["component"], getattr(torch, about["dtype"])
    index = json.loads((folder / "model_index.json").read_text())
    trusted = index[component][0] != "diffusers"
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trusted
    )
    transformer = getattr(pipe, component).to(dtype).eval()
    del pipe  # large models should not be in memory twice with all that is beside them
    problems = [f"on meta: {n}" for n, p in transformer.named_parameters() if p.is_meta]
    info = type(transformer).from_pretrained(
        folder, subfolder=component, dtype=dtype, output_loading_info=True
    )[1]
    problems += [f"{kind}: {found}" for kind, found in info.items() if found]
    if problems:
        return problems
    with torch.no_grad():
        answer = transformer(**call)[0]
    if not isinstance(answer, torch.Tensor):  # some answer with a list, one tensor per sample
        answer = torch.stack(list(answer))
    # Where weights lie in memory decides the order of some sums, so the last bits may differ.
    allowed = 64 * torch.finfo(dtype).eps * expected.abs().max().item()
    difference = (answer - expected).abs().max().item()
    if not difference <= allowed:
        problems.append(
            f"answers differ by up to {difference:.3g}, rounding explains {allowed:.3g}"
        )
    return problems


if __name__ == "__main__":
    sys.exit("\n".join(check(Path(sys.argv[1]), Path(sys.argv[2]))) or 0)
