"""The embedded teacher's world: captions, pictures, the judge, and the tokenizer's prefix."""

import numpy as np
import pytest
from diffusers import QwenImagePipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl.digits import captions, handwriting, teacher
from ppcl.digits.judge import Judge


@pytest.fixture(scope="module")
def judge():
    return Judge(copies=2)  # fewer than `evaluate` fits: a harder test, in less time


def test_caption_splits_are_disjoint_and_cover_everything():
    train, held_out = captions.captions("train"), captions.captions("evaluation")
    prompts = [c.prompt for c in train + held_out]
    assert len(set(prompts)) == len(prompts) == len(captions.TEMPLATES) * 20 * 30
    assert 0.15 < len(held_out) / len(prompts) < 0.25
    facts = [
        {(c.digit, c.digit_color, c.background_color) for c in every} for every in (train, held_out)
    ]
    assert len(facts[0]) == 300 and len(facts[1]) >= 290
    for caption in held_out[::97]:
        assert caption.digit_color in caption.prompt and caption.background_color in caption.prompt
        assert (
            str(caption.digit) in caption.prompt or captions.WORDS[caption.digit] in caption.prompt
        )
        assert caption.digit_color != caption.background_color


def test_handwriting_splits_are_disjoint():
    (train, _), (test, labels) = handwriting.digits("train"), handwriting.digits("test")
    assert len(train) + len(test) == 1797 and train.max() == 1
    assert sorted(set(labels)) == list(range(10))
    # Two of the 1,797 pictures could be equal by chance; none are.
    assert not {i.tobytes() for i in train} & {i.tobytes() for i in test}


def test_paint_mixes_two_palette_colours():
    opacity = np.zeros((handwriting.SIZE, handwriting.SIZE))
    opacity[4, 7], opacity[5, 7] = 1, 0.5
    picture = handwriting.paint(opacity, "red", "white")
    assert picture.shape == (32, 32, 3) and picture.dtype == np.float32
    np.testing.assert_allclose(picture[0, 0] * 255, [250, 250, 250], rtol=1e-6)
    np.testing.assert_allclose(picture[4, 7] * 255, [220, 30, 40], rtol=1e-5)
    np.testing.assert_allclose(picture[5, 7] * 255, [235, 140, 145], rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 449), st.integers(0, 2**32 - 1))
def test_a_stroke_is_an_opacity_and_a_function_of_its_seed(index, seed):
    image = handwriting.digits("test")[0][index]
    drawn = handwriting.stroke(image, np.random.default_rng(seed))
    assert drawn.shape == (32, 32) and 0 <= drawn.min() and drawn.max() == 1
    assert np.array_equal(drawn, handwriting.stroke(image, np.random.default_rng(seed)))


def test_judge_reads_real_digits_and_colours(judge):
    accuracy = judge.accuracy_on_real_digits()
    assert accuracy["digit"] >= 0.98
    assert accuracy["digit_color"] >= 0.99 and accuracy["background_color"] >= 0.99


def test_judge_sees_what_is_wrong(judge):
    images, labels = handwriting.digits("test")
    zero = images[int(np.flatnonzero(labels == 0)[0])]
    one = images[int(np.flatnonzero(labels == 1)[0])]
    rng = np.random.default_rng(0)
    pictures = [
        handwriting.paint(handwriting.stroke(image, rng, 0), ink, paper)
        for image, ink, paper in ((zero, "red", "blue"), (one, "black", "yellow"))
    ]
    assert judge.read(np.stack(pictures)) == [
        {"digit": 0, "digit_color": "red", "background_color": "blue"},
        {"digit": 1, "digit_color": "black", "background_color": "yellow"},
    ]
    flat = judge.read(np.full((1, 32, 32, 3), 0.5, np.float32))[0]  # shows nothing: no crash
    assert flat["digit_color"] != flat["background_color"]


def test_prompt_template_takes_as_many_tokens_as_the_pipeline_drops():
    tokenizer = teacher.make_tokenizer()
    prefix, rest = teacher.TEMPLATE.split("{}")
    ids = tokenizer(prefix).input_ids
    assert len(ids) == teacher.PREFIX_TOKENS == 34
    for caption in captions.captions("evaluation")[::301]:
        whole = tokenizer(teacher.TEMPLATE.format(caption.prompt)).input_ids
        assert whole[:34] == ids  # no token reaches over the border
        assert tokenizer.decode(whole[34:]) == caption.prompt + rest


def test_template_and_prefix_are_the_stock_pipelines(tiny_teacher):
    pipe = QwenImagePipeline.from_pretrained(tiny_teacher)
    assert pipe.prompt_template_encode == teacher.TEMPLATE
    assert pipe.prompt_template_encode_start_idx == teacher.PREFIX_TOKENS
    long, short = "a red handwritten 7 on a blue background", "red 7"
    embedded, mask = pipe.encode_prompt([long, short])
    end = len(pipe.tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids)
    tokens = [len(pipe.tokenizer(text).input_ids) + end for text in (long, short)]
    assert mask.sum(1).tolist() == tokens and embedded.shape[1] == tokens[0]
