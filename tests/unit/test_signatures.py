"""Signatures that are read from diffusers' source against those of its classes."""

import inspect
import re
import subprocess
import sys
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

import pytest

from ppcl.teacher import signatures
from ppcl.transformer.families import FAMILIES

ROOT = Path(find_spec("diffusers").submodule_search_locations[0])


def pipelines_of_families() -> list[str]:
    """Pipeline classes in all modules that name a transformer of the registry."""
    named = re.compile(rf"\b({'|'.join(FAMILIES)})\b")
    texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("pipelines/*/*.py"))]
    classes = [re.findall(r"^class (\w+Pipeline)\(", t, re.M) for t in texts if named.search(t)]
    return sorted({name for names in classes for name in names})


NAMES = pipelines_of_families()


def test_every_family_has_pipelines_here():
    assert len(NAMES) > 60
    assert {"FluxControlNetPipeline", "WanImageToVideoPipeline", "QwenImageEditPipeline"} <= {
        *NAMES
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_the_source_says_is_what_the_class_takes(name):
    import diffusers

    made = getattr(diffusers, name, None)
    if made is None:
        assert signatures.of(name) is None
        return
    every = [*inspect.signature(made.__call__).parameters.values()][1:]
    real = {p.name: p for p in every if p.kind is not p.VAR_KEYWORD}
    signature = signatures.of(name)
    assert [*signature.parameters] == [*real]
    assert signature.open == (len(real) < len(every))
    for key, parameter in real.items():
        mine = signature.parameters[key]
        assert mine.required == (parameter.default is parameter.empty)
        if isinstance(parameter.default, Enum):  # neither a literal nor a constant
            assert mine.default is None
        elif not mine.required:
            assert mine.default == parameter.default
        assert bool(mine.annotation) == (parameter.annotation is not parameter.empty)


def test_a_call_that_a_base_class_defines_is_found(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/__init__.py").write_text("if True:\n    from .made import Derived\n")
    (tmp_path / "inner/made.py").write_text(
        "from ..base import Base\n\nclass Derived(Base):\n    pass\n"
    )
    (tmp_path / "base.py").write_text(
        "AREA = 2 * 3**2\n\nclass Base:\n"
        "    def __call__(self, image: str | None, *, area=AREA, **more):\n        pass\n"
    )
    (tmp_path / "__init__.py").write_text("from .inner import Derived as Ours\n")
    signature = signatures.of("Ours", tmp_path / "__init__.py")
    assert signature.open
    assert signature.parameters == {
        "image": signatures.Parameter("image", True, None, "str | None"),
        "area": signatures.Parameter("area", False, 18),
    }


def test_a_class_that_is_not_of_diffusers_has_no_signature():
    assert signatures.of("TheirOwnPipeline") is None
    assert signatures.of("UNet2DConditionModel") is None


def test_neither_torch_nor_diffusers_is_imported():
    code = (
        "import sys; sys.path.insert(0, 'workflow/scripts'); from ppcl.teacher import signatures; "
        "assert signatures.of('FluxPipeline').parameters['guidance_scale'].default == 3.5; "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
