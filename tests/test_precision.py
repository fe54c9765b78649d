"""A teacher in bfloat16, and training in mixed precision, through the programs that train."""

import json

import pandas as pd
import pytest
import tiny
import torch
from diffusers import QwenImageTransformer2DModel

from ppcl import schemas, tables, tensors


@pytest.mark.parametrize(
    ("dtype", "mixed", "mode"),
    [
        ("bfloat16", "no", "independent"),
        ("bfloat16", "bf16", "sequential"),
        ("float32", "bf16", "independent"),
        ("bfloat16", "no", "sequential"),
    ],
)
def test_from_record_to_assemble(tiny_teacher, tmp_path, dtype, mixed, mode):
    (tmp_path / "prompts.txt").write_text("a red 1 on blue\na blue 2 on red\n")
    how = {"batch_size": 2, "mixed_precision": mixed, "gradient_checkpointing": True, "lr": 0.001}
    settings = {
        "seed": 0,
        "device": "cpu",
        "teacher": {"path": str(tiny_teacher), "dtype": dtype},
        "pipeline": tiny.SETTINGS,
        "record": {
            "prompts": str(tmp_path / "prompts.txt"),
            "samples": 2,
            "renoised_per_sample": 1,
            "heldout_fraction": 0.5,
        },
        "prune": {"start": "average"},
        "distill": how | {"steps": 2, "heldout_rows": 4, "mode": mode},
        "subsets": how | {"steps": 2, "heldout_rows": 4},
        "finetune": how,
        "variants": [{"name": "p70", "budget": 0.7, "finetune_steps": 2}],
    }
    calls, plan, state = tmp_path / "calls.parquet", tmp_path / "plan.json", tmp_path / "state"
    tiny.stage("record", settings, calls=calls, state=state)
    found = pd.DataFrame({"first": [0, 3], "last": [1, 4], "removed_blocks": 1, "cka": 0.9})
    found = found.assign(selected=True, reason="test", source="trend", cost=0.1, tolerance=0.0)
    chosen = tmp_path / "intervals.parquet"
    tables.write(chosen, found[schemas.INTERVALS.names], schemas.INTERVALS, {})
    start, alone = tmp_path / "start.safetensors", tmp_path / "distilled.safetensors"
    trained = tmp_path / "students.safetensors"
    tiny.stage("prune", settings, intervals=chosen, plan=plan, students=start)
    errors, log = tmp_path / "errors.parquet", tmp_path / "log.parquet"
    both = {"calls": calls, "plan": plan, "state": state, "log_table": log, "errors": errors}
    tiny.stage("distill", settings, **both, students=start, output=alone)
    tiny.stage("subsets", settings, **both, students=alone, output=trained)
    assert all(t.dtype == torch.float32 for t in tensors.read(trained)[0].values())
    assert trained.read_bytes() != alone.read_bytes()
    common = {"variant": "p70", "calls": calls, "plan": plan, "students": trained, "errors": errors}
    tuned = tmp_path / "p70.safetensors"
    tiny.stage("finetune", settings, **common, state=state, output=tuned, log_table=log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppcl.assembly.prove", lambda *_: None)  # test_assembly has the reload gate
        tiny.stage("assemble", settings, **common, finetuned=tuned, output=tmp_path / "p70")
    made = QwenImageTransformer2DModel.from_pretrained(
        tmp_path / "p70", subfolder="transformer", dtype=getattr(torch, dtype)
    )
    weights = tensors.read(tuned)[0]
    for name, value in made.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype)), name
    assert len(made.transformer_blocks) == 3
    card = json.loads((tmp_path / "p70" / "pruning.json").read_text())
    assert card["finetuned"] and len(card["intervals"]) == 2
