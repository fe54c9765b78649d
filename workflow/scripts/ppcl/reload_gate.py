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

folder, probe = Path(sys.argv[1]), Path(sys.argv[2])
index = json.loads((folder / "model_index.json").read_text())
trusted = index["transformer"][0] != "diffusers"
pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=trusted)
_, info = type(pipe.transformer).from_pretrained(
    folder, subfolder="transformer", output_loading_info=True
)
problems = [f"{kind}: {found}" for kind, found in info.items() if found]
problems += [f"on meta: {n}" for n, p in pipe.transformer.named_parameters() if p.is_meta]
if not problems:
    with safe_open(probe, framework="pt") as file:
        call = {name: file.get_tensor(name) for name in file.keys()}
        call |= json.loads(file.metadata()["arguments"])
    expected = call.pop("expected")
    transformer = pipe.transformer.to(expected.dtype).eval()
    with torch.no_grad():
        answer = transformer(**call)[0]
    if not torch.equal(answer, expected):
        problems.append(f"answers differ by up to {(answer - expected).abs().max().item():.3g}")
sys.exit("\n".join(problems) if problems else 0)
