"""What diffusers can do with a pipeline works on variants as on their teacher: the table of
docs/after-pruning.md, each row of which is a function here."""

import contextlib
import copy
import inspect
import io
import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.models.attention_dispatch import attention_backend
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from ppcl.export import assembly, block_maps
from ppcl.pruning import narrow
from ppcl.storage import texts
from ppcl.transformer import blocks
from support import fresh, pruned, zoo_images, zoo_videos
from support.stock_features import FEATURES, KINDS

CALL = {"height": 32, "width": 32, "num_inference_steps": 2}
# Family -> where its teacher comes from, the settings of a call, what is merged and what is narrow.
# The last run of texts never closes, as in variants of `make run`.
UNREAD = {22: {"text": "lend"}, 23: {"text": "borrow"}}
RUN = {1: {"text": "source"}, 2: {"text": "borrow", "linear_ffn": ["image"]}, 3: {"text": "close"}}
LINEAR = {0: {"linear_ffn": ["image"]}}
SHORT = LINEAR | {1: {"text": "source"}, 2: {"text": "close"}}
MADE: dict[str, tuple] = {
    "qwen": (None, CALL, pruned.MERGED, pruned.NARROW | UNREAD),
    "small": (zoo_images.SPECIMENS["qwen-image"], None, [(0, 1)], SHORT),
    "flux": (zoo_images.SPECIMENS["flux"], None, [(4, 5)], LINEAR | RUN),
    "sd3": (zoo_images.SPECIMENS["sd3"], None, [(2, 3)], LINEAR | RUN),
    "wan": (zoo_videos.SPECIMENS["wan"], None, [(1, 2)], {0: LINEAR[0], 2: LINEAR[0]}),
}
CLASSES = {
    "qwen": ("QwenImageImg2ImgPipeline", "QwenImageControlNetModel"),
    "flux": ("FluxImg2ImgPipeline", "FluxControlNetModel"),
    "sd3": ("StableDiffusion3Img2ImgPipeline", "SD3ControlNetModel"),
    "wan": ("WanVideoToVideoPipeline", ""),
}


