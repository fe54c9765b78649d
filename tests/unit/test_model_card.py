"""Model cards: what strangers wrote stays data, the Hub's client reads them, their code runs."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ppcl.errors import UserError
from ppcl.evaluation import films, measuring
from ppcl.evaluation.metrics import higher_is_better
from ppcl.export import assembly
from ppcl.publishing import folder, markdown, measured, model_card, removed, teacher_card
from ppcl.publishing.model_card import Described
from ppcl.publishing.teacher_card import TeacherCard
from ppcl.settings import Settings, TeacherSettings
from ppcl.storage import texts
from ppcl.teacher import teacher_identity
from support import ROOT, pruned, published, tiny
from support.hub_cache import NAME, put
from support.published import PIPELINE, metrics, pictures, units

HUB = {"name": NAME, "repository": NAME, "revision": "0123456789" * 4, "fingerprint": None}


def described(teacher=TeacherCard(("apache-2.0",)), named=HUB, **more) -> Described:  # noqa: B008
    given = {"teacher": {"path": "/home/somebody/teacher"}, "pipeline": PIPELINE}
    given["record"] = {"samples": 640}
    mine = units()[units()["variant"] == "p50"]
    pruning = {"teacher": named, "parameter_fraction": 0.5, "finetuned": True, "provenance": {}}
    values = {"pruning": pruning, "teacher": teacher, "settings": Settings.of(given)}
    values |= {"units": mine, "metrics": metrics(), "pictures": pictures()}
    values |= {"prompts": 2, "blocks": 24, "code": ("transformer/x.py",)} | more
    return Described("p50", **values)


def test_the_hubs_client_reads_the_front_matter_and_all_metrics_with_their_intervals():
    card = ModelCard(str(model_card.card(described())))
    data = card.data.to_dict()
    assert data["base_model"] == NAME and data["base_model_relation"] == "finetune"
    assert (data["license"], data["library_name"]) == ("apache-2.0", "diffusers")
    assert data["pipeline_tag"] == "text-to-image" and "pruned" in data["tags"]
    assert card.data.model_name == "some-model-p50"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results.keys() == set(metrics().query("variant == 'p50'")["metric"]) - {
        "velocity_error_sigma_0.00_0.25",
        "all_correct_difference",
    }
    psnr = results["psnr"]
    assert psnr.metric_value == 31.25 and psnr.metric_args["ci_low"] == 30.5
    assert "31.2 dB (30.5 to 32)" in psnr.metric_name and "teacher" not in psnr.metric_args
    assert "ci_low" not in results["parameters"].metric_args


def test_the_text_says_what_went_what_it_costs_and_what_to_watch_for():
    text = str(model_card.card(described()))
    for line in (
        "| 4 blocks: one block stands for each of these runs | 1 to 3, 5 to 7 | distilled; "
        "distilled, then trained in random subsets |",
        "| 1 image FFN: now linear | 0 | closed form, fitted again in this variant |",
        "| 2 text FFNs: now linear | 0, 9 |",
        "| text streams in 1 run: the first one serves all | 20 to 23 | closed form |",
        "| 2 matrices `img_mod.1`: now of ranks 6 to 7 | 4 to 5 | closed form |",
        "| 1 matrix `norm_out.linear`: now of rank 8 | after the last one | closed form |",
        "| all correct | 45 % (44 to 46) | 90 % | -45 points (-50 to -40) | more |",
        "| relative velocity error | 0.5 (0.4 to 0.6) | 0 |  | less |",
        "| time, of the teacher's | 50 % (49 to 51) | 100 % |",
        "calibrated on 640 samples at 32 x 32 pixels",
        "all of its weights were trained",
        "`block_map.json`",
        "(`transformer/x.py`)",
        "saves memory, not time",
        f"[some-owner/some-model](https://huggingface.co/{NAME}/tree/0123",
    ):
        assert line in text, line
    assert "![Teacher and this model](pictures.png)" in text
    assert "somebody" not in text and "secret" not in text


def test_what_does_not_hold_for_a_variant_is_not_said():
    plain = described(
        units=units().iloc[:0], code=(), teacher=TeacherCard(refused="it has no card")
    )
    text = str(model_card.card(plain))
    for absent in ("trust_remote_code", "block_map", "saves memory", "license:"):
        assert absent not in text, absent
    assert "Licence: not known, since it has no card." in text
    local = dict.fromkeys(HUB) | {"name": "my`teacher"}
    text = str(model_card.card(described(named=local)))
    assert "base_model:" not in text and "name it as `base_model` above" in text
    assert "`` my`teacher ``, pruned" in text
    fused = {"path": "speed.safetensors", "scale": 1.0}
    pruning = {"teacher": HUB, "provenance": {}, "loras": [fused]}
    text = str(model_card.card(described(pruning=pruning)))
    assert "LoRA `speed.safetensors` (scale 1)" in text
    empty = str(model_card.card(described(pictures=pictures(()), metrics=metrics().iloc[:0])))
    assert "## Pictures" not in empty and "## How good" not in empty and "## Size" not in empty


def test_videos_and_edits_have_their_task_and_their_code():
    moving_pictures, edit = pictures(frames=3), pictures(source=b"png")
    moving = described(pictures=moving_pictures, videos=("videos/0.mp4",), frames_per_second=16)
    card = str(model_card.card(moving))
    assert "pipeline_tag: text-to-video" in card and "export_to_video(pipe(" in card
    assert 'frames[0], "video.mp4", fps=16)' in card
    assert '<video controls loop muted playsinline src="videos/0.mp4">' in card
    card = str(model_card.card(described(pictures=edit)))
    assert "pipeline_tag: image-to-image" in card and "image=picture" in card
    told = described(teacher=TeacherCard(task="image-to-video"), pictures=moving_pictures)
    assert "pipeline_tag: image-to-video" in str(model_card.card(told))


EVIL = 'x"`](http://evil) <script> | # \n---\nlicense: mit\n---\n```\n@all www.evil.org ‮'


def film(values: list[int], side: int = 32) -> bytes:
    """Frames of one brightness each, one below the other."""
    column = np.repeat(np.array(values, np.uint8), side)[:, None, None]
    sink = io.BytesIO()
    Image.fromarray(np.tile(column, (1, side, 3))).save(sink, "PNG")
    return sink.getvalue()


def test_videos_are_written_side_by_side_frame_by_frame_at_their_rate(tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip(films.ENCODER)
    table = pictures(frames=5)
    table["png"] = [film([0, 60, 120, 180, 240])] * 2 + [film([240] * 5)] * 4
    assert films.write(table, "p50", tmp_path, 8) == ("videos/0.mp4", "videos/1.mp4")
    with imageio.get_reader(tmp_path / "videos/1.mp4") as reader:
        assert reader.get_meta_data()["fps"] == 8
        shown = [np.asarray(frame) for frame in reader]
    assert [frame.shape for frame in shown] == [(32, 80, 3)] * 5
    for frame, value in zip(shown, (0, 60, 120, 180, 240), strict=True):
        assert abs(frame[8:24, 8:24].mean() - value) < 6  # the teacher; mp4 is not exact
        assert abs(frame[8:24, 56:72].mean() - 240) < 6


def test_without_an_encoder_or_a_film_there_is_no_video(tmp_path, monkeypatch):
    assert films.write(pictures(), "p50", tmp_path, 8) == ()
    monkeypatch.setattr(films, "ENCODER", "no_such_module")
    assert films.write(pictures(frames=5), "p50", tmp_path, 8) == () == tuple(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "call", "rate"),
    [
        ("WanTransformer3DModel", {}, 16),
        ("PrunedLTXVideoTransformer3DModel", {}, 24),
        ("LTXVideoTransformer3DModel", {"frame_rate": 30}, 30),
        ("LTXVideoTransformer3DModel", {"frame_rate": "fast"}, 24),
        ("MyOwnTransformer", {}, 16),
    ],
)
def test_videos_are_shown_as_fast_as_their_family_is(tmp_path, name, call, rate):
    index = {"_class_name": "P", "transformer": ["diffusers", name]}
    texts.write_json(tmp_path / "model_index.json", index)
    assert films.frames_per_second(tmp_path, "transformer", call) == rate


def test_names_and_prompts_of_others_form_nothing():
    named = {**HUB, "repository": None, "name": EVIL}
    about = described(named=named, pictures=pictures((EVIL, EVIL)), code=(EVIL,))
    card = str(model_card.card(about))
    data = ModelCard(card).data
    assert data.license == "apache-2.0" and len(re.findall(r"^---$", card, re.M)) == 2
    body = card.split("---\n", 2)[2]
    shown = re.sub(r"(`{3,})python\n.*?\n\1", "", body, flags=re.S)
    shown = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", shown)
    assert "<script" not in shown and "](http://evil" not in shown and "‮" not in shown
    assert not re.search(r"(?<!\\)@all|www\.evil", shown)
    assert compile(example(card), "card", "exec")


def example(card: str) -> str:
    return re.search(r"^(`{3,})python\n(.*?)\n\1$", card, re.M | re.S)[2]


@settings(deadline=None, max_examples=60)
@given(st.text())
def test_any_text_stays_on_one_line_and_forms_no_cell(text):
    for shown in (markdown.plain(text), markdown.code(text)):
        assert "\n" not in shown and "<" not in markdown.plain(text)
        assert "|" not in shown.replace("\\|", "")


def front(tmp_path: Path, text: str | bytes) -> TeacherCard:
    path = tmp_path / "README.md"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return teacher_card.read(path, None, None)


def test_the_teachers_licence_is_taken_over_with_its_file(tmp_path):
    (tmp_path / "LICENSE.md").write_text("You may not.")
    text = "---\nlicense: other\nlicense_name: flux-1-dev\nlicense_link: LICENSE.md\n---\n# X"
    card = front(tmp_path, text)
    assert (card.licence, card.licence_name, card.licence_link) == (
        ("other",),
        "flux-1-dev",
        "LICENSE.md",
    )
    assert card.licence_file == tmp_path / "LICENSE.md" and not card.refused
    there = teacher_card.read(tmp_path / "README.md", NAME, "abc")
    assert there.licence_link == f"https://huggingface.co/{NAME}/blob/abc/LICENSE.md"
    said = str(model_card.card(described(there)))
    data = ModelCard(said).data
    assert (data.license, data.license_name) == ("other", "flux-1-dev")
    assert f"Licence: [flux-1-dev]({there.licence_link}), as the teacher's." in said
    two = front(tmp_path, "---\r\nlicense:\r\n- mit\r\n- apache-2.0\r\n---\r\n")
    assert two.licence == ("mit", "apache-2.0")
    assert front(tmp_path, "---\npipeline_tag: text-to-video\n---\n").task == "text-to-video"


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe---",
        b"\0" * (teacher_card.LIMIT + 1),
        "---\nlicense: mit\n" + "a: b\n" * 20_000 + "---\n",
        "---\nlicense: mit\n",
        "---\nlicense: " + "[" * 20_000 + "\n---\n",
        "---\na: &a [x]\nb: &b [*a, *a]\nlicense: *b\n---\n",
        "---\na: &a {x: 1}\nlicense: mit\n<<: [*a, *a]\n---\n",
        "---\nlicense: {mit: 1}\n---\n",
        '---\nlicense: "mit\\nbase_model: evil/evil"\n---\n',
        "---\nlicense: MIT](http://evil)\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        "---\nlicense: 2001-99-99\n---\n",
        "---\nlicense: !!bool x\n---\n",
        "---\nlicense: !!timestamp x\n---\n",
        "---\nlicense: !!int ''\n---\n",
        "---\nlicense_link: https://example.org/licence\n---\n",
        "---\n- a\n---\n",
        "# no front matter\n---\nlicense: mit\n---\n",
        "",
    ],
)
def test_a_strange_card_gives_no_licence_and_ends_nothing(tmp_path, text):
    card = front(tmp_path, text)
    assert not card.licence and card.refused and "\n" not in card.refused
    made = str(model_card.card(described(card)))
    assert "license:" not in made and "Licence: not known" in made


def test_links_and_names_that_could_do_harm_are_left_out(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "LICENSE").symlink_to(tmp_path / "secret")
    for name in ("licence.py", "LICENSE.safetensors"):
        (tmp_path / "inside" / name).write_text("raise SystemExit")
    for link in (
        "licence.py",
        "LICENSE.safetensors",
        "javascript:alert(1)",
        "https://x.org/a) [evil](http://evil",
        "../secret",
        "LICENSE",
        "/etc/passwd",
        "LICENSE/../../secret",
    ):
        text = f"---\nlicense: other\nlicense_name: 'a`b'\nlicense_link: {json.dumps(link)}\n---\n"
        card = front(tmp_path / "inside", text)
        assert (card.licence_link, card.licence_name, card.licence_file) == (None,) * 3, link


def test_a_teacher_is_named_without_a_path_of_this_machine(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    on_hub = TeacherSettings.of({"path": NAME, "revision": commit})
    assert teacher_identity.named(on_hub) == HUB
    put(ROOT / "resources/digits", tmp_path / "hub")
    snapshot = tmp_path / f"hub/models--some-owner--some-model/snapshots/{commit}"
    inside = teacher_identity.named(tiny.source(snapshot).replace(fingerprint="f"))
    assert inside == HUB | {"fingerprint": "f"}
    local = teacher_identity.named(tiny.source("/home/somebody/models/flux/"))
    assert local["name"] == "flux" and local["repository"] is local["revision"] is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert teacher_card.find(on_hub) == snapshot / "README.md"
    assert teacher_card.find(tiny.source(snapshot)) == snapshot / "README.md"
    assert teacher_card.find(on_hub.replace(revision="f" * 40)) is None
    assert teacher_card.find(tiny.source(tmp_path)) is None


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict]:
    """A narrow variant of the embedded teacher with its card, and the options of `describe`."""
    place = tmp_path_factory.mktemp("somebody")
    model = pruned.folder(place / "models/p50", narrowed=pruned.NARROW)
    return place, published.describe(model)


def test_a_described_folder_is_still_what_was_exported_and_tells_nothing_of_its_maker(made):
    place, options = made
    model = options["model"]
    assembly.verify(model)
    about = texts.read_sealed(model / "pruning.json")
    assert about["metrics"]["psnr"] == {
        "value": 31.25,
        "ci_low": 30.5,
        "ci_high": 32.0,
        "teacher": None,
        "higher_is_better": True,
        "samples": 8,
    }
    assert about["teacher"]["name"] == "digits" and about["variant"] == {"name": "p50"}
    for name in ("README.md", "pictures.png"):
        assert (model / name).read_bytes() == (options["card"] / name).read_bytes()
    assert ModelCard.load(model / "README.md").data.license == "apache-2.0"
    for path in (*options["card"].iterdir(), model / "pruning.json"):
        content = path.read_bytes()
        for private in (str(ROOT), str(place), "somebody", os.path.expanduser("~")):
            assert private.encode() not in content, path


def test_the_code_on_the_card_runs(made, tmp_path, monkeypatch):
    _, options = made
    text = example((options["card"] / "README.md").read_text())
    assert "trust_remote_code=True" in text and "negative_prompt=' '" in text
    monkeypatch.chdir(tmp_path)
    exec(text.replace("owner/digits-p50", str(options["model"])), {})
    assert Image.open("image.png").size == (32, 32)


def test_again_it_is_the_same_and_an_edited_card_stays(made, capsys):
    _, options = made
    card, model = options["card"] / "README.md", options["model"]
    before = {path: path.read_bytes() for path in (card, model / "pruning.json")}
    published.run(options)
    assert before == {path: path.read_bytes() for path in before}
    (model / "README.md").write_text("mine")
    (model / "pictures.png").write_bytes(b"old")
    published.run(options)
    assert "was edited, so it stays" in capsys.readouterr().out
    assert (model / "README.md").read_text() == "mine" and card.read_bytes() == before[card]
    assert (model / "pictures.png").read_bytes() != b"old"
    published.run(options)
    assert (model / "README.md").read_text() == "mine"
    (model / "README.md").unlink()
    published.run(options)
    assert (model / "README.md").read_bytes() == before[card]


def test_of_every_size_and_time_less_is_better_and_it_has_a_name():
    transformer = tiny.transformer(blocks=2)
    measured_sizes = measuring.sizes(transformer, tiny.transformer(blocks=3))
    for name in (*measured_sizes, "latency_seconds", "latency_ratio", "peak_memory_bytes"):
        assert not higher_is_better(name), name
        assert name.startswith(measured._SIZES) and name in measured._WORDS, name


def test_a_killed_run_does_not_make_its_card_look_edited(tmp_path, monkeypatch):
    card, model = tmp_path / "card", tmp_path / "model"
    for place in (card, model):
        place.mkdir()
    (card / "README.md").write_text("one")
    about = {"teacher": {"name": "a", "repository": None, "revision": None}}
    texts.write_sealed(model / "pruning.json", about)
    write, calls = texts.write_sealed, []

    def killed(*of):
        calls.append(of)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*of)

    monkeypatch.setattr(folder.texts, "write_sealed", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.complete(model, card, {})
    assert (model / "README.md").read_text() == "one"
    (card / "README.md").write_text("two")
    assert folder.complete(model, card, {}) and (model / "README.md").read_text() == "two"
    assert "next_card" not in folder.pruning(model)


def test_a_folder_that_assemble_did_not_write_is_refused(tmp_path):
    texts.write_sealed(tmp_path / "pruning.json", {"variant": {}})
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"--model: .* names its teacher; delete"):
            folder.pruning(place)


def test_spans_and_numbers():
    assert removed.spans([5, 1, 2, 3, 9]) == "1 to 3, 5, 9" and removed.spans([]) == ""
    yaml.safe_load(model_card.card(described()).data.to_yaml())
    shown = [
        measured._number(*given)
        for given in (
            ("peak_memory_bytes", 3 * 2**30),
            ("latency_seconds", 0.05),
            ("digit_accuracy", 0.9987),
            ("anything", 1234.5),
            ("psnr", None),
        )
    ]
    assert shown == ["3 GiB", "50 ms", "99.87 %", "1.23e+03", ""]
