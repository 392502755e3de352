"""How the two layers' configurations are compared."""

from __future__ import annotations

from typing import Any

import keras

from bnlayer import BatchNormalization

Theirs = keras.layers.BatchNormalization


def unnamed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration but for the automatic name."""
    return {key: value for key, value in config.items() if key != "name"}


def both_ways(ours: BatchNormalization, theirs: Any) -> None:
    """Equal configurations, also after each layer was made from the other's."""
    assert unnamed(ours.get_config()) == unnamed(theirs.get_config())
    assert list(ours.get_config()) == list(theirs.get_config())
    assert BatchNormalization.from_config(theirs.get_config()).get_config() == theirs.get_config()
    assert Theirs.from_config(ours.get_config()).get_config() == ours.get_config()