@dataclass
class Subject:
    """A pipeline's folder, its transformer, and what that should answer.

    Attributes:
        settings: of a call of the pipeline.
        call: arguments of a call of the transformer.
        expected: what the transformer answered before it was saved.
    """

    family: str
    kind: str
    folder: Path
    settings: dict
    call: dict
    expected: torch.Tensor
    transformer: Any

    @property
    def trust(self) -> dict:
        return {"trust_remote_code": True} if self.kind == "narrow" else {}

    def pipe(self, **more) -> Any:
        pipe = DiffusionPipeline.from_pretrained(self.folder, **self.trust, **more)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def model(self) -> Any:
        """One to be changed."""
        return copy.deepcopy(self.transformer)

    @torch.no_grad()
    def answer(self, model) -> torch.Tensor:
        returned = model(**self.call)
        return returned[0] if isinstance(returned, tuple) else returned.sample

    def check(self, model, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        """It answers as before it was saved. The last bits go by where weights lie in memory."""
        torch.testing.assert_close(self.answer(model), self.expected, rtol=rtol, atol=atol)

    def unchanged(self, model) -> None:
        """It has the weights that it had, to the bit, and none besides."""
        self.check(model)
        before, after = self.transformer.state_dict(), model.state_dict()
        assert list(before) == list(after)
        assert all(map(torch.equal, before.values(), after.values()))


def call_of(pipe, settings: dict) -> dict:
    """Arguments of the last call of its transformer in a run of a pipeline."""
    seen: list[dict] = []

    def look(module, args, kwargs):
        seen.append(blocks.signature_arguments(module, args, kwargs))

    handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pipe(prompt="a red 7", generator=generator, output_type="latent", **settings)
    handle.remove()
    return {k: v for k, v in seen[-1].items() if v is not None} | {"return_dict": False}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """(family, kind) -> a subject; made once."""
    made: dict[tuple[str, str], Subject] = {}

    def make(family: str, kind: str) -> Subject:
        if (family, kind) in made:
            return made[family, kind]
        specimen, settings, merged, narrowed = MADE[family]
        if specimen is None:
            pipe = DiffusionPipeline.from_pretrained(pruned.TEACHER)
        else:
            pipe = specimen.make(3 if family == "small" else 5)
            settings = specimen.settings
        folder = tmp_path_factory.mktemp(family) / kind
        call = made[family, KINDS[0]].call if made.get((family, KINDS[0])) else None
        call = call or call_of(pipe, settings)
        model = pipe.transformer.requires_grad_(False).eval()
        if kind == "teacher":
            pipe.save_pretrained(folder)
        else:
            of = {"merged": merged} if kind == "depth" else {"narrowed": narrowed}
            model, block_map = pruned.model(model, **of)
            model = assembly.with_code(model.requires_grad_(False).eval())
            model.register_to_config(_pruning={"variant": {"name": kind}})
            assembly.save(assembly.TeacherPipeline(pipe), model, block_map, folder)
            (folder / "README.md").write_text("# A card\n")
        made[family, kind] = subject = Subject(
            family, kind, folder, settings, call, torch.zeros(0), model
        )
        subject.expected = subject.answer(model)
        return subject

    return make


# ---- loading and saving


def _stock_class(subject: Subject) -> type:
    return getattr(type(subject.transformer), "stock", type(subject.transformer))


def _alone(subject: Subject, folder: Path, **more):
    model = AutoModel.from_pretrained(str(folder), **subject.trust, **more)
    assert isinstance(model, _stock_class(subject))
    return model


def pipeline(subject: Subject, tmp_path) -> None:
    subject.unchanged(subject.pipe().transformer)


def folder_alone(subject: Subject, tmp_path) -> None:
    subject.unchanged(_alone(subject, subject.folder / "transformer"))


def subfolder(subject: Subject, tmp_path) -> None:
    subject.unchanged(_alone(subject, subject.folder, subfolder="transformer"))


def stock_class(subject: Subject, tmp_path) -> None:
    of = _stock_class(subject)
    subject.unchanged(of.from_pretrained(subject.folder, subfolder="transformer"))


def save_again(subject: Subject, tmp_path) -> None:
    subject.pipe().save_pretrained(tmp_path / "again")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "again", **subject.trust)
    subject.unchanged(pipe.transformer)
    index, before = (
        json.loads((f / "model_index.json").read_text())
        for f in (tmp_path / "again", subject.folder)
    )
    assert {k: v for k, v in index.items() if k[:1] != "_"} == {
        k: v for k, v in before.items() if k[:1] != "_"
    }


def keeps_block_map(subject: Subject, tmp_path) -> None:
    """The stock class says nothing of the keys that it does not know."""
    said, log = io.StringIO(), logging.getLogger("diffusers")
    handler = logging.StreamHandler(said)
    log.addHandler(handler)
    subject.pipe().save_pretrained(tmp_path / "again")
    kept = DiffusionPipeline.from_pretrained(tmp_path / "again", **subject.trust).transformer
    log.removeHandler(handler)
    assert "_block_map" not in said.getvalue() and "auto_map" not in said.getvalue()
    before = json.loads((subject.folder / "transformer/block_map.json").read_text())
    number = len(blocks.block_sequence(kept))
    assert kept.config._block_map == before and len(before) == number
    assert block_maps.read(tmp_path / "again/transformer", number) == before
    assert kept.config._pruning == {"variant": {"name": subject.kind}}


