"""Which values a field of a configuration may have."""

from dataclasses import dataclass
from typing import Literal

import pytest

from lizard_layers.field_types import check_fields


@dataclass
class Fields:
    rate: float = 1.0
    count: int = 1
    layers: tuple[int, ...] = ()
    pair: tuple[float, str] = (1.0, "a")
    form: Literal["a", "b"] = "a"
    name: str | None = None
    flag: bool = False


@pytest.mark.parametrize(
    "given",
    [
        {"rate": 2},
        {"layers": (1, 2, 3)},
        {"layers": (4,)},
        {"pair": (2, "b")},
        {"form": "b"},
        {"name": "x"},
        {"flag": True},
    ],
)
def test_values_of_the_type_are_taken(given):
    check_fields(Fields(**given))


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"rate": "2"}, "float"), ({"rate": True}, "float"), ({"count": 1.0}, "int"), ({"count": True}, "int"),
        ({"layers": (1, "2")}, r"tuple\[int, ...\]"), ({"layers": ("1", 2)}, r"tuple\[int, ...\]"),
        ({"layers": 3}, r"tuple\[int, ...\]"), ({"layers": None}, r"tuple\[int, ...\]"),
        ({"layers": [1]}, r"tuple\[int, ...\]"), ({"pair": (1.0,)}, r"tuple\[float, str\]"),
        ({"layers": 1}, r"tuple\[int, ...\]"), ({"pair": 1.0}, r"tuple\[float, str\]"),
        ({"pair": (1.0, 2.0)}, r"tuple\[float, str\]"), ({"pair": (1.0, "a", "b")}, r"tuple\[float, str\]"),
        ({"form": "c"}, r"Literal\['a', 'b'\]"), ({"name": 1}, r"str \| None"), ({"flag": 1}, "bool"),
    ],
)  # fmt: skip
def test_others_are_refused_by_name(given, wanted):
    with pytest.raises(ValueError, match=rf"Fields\.{next(iter(given))} must be {wanted}, got "):
        check_fields(Fields(**given))
