"""A teacher in bfloat16, and training in mixed precision, through the programs that train; with
depth alone, and with narrow blocks in either schedule."""

import json

import pytest
import torch

from ppcl.pruning import selection_file
from ppcl.storage import tensors
from ppcl.teacher import pipelines
from support import tiny


@pytest.mark.parametrize(
    ("dtype", "mixed", "mode", "schedule"),
    [
        ("bfloat16", "no", "independent", "staged"),
        ("bfloat16", "bf16", "sequential", "joint"),
        ("float32", "bf16", "independent", "joint"),
        ("bfloat16", "no", "sequential", None),
    ],
)
def test_from_record_to_assemble(tiny_teacher, tmp_path, dtype, mixed, mode, schedule):
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
        "intervals": {},
        "modulation": {},
        "prune": {"start": "average"},
        "width": {"schedule": schedule or "joint", "steps": 2, "fit_rows": 4, "batch_size": 2},
        "distill": how | {"steps": 2, "heldout_rows": 4, "mode": mode},
        "subsets": how | {"steps": 2, "heldout_rows": 4},
        "finetune": how,
        "variants": [{"name": "p70", "budget": {"blocks": 3}, "finetune_steps": 2}],
    }
    calls, selection, state = (
        tmp_path / "calls.parquet",
        tmp_path / "selection.json",
        tmp_path / "state",
    )
    facts = tmp_path / "block-facts.parquet"
    with pytest.MonkeyPatch.context() as patch:
        proven = []  # test_assembly has the reload gate
        patch.setattr("ppcl.export.assembly.prove", lambda *given: proven.append(given))
        tiny.stage("record", settings, calls=calls, block_facts=facts, state=state)
        assert len(proven) == 1
    start, alone = tmp_path / "start.safetensors", tmp_path / "distilled.safetensors"
    trained = tmp_path / "students.safetensors"
    chosen = {"intervals": tiny.intervals(tmp_path / "i.parquet", [(0, 1), (3, 4)])}
    if schedule:  # a student borrows its text from a kept block, another has a linear FFN
        chosen["candidates"] = tiny.candidates(tmp_path / "w.parquet", [(2, 4)], [(0, "image")])
    tiny.stage("prune", settings, **chosen, calls=calls, selection=selection, students=start)
    errors, log = tmp_path / "unit_costs.parquet", tmp_path / "log.parquet"
    both = {
        "calls": calls,
        "selection": selection,
        "state": state,
        "log_table": log,
        "unit_costs": errors,
    }
    tiny.stage("distill", settings, **both, students=start, output=alone)
    if schedule == "staged":
        whole, alone = alone, tmp_path / "narrow.safetensors"
        tiny.stage("narrow", settings, **both, students=whole, output=alone)
    tiny.stage("subsets", settings, **both, students=alone, output=trained)
    assert all(t.dtype == torch.float32 for t in tensors.read(trained)[0].values())
    assert trained.read_bytes() != alone.read_bytes()
    sets = tiny.chosen(tmp_path / "sets.json", selection, "subsets")
    common = {"variant": "p70", "calls": calls, "sets": sets, "subsets": trained}
    tuned = tmp_path / "p70.safetensors"
    tiny.stage("finetune", settings, **common, state=state, output=tuned, log_table=log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ppcl.export.assembly.prove", lambda *_: None
        )  # test_assembly has the reload gate
        tiny.stage("assemble", settings, **common, finetuned=tuned, output=tmp_path / "p70")
    source = tiny.source(tmp_path / "p70")
    source = source.replace(dtype=dtype, trust_remote_code=bool(schedule))
    made = pipelines.load_transformer(source, torch.device("cpu"))
    weights = tensors.read(tuned)[0]
    assert made.state_dict().keys() == weights.keys()
    for name, value in made.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype)), name
    assert len(made.transformer_blocks) == 3
    card = json.loads((tmp_path / "p70" / "pruning.json").read_text())
    assert card["finetuned"] and len(card["units"]) == 2
    units = selection_file.read(selection).units
    narrow = [part.narrow for unit in units for part in unit.new_blocks]
    assert narrow == ([True] * 3 if schedule else [False] * 2)
    assert {key for key in weights if "text_output" in key} == set()  # nothing reads it
    linear = [key for key in weights if "txt_norm1.linear" in key or "linear_ffn" in key]
    assert len(linear) == (4 if schedule else 0)
