"""Run in a fresh process by `assembly.prove`: loads a folder with diffusers alone and checks it.

It imports nothing of this package, so that what it proves holds on a machine without it. Code in
the folder runs only if the probe file, which `assembly.prove` writes, says that it may.
"""

import gc
import hashlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # A third of this process's time would go into looking for garbage among what it imports, and
    # again when it ends.
    gc.set_threshold(1_000_000)

import torch
from safetensors import safe_open
from torch.utils._pytree import tree_map


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


def digests(module: torch.nn.Module) -> dict[str, str]:
    """Name of every weight -> its type, shape and SHA-256 digest, as one text."""
    weight_digests = {}
    for name, tensor in module.state_dict().items():
        content = hashlib.sha256()
        for part in parts_of(tensor):
            flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            content.update(flat.numpy().data)
        weight_digests[name] = f"{tensor.dtype} {tuple(tensor.shape)} {content.hexdigest()}"
    return weight_digests


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor consists of: itself, or, of a quantised one of torchao, its integers and
    scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def check(folder: Path, probe: Path) -> list[str]:
    """Problems of a pipeline's folder; none if its weights are those that were written, and it
    answers a call as expected.

    Args:
        probe: a file with the call and the expected answer; in its metadata the component, its
            dtype and digests of its weights, whether the folder's code may run, and which
            components are loaded without weights.
    """
    import diffusers  # here, since callers of `digests` do without it
    import transformers

    with safe_open(probe, framework="pt") as file:
        about = file.metadata()
        call = filled(json.loads(about["arguments"]), file)
        expected = file.get_tensor("expected").double()
    component, dtype = about["component"], getattr(torch, about["dtype"])
    index = json.loads((folder / "model_index.json").read_text())
    light = {
        name: getattr(transformers, index[name][1]).from_pretrained(
            folder / name, dtype=dtype, device_map="meta", use_safetensors=True
        )
        for name in json.loads(about["light"])
        if index[name][0] == "transformers"
    }
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=json.loads(about["trusted"]),
        use_safetensors=True,
        **light,
    )
    transformer = getattr(pipe, component).eval()
    del pipe  # large models should not be in memory twice with all that is beside them
    gc.collect()
    problems = [f"on meta: {n}" for n, p in transformer.named_parameters() if p.is_meta]
    if problems:
        return problems
    place = next(transformer.parameters()).device  # some quantised ones run on CUDA alone
    call = tree_map(lambda v: v.to(place) if isinstance(v, torch.Tensor) else v, call)
    loaded, written = digests(transformer), json.loads(about["weights"])
    problems += [
        f"weights differ: {name}"
        for name in {*loaded, *written}
        if loaded.get(name) != written.get(name)
    ]
    with torch.no_grad():
        answer = transformer(**call)[0]
    if not isinstance(answer, torch.Tensor):  # some answer with a list, one tensor per sample
        answer = torch.stack(list(answer))
    answer = answer.cpu()
    # Where weights lie in memory decides the order of some sums, so the last bits may differ.
    allowed = 4 * torch.finfo(dtype).eps
    difference, norm = (answer.double() - expected).norm().item(), expected.norm().item()
    if not difference <= max(allowed, 1e-5) * norm:  # if zeros are expected, only zeros pass
        problems.append(f"answers differ by {difference:.3g}, their norm is {norm:.3g}")
    made_by = type(transformer)
    del transformer
    info = made_by.from_pretrained(
        folder, subfolder=component, dtype=dtype, output_loading_info=True
    )[1]
    return problems + [f"{kind}: {wrong}" for kind, wrong in info.items() if wrong]


if __name__ == "__main__":
    # Where packages are that quantised weights need, if that is nowhere usual.
    sys.path.extend(sys.argv[3:])
    problems = check(Path(sys.argv[1]), Path(sys.argv[2]))
    gc.freeze()
    sys.exit("\n".join(problems) or 0)
