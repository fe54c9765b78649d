"""Old keys of configs and their new names: a config with an old key is refused."""

from collections.abc import Mapping
from typing import Any

from ppcl.errors import UserError

# Old dotted key -> new dotted key.
OLD_KEYS = {
    "plan": "forecast",
    "intervals.pin": "intervals.require",
    "width.text.pin": "width.text.require",
    "width.ffn_image.pin": "width.ffn_image.require",
    "width.ffn_text.pin": "width.ffn_text.require",
    "modulation.pin": "modulation.require",
}


def refuse(config: Mapping[str, Any], source: str) -> None:
    """Raises UserError for the first old key of a config, with its new one.

    source: names the config in the message.
    """
    for old, new in OLD_KEYS.items():
        *sections, key = old.split(".")
        section: Any = config
        for name in sections:
            section = section.get(name) if isinstance(section, Mapping) else None
        if isinstance(section, Mapping) and key in section:
            raise UserError(f"{source}: the key '{old}' is called '{new}' now; rename it")
