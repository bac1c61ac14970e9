import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from triptych.checkpoints.configs import from_json, to_json
from triptych.checkpoints.errors import CheckpointError
from triptych.models import MODELS


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size must not be negative: {self.size}")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    kind: Literal["a", "b"] = "a"
    layers: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    name: str | None = None
    fast: bool = False
    others: Inner = field(default_factory=lambda: Inner(3))


@pytest.mark.parametrize("model_type", list(MODELS))
def test_every_size_survives_json(model_type: str) -> None:
    for config in MODELS[model_type].sizes.values():
        assert from_json(MODELS[model_type].config, json.loads(json.dumps(to_json(config))), "config.json") == config


def test_every_kind_of_field() -> None:
    config = Outer(Inner(2, 1.5), "b", (1, 2, 3), (4, 5.0), "x", True, Inner(0))
    assert from_json(Outer, json.loads(json.dumps(to_json(config))), "config.json") == config
    assert from_json(Outer, {"inner": {"size": 1, "rate": 2}}, "c") == Outer(Inner(1, 2.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": 1}, "c: unknown field 'colour'; known are inner, kind"),
        ({"inner": {"rate": 0.5}}, "c.inner: field 'size' is missing"),
        ({"inner": {"size": 1, "width": 2}}, "c.inner: unknown field 'width'"),
        ({"inner": {"size": "big"}}, "c.inner.size: must be an integer, not 'big'"),
        ({"inner": {"size": True}}, "c.inner.size: must be an integer, not True"),
        ({"inner": {"size": 1.0}}, "c.inner.size: must be an integer, not 1.0"),
        ({"inner": {"size": 1, "rate": "x"}}, "c.inner.rate: must be a number"),
        ({"inner": {"size": -1}}, "c.inner: size must not be negative: -1"),
        ({"inner": 3}, "c.inner: must be an object, not 3"),
        ({"kind": "c"}, "c.kind: must be one of 'a', 'b', not 'c'"),
        ({"kind": True}, "c.kind: must be one of"),
        ({"kind": ["a"]}, "c.kind: must be one of"),
        ({"layers": 3}, "c.layers: must be a list"),
        ({"layers": [1, "2"]}, "c.layers[1]: must be an integer, not '2'"),
        ({"pair": [1]}, "c.pair: must have 2 items, not 1"),
        ({"name": 3}, "c.name: must be a string, not 3"),
        ({"fast": 1}, "c.fast: must be true or false, not 1"),
    ],
)
def test_mistakes_name_the_field(change: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_json(Outer, {"inner": {"size": 1}, **change}, "c")
    assert said in str(caught.value)
