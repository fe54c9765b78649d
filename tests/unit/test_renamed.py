"""Keys of configs as they were called before."""

import functools
import json

import pytest
import yaml

from ppcl.configuration import config
from ppcl.configuration.renamed import OLD_KEYS
from ppcl.errors import UserError
from support.schema_keys import nodes


def nested(key: str, value: object) -> dict:
    return functools.reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value)


@pytest.mark.parametrize("old", OLD_KEYS)
@pytest.mark.parametrize("inline", [False, True])
def test_an_old_key_is_refused_with_the_new_one(old, inline, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(nested(old, [])))
    with pytest.raises(UserError) as raised:
        config.load(json.dumps(nested(old, [])) if inline else file)
    source = "--config" if inline else file
    assert str(raised.value) == (
        f"{source}: the key '{old}' is called '{OLD_KEYS[old]}' now; rename it"
    )


def test_new_keys_are_known_and_old_ones_are_not():
    known = {key for key, _ in nodes(config.schema())}
    assert set(OLD_KEYS.values()) <= known
    assert not set(OLD_KEYS) & known
