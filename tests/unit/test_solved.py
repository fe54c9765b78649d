"""Refitted starts against a least squares of its own, on the materialised tokens."""

import numpy as np
import pytest
import torch

from ppcl.closed_forms import solved
from ppcl.errors import UserError
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock
from ppcl.settings import WidthSettings
from ppcl.training import teaching
from ppcl.transformer import families
from support import tiny

CPU = torch.device("cpu")
PART = NewBlock(1, 3)
OPTIONS = WidthSettings.of({"fit_rows": 8, "batch_size": 3})
FFN = {"image": "img_mlp.net.2", "text": "txt_mlp.net.2"}


def start(teacher, reader, parts=(PART,), how="solved"):
    return solved.start(tiny.context(teacher, reader), parts, how, OPTIONS)


def tokens(teacher, block, reader, path):
    """Of one stream's real tokens: features of its FFN's last linear, its gate, the stream after
    the block and the wanted one; float64 [tokens, channels]."""
    stream = "image" if path.startswith("img") else "text"
    collected = [[], [], [], []]
    for batch in reader.batches(reader.rows(heldout=False), 8, CPU):
        lesson = teaching.teacher_states(teacher, [PART], batch.arguments)[PART]
        seen = []
        handle = block.get_submodule(path).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            text, image = block(**lesson.bound)
            modulation = block.img_mod if stream == "image" else block.txt_mod
            gate = modulation(lesson.bound["temb"]).chunk(6, dim=-1)[5]
        handle.remove()
        output = image if stream == "image" else text
        mask = torch.ones(output.shape[:2]).bool()
        if stream == "text":
            mask = batch.arguments["encoder_hidden_states_mask"].bool()
        wide = gate[:, None].expand_as(output)
        for kept, value in zip(
            collected, (*seen, wide, output, lesson.target[stream]), strict=True
        ):
            kept.append(value[mask].double())
    return [torch.cat(each).numpy() for each in collected]


@pytest.mark.parametrize("path", FFN.values())
def test_channels_solve_their_own_ridge_regressions(teacher, reader, path, monkeypatch):
    stages = ((path,),)
    monkeypatch.setattr(solved, "stages", lambda *_: stages)
    (block,) = start(teacher, reader, how="first").values()
    features, gate, output, target = tokens(teacher, block, reader, path)
    (made,) = start(teacher, reader).values()
    old, new = (each.get_submodule(path) for each in (block, made))
    ones = np.concatenate([features, np.ones((len(features), 1))], 1)
    scale = np.sqrt(np.square(ones).sum(0))
    for channel in range(0, len(old.weight), 5):
        rows = gate[:, channel, None] * ones / scale
        ridge = np.sqrt(solved.RIDGE * np.square(rows[:, :-1]).sum(0).mean())
        penalty = np.diag([ridge] * features.shape[1] + [0.0])
        wanted = np.concatenate([(target - output)[:, channel], np.zeros(len(penalty))])
        change, *_ = np.linalg.lstsq(np.concatenate([rows, penalty]), wanted, rcond=None)
        shift = torch.cat([new.weight - old.weight, (new.bias - old.bias)[:, None]], 1)[channel]
        np.testing.assert_allclose(shift.detach(), change / scale, rtol=2e-3, atol=2e-5)
    assert torch.equal(old.weight, teacher.transformer_blocks[1].get_submodule(path).weight)


def test_each_stage_brings_the_block_nearer(teacher, reader, monkeypatch):
    whole = families.FAMILIES["QwenImageTransformer2DModel"].gated["transformer_blocks"]

    def missing(stages, how="solved"):
        monkeypatch.setattr(solved, "stages", lambda *_: stages)
        (block,) = start(teacher, reader, how=how).values()
        pairs = [tokens(teacher, block, reader, path)[2:] for path in FFN.values()]
        return [np.square(output - target).sum() for output, target in pairs]

    copied, ffn, both = missing((), "first"), missing(whole[1:]), missing(whole)
    assert all(0.95 * a > b > c for a, b, c in zip(copied, ffn, both, strict=True))


def test_parts_do_not_know_each_other(teacher, reader, monkeypatch):
    parts = (PART, NewBlock(4, 4), NewBlock(4, 5))
    together = start(teacher, reader, parts)
    monkeypatch.setattr(solved, "SUMS_BYTES", 1)  # one after the other
    apart = start(teacher, reader, parts)
    for part in parts:
        pairs = zip(together[part].parameters(), apart[part].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    stock = students.start(teacher, parts, "first")
    same = {
        part: {
            name
            for name, value in together[part].named_parameters()
            if torch.equal(value, stock[part].get_parameter(name))
        }
        for part in parts
    }
    assert len(same[NewBlock(4, 4)]) == len(list(stock[PART].parameters()))  # nothing to refit
    changed = {name for name, _ in stock[PART].named_parameters()} - same[PART]
    assert changed == {
        f"{path}.{kind}"
        for path in (*FFN.values(), "attn.to_out.0", "attn.to_add_out")
        for kind in ("weight", "bias")
    }
    # After the last block nothing reads the text stream.
    unread = {name for name, _ in stock[PART].named_parameters()} - same[NewBlock(4, 5)]
    assert unread == {name for name in changed if "txt" not in name and "add_out" not in name}


def test_what_the_registry_does_not_know_is_refused(teacher, reader, monkeypatch):
    entry = families.FAMILIES["QwenImageTransformer2DModel"]
    with monkeypatch.context() as patch:
        patch.setitem(entry.gated, "transformer_blocks", (("attn.to_q",),))
        with pytest.raises(UserError, match="more than a gate follows attn.to_q"):
            start(teacher, reader)
    monkeypatch.delitem(entry.gated, "transformer_blocks")
    with pytest.raises(UserError, match="set prune.start to first"):
        start(teacher, reader)
