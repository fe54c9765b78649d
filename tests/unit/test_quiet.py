"""What libraries say that no user can act on is left out; all else is shown."""

import logging
import warnings

import pytest

from ppcl.runtime import quiet

SAID = [
    (
        "diffusers.pipelines.pipeline_utils",
        "self.text_encoder=None of type <class 'NoneType'> cannot be saved.",
    ),
    (
        "transformers.utils.import_utils",
        "`CLIPImageProcessor` requires torchvision (not installed); falling back to `CLIP...",
    ),
]
SHOWN = [
    ("diffusers.pipelines.pipeline_utils", "self.vae=<x> of type <class 'x'> cannot be saved."),
    ("diffusers.pipelines.pipeline_utils", "Some weights were not initialized"),
    ("transformers.modeling_utils", "Some weights of T5EncoderModel were newly initialized"),
    ("huggingface_hub.utils._http", "You are sending unauthenticated requests to the HF Hub"),
]


def lets_pass(name: str, message: str) -> bool:
    record = logging.LogRecord(name, logging.WARNING, "", 0, message, (), None)
    return bool(logging.getLogger(name).filter(record))


def test_only_messages_that_are_named_are_left_out():
    assert not any(lets_pass(*said) for said in SAID)
    assert all(lets_pass(*said) for said in SHOWN)


def test_a_pipeline_without_its_text_encoder_is_saved_in_silence(tiny_teacher, tmp_path, capfd):
    import torch

    from ppcl.settings import TeacherSettings
    from ppcl.teacher import pipelines

    source = TeacherSettings.of({"path": str(tiny_teacher)})
    pipe = pipelines.load(source, torch.device("cpu"), without=("text_encoder",))
    pipe.save_pretrained(tmp_path)
    assert "cannot be saved" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("module", "shown"),
    [("diffusers.models.unet", 0), ("torch", 0), ("torchmetrics.x", 1), ("__main__", 1)],
)
def test_warnings_of_libraries_about_each_other_are_left_out(module, shown):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet.start()
        for category, message in (
            (FutureWarning, "old"),
            (UserWarning, "CPU Autocast only supports"),
        ):
            warnings.warn_explicit(message, category, "x.py", 1, module)
    assert len(caught) == shown
