"""What libraries say that no user can act on, by name; all else that they say is shown.

Not here: weights that are missing or new, prompts that are cut, requests without a token.
"""

import logging
import os
import re
import warnings
from collections.abc import Callable

# Logger -> beginnings of its messages.
MESSAGES = {
    "diffusers.pipelines.pipeline_utils": (
        r"self\.\w+=None of type <class 'NoneType'> cannot be saved",  # copied: assembly.export
        r"Keyword arguments \{.*\} are not expected by",  # components that were left out
    ),
    "diffusers.guiders.guider_utils": (r"Guiders are currently an experimental feature",),
    "transformers.utils.import_utils": (r"`\w+` requires torchvision \(not installed\); falling",),
    "transformers.processing_utils": (r"`\w+` defines `\w+ = '\w+'`, which is deprecated",),
    "transformers.configuration_utils": (r"`torch_dtype` is deprecated",),
    "transformers.integrations.sdpa_attention": (
        r"`sdpa` attention does not support `output_attentions=True`",
    ),
    "huggingface_hub.file_download": (r"Xet Storage is enabled for this repo, but the 'hf_xet'",),
    # Optional packages that are there, and not used here.
    "torchao": (r"Skipping import of cpp extensions",),
    "bitsandbytes.cextension": (r"The installed version of bitsandbytes was compiled without GPU",),
}
WARNINGS = (
    r"In CPU autocast, but the target dtype is not supported",
    r"CPU Autocast only supports",
)
LIBRARIES = r"(accelerate|diffusers|huggingface_hub|torch|transformers)(\.|$)"


def start() -> None:
    """Leaves these out from now on, in every program: to be called before libraries are loaded."""
    for name, beginnings in MESSAGES.items():
        logging.getLogger(name).addFilter(_without(re.compile("|".join(beginnings))))
    for beginning in WARNINGS:
        warnings.filterwarnings("ignore", beginning)
    # One library's use of another, or of its own past.
    warnings.filterwarnings("ignore", category=FutureWarning, module=LIBRARIES)
    # Tokenizers say after a fork that they do what this asks for.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _without(pattern: re.Pattern[str]) -> Callable[[logging.LogRecord], bool]:
    return lambda said: not pattern.match(said.getMessage())
