"""What changes a transformer's answers from outside of a call is refused, and named."""

import functools

import diffusers
import pytest
import torch
from diffusers.guiders import PerturbedAttentionGuidance
from diffusers.hooks import LayerSkipConfig

from ppcl.errors import UserError
from ppcl.runtime import devices
from ppcl.teacher import recording, replays
from ppcl.transformer import blocks
from support import tiny
from support.zoo_images import SPECIMENS

CPU = torch.device("cpu")
SAMPLES = tiny.samples(["a red 1 on blue", "a blue 2 on red"])


def record(pipe, settings=tiny.SETTINGS):
    return recording.record_batch(pipe, pipe.transformer, SAMPLES, settings, 0, seed=0)


def louder(_module, _given, streams):
    return tuple(1.1 * stream for stream in streams)


def hooked(transformer):
    transformer.transformer_blocks[1].register_forward_hook(louder)


def hooked_late(transformer):
    """As a guidance that works in one step of many, and for one branch: the fourth call."""
    calls = []

    def hook(*given):
        calls.append(1)
        return louder(*given) if len(calls) == 4 else None

    transformer.transformer_blocks[1].register_forward_hook(hook)


class Silent(type(tiny.transformer(1).transformer_blocks[0].attn.processor)):
    def __call__(self, *args, **kwargs):
        return tuple(0 * stream for stream in super().__call__(*args, **kwargs))


def processed(transformer):
    transformer.transformer_blocks[1].attn.processor = Silent()


def cached(transformer):
    transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))


def replaced(transformer):
    plain = transformer.forward
    transformer.forward = lambda *args, **kwargs: (2 * plain(*args, **kwargs)[0],)


def adapted(transformer):
    layer = transformer.transformer_blocks[1].attn.to_q
    layer.register_parameter("lora_A", torch.nn.Parameter(torch.ones(1)))


def of_another_class(transformer):
    """As those patch a model who have it merge tokens."""
    block = transformer.transformer_blocks[1]

    class Merging(type(block)):
        def forward(self, *args, **kwargs):
            return louder(None, None, super().forward(*args, **kwargs))

    block.__class__ = Merging


def fused(transformer):
    transformer.transformer_blocks[1].attn.to_q.weight.data *= 1.01


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (hooked, r"branch 0, step .*branch 1, step .* a hook \(louder of transformer_blocks.1\)"),
        (hooked_late, r"\(branch 1, step 1: by [\d.]+ of its norm\)"),
        (processed, r"an attention processor \(Silent of transformer_blocks.1.attn\)"),
        (cached, r"step 2: .* a cache \(FirstBlockCacheConfig\)"),
        (of_another_class, r"a class of its own \(Merging of transformer_blocks.1\)"),
        (
            fused,
            r"changed its transformer's weights .*transformer_blocks.1.attn.to_q.weight and 0 m",
        ),
        (replaced, r"a hook \(a forward of its own of the transformer\)"),
        (adapted, r"other weights than its class makes .*transformer_blocks.1.attn.to_q.lora_A"),
    ],
)
def test_what_a_replay_would_not_give_is_refused(tiny_teacher, change, named):
    pipe = tiny.load(tiny_teacher)
    change(pipe.transformer)
    with pytest.raises(UserError, match=named):
        record(pipe)


def test_random_answers_are_refused(tiny_teacher, monkeypatch):
    pipe = tiny.load(tiny_teacher)
    kind = type(pipe.transformer.transformer_blocks[1])
    plain = kind.forward

    def random(*args, **kwargs):
        return tuple(x + torch.rand_like(x) for x in plain(*args, **kwargs))

    monkeypatch.setattr(kind, "forward", functools.wraps(plain)(random))
    with pytest.raises(UserError, match="it draws random numbers"):
        recording.record_batch(pipe, pipe.transformer, SAMPLES[:1], tiny.SETTINGS, 0, seed=0)


def test_a_guider_that_disturbs_attention_is_named():
    one = SPECIMENS["hunyuan-image"]
    pipe = one.make(2)
    settings = one.settings | {"num_inference_steps": 2}
    disturbed = LayerSkipConfig(
        indices=[1],
        fqn="transformer_blocks",
        skip_attention=False,
        skip_attention_scores=True,
        skip_ff=False,
    )
    pipe.register_modules(
        guider=PerturbedAttentionGuidance(
            perturbed_guidance_scale=2.0,
            perturbed_guidance_start=0.0,
            perturbed_guidance_stop=1.0,
            perturbed_guidance_config=disturbed,
        )
    )
    with pytest.raises(UserError, match=r"branch 2, .* a guider \(guider: PerturbedAttention"):
        record(pipe, settings)


@pytest.mark.parametrize("how", ["plain", "streamed"])
def test_the_transformer_alone_answers_alike_from_the_same_memory(how):
    transformer = tiny.transformer(2)
    modules = [block.module for block in blocks.block_sequence(transformer)]
    if how == "streamed":
        devices.stream(transformer, modules, CPU)
    call, before = tiny.arguments((3, 2)), torch.get_rng_state()
    expected = blocks.answer(transformer, call)
    bare = replays.alone(transformer, CPU)
    assert torch.equal(blocks.answer(bare, call), expected)
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(transformer.parameters(), bare.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()
    for one, other in zip(modules, bare.transformer_blocks, strict=True):
        assert type(one) is type(other) and not other._forward_hooks


def test_a_distance_of_zero_answers_is_no_nan():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert replays.distance(zero, zero) == 0 and replays.distance(one, zero) == torch.inf