def keeps_files(subject: Subject, tmp_path) -> None:
    subject.pipe().save_pretrained(tmp_path / "again")
    again = tmp_path / "again" / "transformer"
    first = subject.folder / "transformer" / "block_map.json"
    assert json.loads((again / "block_map.json").read_text()) == json.loads(first.read_text())
    assert (again / "README.md").read_text() == "# A card\n"
    assert texts.read_sealed(again / "pruning.json") == {"variant": {"name": subject.kind}}
    module, _ = json.loads((tmp_path / "again/model_index.json").read_text())["transformer"]
    assert (again / f"{module}.py").exists()


def shards(subject: Subject, tmp_path) -> None:
    subject.transformer.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    subject.unchanged(_alone(subject, tmp_path / "model"))


def precision_variant(subject: Subject, tmp_path) -> None:
    pipe = subject.pipe(torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert list((tmp_path / "half/transformer").glob("*.fp16.safetensors"))
    more = {"variant": "fp16", "torch_dtype": torch.float32}
    half = DiffusionPipeline.from_pretrained(tmp_path / "half", **more, **subject.trust)
    subject.check(half.transformer, rtol=0.05, atol=0.05)


def device_map(subject: Subject, tmp_path) -> None:
    more = {"device_map": "auto", "max_memory": {"cpu": "1GB"}}
    model = _alone(subject, subject.folder / "transformer", **more)
    assert set(map(str, model.hf_device_map.values())) == {"cpu"}
    subject.check(model)


def plain_loading(subject: Subject, tmp_path) -> None:
    model = _alone(subject, subject.folder / "transformer", low_cpu_mem_usage=False)
    subject.unchanged(model)


def quantised(subject: Subject, tmp_path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    both = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": config})
    more = {"torch_dtype": torch.float32}
    for model in (
        subject.pipe(quantization_config=both, **more).transformer,
        _alone(subject, subject.folder / "transformer", quantization_config=config, **more),
    ):
        kept = [type(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)]
        assert torch.nn.Parameter not in kept[5:-5]
        error = (subject.answer(model) - subject.expected).norm() / subject.expected.norm()
        assert 0 < error < 0.1


def quantised_bnb(subject: Subject, tmp_path) -> None:
    config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    _alone(subject, subject.folder / "transformer", quantization_config=config)


def from_pipe(subject: Subject, tmp_path) -> None:
    pipe = subject.pipe()
    other = getattr(diffusers, CLASSES[subject.family][0])
    made = other.from_pipe(pipe)
    assert type(made) is other and made.transformer is pipe.transformer
    back = type(pipe).from_pipe(made)
    assert back.transformer is pipe.transformer
    subject.unchanged(back.transformer)


def auto_pipe(subject: Subject, tmp_path) -> None:
    pipe = subject.pipe()
    made = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(made).__name__ == CLASSES[subject.family][0]
    assert made.transformer is pipe.transformer


def pickled(subject: Subject, tmp_path) -> None:
    pipe = subject.pipe()
    again = pickle.loads(pickle.dumps(pipe.transformer))
    assert type(again) is type(pipe.transformer)
    subject.unchanged(again)
    assert again.config == pipe.transformer.config


def pickled_elsewhere(subject: Subject, tmp_path) -> None:
    """As by a worker that is started afresh, with this process's path of modules."""
    torch.save((subject.pipe().transformer, subject.call), tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "sys.path += sys.argv[2:]\n"
        "model, call = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "with torch.no_grad():\n"
        "    torch.save(model(**call)[0], sys.argv[1] + '/answer.pt')\n"
    )
    cache = diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE
    done = fresh.run(fresh.MODELS, "-I", "-c", program, tmp_path, cache)
    done.check_returncode()
    answer = torch.load(tmp_path / "answer.pt")
    torch.testing.assert_close(answer, subject.expected, rtol=1e-4, atol=1e-5)


def copied(subject: Subject, tmp_path) -> None:
    again = copy.deepcopy(subject.transformer)
    subject.unchanged(again)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    subject.check(subject.transformer)


def from_config(subject: Subject, tmp_path) -> None:
    made = type(subject.transformer).from_config(subject.transformer.config)
    made.load_state_dict(subject.transformer.state_dict())
    subject.unchanged(made.eval())


def ema(subject: Subject, tmp_path) -> None:
    model = subject.model()
    average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    average.save_pretrained(tmp_path / "ema")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    EMAModel.from_pretrained(tmp_path / "ema", type(model)).copy_to(model.parameters())
    subject.check(model)


# ---- ControlNets and LoRAs


def _control(subject: Subject, **more):
    model, size = subject.model(), {"num_layers": 2}
    if subject.family != "sd3":
        heads = ("attention_head_dim", "num_attention_heads")
        size |= {name: model.config[name] for name in heads}
    else:
        size["num_extra_conditioning_channels"] = 0
    if subject.family == "flux":
        size["num_single_layers"] = 1
    made = getattr(diffusers, CLASSES[subject.family][1]).from_transformer(model, **size, **more)
    return made, model


def control(subject: Subject, tmp_path) -> None:
    """Its first block does what the transformer's does, but for linear maps; and as a whole it
    starts without any effect on the transformer."""
    model = subject.model()
    for block in blocks.block_sequence(model):
        for linear in narrow.maps(block.module).values():
            for parameter in linear.parameters():
                parameter.data.zero_()
    size = {"num_layers": 2}
    if subject.family != "sd3":
        size |= {n: model.config[n] for n in ("attention_head_dim", "num_attention_heads")}
    else:
        size["num_extra_conditioning_channels"] = 0
    if subject.family == "flux":
        size["num_single_layers"] = 1
    made = getattr(diffusers, CLASSES[subject.family][1]).from_transformer(model, **size)
    seen = []

    def look(_block, args, kwargs, output):
        seen.append((args, kwargs, output))

    handle = model.transformer_blocks[0].register_forward_hook(look, with_kwargs=True)
    subject.answer(model)
    handle.remove()
    ((args, kwargs, output),) = seen
    with torch.no_grad():
        torch.testing.assert_close(made.transformer_blocks[0](*args, **kwargs), output)
        zeros = torch.zeros_like(subject.call["hidden_states"])
        names = inspect.signature(made.forward).parameters
        call = {name: value for name, value in subject.call.items() if name in names}
        added = made(**call | {"controlnet_cond": zeros})
    every = [x for x in torch.utils._pytree.tree_leaves(added) if x is not None]
    assert len(every) >= 2 and all(x.count_nonzero() == 0 for x in every)


def _lora(subject: Subject, tmp_path):
    pipe = subject.pipe()
    torch.manual_seed(0)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    effect = subject.answer(pipe.transformer)
    assert (effect - subject.expected).abs().max() > 1e-3
    state = get_peft_model_state_dict(pipe.transformer)
    metadata = {"transformer_lora_adapter_metadata": config.to_dict()}
    type(pipe).save_lora_weights(tmp_path, state, **metadata)
    pipe.transformer.delete_adapters("default")
    return pipe, effect


def lora(subject: Subject, tmp_path) -> None:
    pipe, effect = _lora(subject, tmp_path)
    pipe.load_lora_weights(tmp_path, adapter_name="one")
    torch.testing.assert_close(subject.answer(pipe.transformer), effect, rtol=1e-4, atol=1e-4)
    pipe.set_adapters("one", 0.0)
    subject.check(pipe.transformer, rtol=1e-5, atol=1e-5)
    pipe.unload_lora_weights()
    subject.unchanged(pipe.transformer)


def lora_fused(subject: Subject, tmp_path) -> None:
    pipe, effect = _lora(subject, tmp_path)
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    torch.testing.assert_close(subject.answer(pipe.transformer), effect, rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    subject.check(pipe.transformer, rtol=1e-4, atol=1e-4)


# ---- running


def exported(subject: Subject, tmp_path) -> None:
    call = {k: v for k, v in subject.call.items() if k != "return_dict"} | {"return_dict": False}
    with torch.no_grad():
        program = torch.export.export(subject.model(), (), call, strict=False)
        torch.testing.assert_close(program.module()(**call)[0], subject.expected)


def compiled(subject: Subject, tmp_path) -> None:
    torch._dynamo.reset()
    model = torch.compile(subject.model(), fullgraph=True, backend="aot_eager")
    subject.check(model, rtol=1e-4, atol=1e-5)


def compiled_blocks(subject: Subject, tmp_path) -> None:
    torch._dynamo.reset()
    model = subject.model()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    subject.check(model, rtol=1e-4, atol=1e-5)


def checkpointed(subject: Subject, tmp_path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = subject.model().requires_grad_(True).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**subject.call)[0].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def half(subject: Subject, tmp_path) -> None:
    model = subject.model().to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    call = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in subject.call.items()
    }
    with torch.no_grad():
        answer = model(**call)[0].float()
    error = (answer - subject.expected).norm() / subject.expected.norm()
    assert error < 0.3


def cast_layerwise(subject: Subject, tmp_path) -> None:
    model = subject.model()
    model.enable_layerwise_casting(torch.float16, torch.float32)
    stored = {p.dtype for p in model.parameters()}
    assert torch.float16 in stored
    subject.check(model, rtol=0.05, atol=0.05)
    assert stored == {p.dtype for p in model.parameters()}


def offloaded_groups(subject: Subject, tmp_path) -> None:
    cpu = torch.device("cpu")
    for kind in (
        {"offload_type": "block_level", "num_blocks_per_group": 2},
        {"offload_type": "leaf_level"},
    ):
        model = subject.model()
        model.enable_group_offload(cpu, cpu, **kind)
        subject.check(model)
        subject.check(model)


def offloaded_model(subject: Subject, tmp_path) -> None:
    subject.pipe().enable_model_cpu_offload()


def attention(subject: Subject, tmp_path) -> None:
    model = subject.model()
    before = dict(model.attn_processors)
    # It sets this process's default too, and resetting leaves that.
    with attention_backend("native"):
        model.set_attention_backend("_native_math")
        subject.check(model, rtol=1e-4, atol=1e-5)
        model.reset_attention_backend()
    subject.check(model)
    assert all(
        p._attention_backend is None for p in before.values() if hasattr(p, "_attention_backend")
    )
    kind = type(next(iter(before.values())))
    model.set_attn_processor({name: type(p)() for name, p in before.items()})
    assert isinstance(next(iter(model.attn_processors.values())), kind)
    subject.check(model)


def fused_qkv(subject: Subject, tmp_path) -> None:
    model = subject.model()
    model.fuse_qkv_projections()
    fused = any(getattr(m, "fused_projections", False) for m in model.modules())
    assert fused == (subject.family != "qwen")
    subject.check(model)
    model.unfuse_qkv_projections()
    subject.unchanged(model)


# ---- caches and skipped layers


def _steps(subject: Subject, model, config=None, count: int = 4):
    """Answers to calls that differ a little, and how many keys were projected for each."""
    name = blocks.family(model).state
    projected, answers, each = [0], [], []
    handles = [
        module.register_forward_hook(lambda *_: projected.__setitem__(0, projected[0] + 1))
        for path, module in model.named_modules()
        if path.endswith((".to_k", ".attn1.to_k")) and ".attn2" not in path
    ]
    if config is not None:
        model.enable_cache(config)
    with torch.no_grad():
        for step in range(count):
            call = subject.call | {name: subject.call[name] * (1 - 0.1 * step)}
            about = {"step_index": step, "sigma": 1 - step / count, "num_inference_steps": count}
            context = contextlib.nullcontext()
            if config is not None:
                context = model.cache_context("cond", **about)
            before = projected[0]
            with context:
                answers.append(model(**call)[0])
            each.append(projected[0] - before)
    for handle in handles:
        handle.remove()
    return answers, each


def _cache(subject: Subject, never, always, counts: Callable[[int], list[int]]) -> None:
    """A cache that never reuses anything changes nothing; one that always does computes less."""
    model = subject.model()
    plain, computed = _steps(subject, model)
    number = computed[0]
    assert number == len(blocks.block_sequence(model))
    if never is not None:
        torch.testing.assert_close(_steps(subject, model, never)[0], plain, rtol=1e-5, atol=1e-5)
        model.disable_cache()
    reused, computed = _steps(subject, model, always)
    assert computed == counts(number)
    assert torch.equal(reused[0], plain[0]) and not torch.equal(reused[1], plain[1])
    assert all(answer.isfinite().all() for answer in reused)
    model.disable_cache()
    assert all(map(torch.equal, _steps(subject, model)[0], plain))


def first_block_cache(subject: Subject, tmp_path) -> None:
    config = diffusers.FirstBlockCacheConfig
    _cache(subject, config(threshold=-1.0), config(threshold=1e9), lambda n: [n, 1, 1, 1])


def mag_cache(subject: Subject, tmp_path) -> None:
    same = {"num_inference_steps": 4, "retention_ratio": 0.0, "mag_ratios": torch.ones(4)}
    config = diffusers.hooks.MagCacheConfig
    _cache(
        subject,
        config(threshold=-1.0, **same),
        config(threshold=1e9, max_skip_steps=9, **same),
        lambda n: [n, 0, 0, 0],
    )


def taylor_cache(subject: Subject, tmp_path) -> None:
    config = diffusers.hooks.TaylorSeerCacheConfig
    same = {"taylor_factors_dtype": torch.float32, "cache_identifiers": [r".*blocks\.\d+\.attn1?"]}
    _cache(
        subject,
        config(cache_interval=1, disable_cache_before_step=0, **same),
        config(cache_interval=9, disable_cache_before_step=1, **same),
        lambda n: [n, 0, n, 0],
    )


def sea_cache(subject: Subject, tmp_path) -> None:
    def vision(module, args, kwargs):
        states = kwargs[blocks.family(module).state]
        return list(states.unsqueeze(1).unsqueeze(1)) if states.ndim == 3 else list(states)

    config = diffusers.hooks.SeaCacheConfig
    same = {"raw_vision_callback": vision}
    always = config(threshold=1e9, max_consecutive_cached=0, cache_end_steps=0, **same)
    _cache(subject, config(threshold=0.0, **same), always, lambda n: [n, 0, 0, 0])


def attention_broadcast(subject: Subject, tmp_path) -> None:
    def config(skipped):
        return diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=skipped, current_timestep_callback=lambda: 500
        )

    _cache(subject, config(1), config(2), lambda n: [n, 0, n, 0])


def layer_skip(subject: Subject, tmp_path) -> None:
    """A skipped block does nothing."""
    model = subject.model()
    skipped, without = copy.deepcopy(model), copy.deepcopy(model)
    listed = blocks.block_sequence(model)[1].list
    config = diffusers.hooks.LayerSkipConfig(indices=[1], fqn=listed.attribute)
    diffusers.hooks.apply_layer_skip(skipped, config)

    def nothing(block, args, kwargs, _output):
        given = blocks.signature_arguments(block, args, kwargs)
        streams = tuple(given[listed.inputs[stream]] for stream in listed.outputs)
        return streams if len(streams) > 1 else streams[0]

    getattr(without, listed.attribute)[1].register_forward_hook(nothing, with_kwargs=True)
    expected = subject.answer(without)
    assert not torch.equal(expected, subject.expected)
    torch.testing.assert_close(subject.answer(skipped), expected)


ROWS = [
    (name, family, kind)
    for name, feature in FEATURES.items()
    for family in feature.families
    for kind in feature.kinds
]


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(("name", "family", "kind"), ROWS)
def test_it_works_as_the_table_says(subject, tmp_path, name, family, kind):
    feature, one, check = FEATURES[name], subject(family, kind), globals()[name]
    if feature.package and not getattr(diffusers.utils, f"is_{feature.package}_available")():
        pytest.skip(f"{feature.package} is not installed beside diffusers")
    refusal = feature.refusal(family, kind)
    if refusal is None:
        return check(one, tmp_path)
    with pytest.raises(Exception, match=refusal.match):
        check(one, tmp_path)


def test_what_works_on_a_teacher_works_on_its_variants():
    """But for what the table gives a reason for, which is of narrow or of depth variants alone."""
    own = {
        (name, kind)
        for name, f in FEATURES.items()
        for r in f.refusals
        for kind in r.kinds
        if r.kinds != KINDS
    }
    assert own == {("subfolder", "narrow"), ("stock_class", "narrow"), ("keeps_files", "depth")}


@pytest.mark.parametrize(
    "narrowed",
    [
        {0: {"text": "source"}, 1: {"text": "close"}},  # the last block is stock
        {3: {"text": "source"}, 4: {"text": "close", "linear_ffn": ["image"]}},
        {0: {"text": "source"}, 1: {"text": "close"}, 3: {"text": "lend"}, 4: {"text": "borrow"}},
        {0: {"text": "source"}, 1: {"text": "close"}, 3: {"text": "source"}, 4: {"text": "close"}},
        {0: {"text": "lend"}} | {number: {"text": "borrow"} for number in range(1, 5)},
    ],
)
def test_first_block_cache_wherever_text_runs_begin_and_end(narrowed):
    """It subtracts the first block's text stream, which may be a carry, from the last's; and what
    is made of one model is made of it again when it is loaded, copied or pickled."""
    specimen = zoo_images.SPECIMENS["qwen-image"]
    pipe = specimen.make(5)
    call = call_of(pipe, specimen.settings)
    model, _ = pruned.model(pipe.transformer, narrowed=narrowed)
    with torch.no_grad():
        before = model(**call)[0]
        model = assembly.with_code(model)
        one = Subject("qwen", "narrow", Path(), {}, call, before, model)
        for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            one.check(made)
        again = type(model).from_config(model.config)
        again.load_state_dict(model.state_dict())
        one.check(again.eval())
    one.transformer = again
    first_block_cache(one, None)
    mag_cache(one, None)


def test_products_of_low_rank_are_multiplied_out_for_stock_blocks():
    """And rows of zeros take the place of what a linear FFN has cut out of one."""
    model = zoo_images.SPECIMENS["qwen-image"].make(2).transformer
    spec = {"linear_ffn": ["image"], "ranks": {"img_mod.1": 3, "txt_mod.1": 2}}
    block = narrow.narrow(
        model.transformer_blocks[0], blocks.family(model).layouts()["transformer_blocks"], spec
    )
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    state, stock = narrow.stock_state(block), model.transformer_blocks[1].state_dict()
    assert {key: x.shape for key, x in state.items()} == {
        key: x.shape for key, x in stock.items() if "img_mlp" not in key
    }
    width = stock["img_mod.1.weight"].shape[1]
    kept = block.img_mod[1]
    product = torch.cat([kept.up.weight @ kept.down.weight, torch.zeros(3 * width, width)])
    torch.testing.assert_close(state["img_mod.1.weight"], product)
    assert state["img_mod.1.bias"][3 * width :].count_nonzero() == 0
    text = block.txt_mod[1]
    torch.testing.assert_close(state["txt_mod.1.weight"], text.up.weight @ text.down.weight)


@pytest.mark.usefixtures("modules")
def test_loading_twice_gives_one_class(subject):
    """Though diffusers runs the code anew: what was loaded before can be pickled still."""
    one = subject("flux", "narrow")
    first, second = one.pipe().transformer, one.pipe().transformer
    assert type(first) is type(second)
    assert type(first.transformer_blocks[1]) is type(second.transformer_blocks[1])
    one.unchanged(pickle.loads(pickle.dumps(first)))
