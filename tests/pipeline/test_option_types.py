"""Options of passes: what is printed parses back to an equal pass, and types for which this cannot hold are refused."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from torch import Tensor, fx

from fxquant.errors import ConfigurationError
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline.options import option_types, read_named
from fxquant.pipeline.pipeline import Pass, Pipeline, Tier, check_text, register_pass
from fxquant.pipeline.recipes import Recipe
from fxquant.pipeline.syntax import point_at
from fxquant.planning.context import PassContext


class Side(enum.Enum):
    LEFT = "left"
    RIGHT = "the right"


class Number(enum.IntEnum):
    ONE = 1
    TWO = 2


@dataclass(frozen=True)
class Base(Pass):
    name: ClassVar[str] = "test-options"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.LOWERED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        pass


@dataclass(frozen=True)
class Many(Base):
    count: int = 1
    share: float = 0.5
    whole: bool = False
    words: str = "default"
    side: Side = Side.LEFT
    number: Number = Number.ONE
    choice: Literal["a", "b c", 3] = "a"
    path: Path = Path()
    maybe: int | None = 3
    maybe_words: str | None = "x"
    maybe_side: Side | None = None
    sizes: tuple[int, ...] = ()
    pair: tuple[str, float] = ("", 0.0)
    nested: tuple[tuple[str, int | None], ...] = ()
    sides: tuple[Side, ...] | None = None
    at_least: Annotated[int, Field(ge=2)] = 2


def read_back(step: Pass) -> Pass:
    _, options = read_named(str(step), "pass", lambda _: option_types(type(step)))
    return type(step)(**options)


TEXTS = [
    "",
    "None",
    "True",
    "a b",
    "a,b",
    "{",
    "}",
    '"',
    '"quoted"',
    "[1,2]",
    "[1, 2]",
    "[",
    "a;b",
    " ; ",
    "\n",
    "ü",
    "\\",
]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_parses_back(text: str) -> None:
    for step in (Many(words=text), Many(maybe_words=text), Many(path=Path(text)), Many(pair=(text, 1.0))):
        assert read_back(step) == step
        check_text(step)


@settings(deadline=None, max_examples=60)
@given(
    st.builds(
        Many,
        count=st.integers(),
        share=st.floats(allow_nan=False),
        words=st.text(),
        maybe=st.none() | st.integers(),
        maybe_words=st.none() | st.text(),
        pair=st.tuples(st.text(), st.floats(allow_nan=False)),
        nested=st.lists(st.tuples(st.text(), st.none() | st.integers())).map(tuple),
        sides=st.none() | st.lists(st.sampled_from(Side)).map(tuple),
        choice=st.sampled_from(["a", "b c", 3]),
        number=st.sampled_from(Number),
        side=st.sampled_from(Side),
    )
)
def test_every_value_parses_back(step: Many) -> None:
    assert read_back(step) == step
    items = str(Pipeline([step, step]))
    assert items == f"{step},{step}"


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Many(count=3, whole=True), "test-options{count=3 whole=True}"),
        (Many(sizes=(1, 2)), "test-options{sizes=[1,2]}"),
        (Many(maybe=None, maybe_words="None"), 'test-options{maybe=None maybe-words="None"}'),
        (Many(words="a b"), 'test-options{words="a b"}'),
        (Many(words="*attn[12]*=w8a8;x=float"), "test-options{words=*attn[12]*=w8a8;x=float}"),
        (Many(side=Side.RIGHT, number=Number.TWO), 'test-options{side="the right" number=2}'),
        (Many(share=float("inf"), pair=("x", float("-inf"))), 'test-options{share=inf pair=["x",-Infinity]}'),
    ],
)
def test_what_is_printed(step: Many, text: str) -> None:
    assert str(step) == text
    assert read_back(step) == step


def pass_with(hint: Any, default: Any = None) -> type[Pass]:
    return dataclass(frozen=True)(
        type("With", (Base,), {"__annotations__": {"option": hint}, "option": default, "__module__": __name__})
    )


@pytest.mark.parametrize("hint", [tuple, list[int], dict[str, int], Tensor, int | str, object, tuple[()], set[int]])
def test_types_that_cannot_be_written_are_refused_at_registration(hint: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"test-options: the option 'option' is a .*cannot be printed and"):
        register_pass(pass_with(hint))


def test_other_mistakes_are_refused_at_registration() -> None:
    class Plain(Base):
        size: int = 3

    with pytest.raises(ConfigurationError, match="Plain is not a dataclass; decorate it"):
        register_pass(Plain)

    @dataclass(frozen=True)
    class Computed(Base):
        size: int = field(default=3, init=False)

    with pytest.raises(ConfigurationError, match="the option 'size' has init=False"):
        register_pass(Computed)

    @dataclass(frozen=True)
    class NoTier(Base):
        tier = None  # type: ignore[assignment]

    with pytest.raises(ConfigurationError, match="NoTier does not say its tier"):
        register_pass(NoTier)


@pytest.mark.parametrize(
    "wrong",
    [{"count": "3"}, {"share": float("nan")}, {"sizes": [1, 2]}, {"side": "left"}, {"whole": 1}, {"at_least": 1}],
)
def test_values_that_would_be_read_back_as_others_are_refused_before_anything_runs(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigurationError, match=f"pass test-options: option {name}: .* is not a value of type"):
        Pipeline([Many(**wrong)])


class Speed(str, enum.Enum):  # noqa: UP042  (authors write it in this way too)
    FAST = "fast"
    SLOW = "slow"


@dataclass(frozen=True)
class Equal(Base):
    """Options whose defaults are equal to values of other types."""

    speed: Speed = Speed.FAST
    count: int = 1
    zero: float = 0.0
    sizes: tuple[int, ...] = (1,)
    words: str = ""


@pytest.mark.parametrize(
    "wrong", [{"speed": "fast"}, {"count": True}, {"sizes": (True,)}, {"words": "\ud800"}, {"count": 10**5000}]
)
def test_a_value_that_only_equals_the_default_is_not_the_default(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"option {next(iter(wrong))}"):
        Pipeline([Equal(**wrong)])


def test_signs_of_zero_and_integers_for_floats() -> None:
    assert str(Equal(zero=-0.0)) == "test-options{zero=-0.0}"
    assert str(Pipeline([Equal(zero=0), Equal(zero=2)])) == "test-options,test-options{zero=2.0}"
    assert read_back(Equal(zero=2)) == Equal(zero=2.0)


@pytest.mark.parametrize("value", ["[" * 100_000, "[" + "9" * 5000 + "]"])
def test_a_list_that_json_cannot_read_is_a_typed_error(value: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        Pipeline.parse(f"remove-no-ops,assign-precision{{overrides={value}}}")
    assert "^" in str(error.value) and len(str(error.value)) < 2000


@pytest.mark.parametrize(("words", "cells"), [("日本", 4), ("e\u0301", 1), ("\t", 1), ("\x1b[31m", 5), ("ü", 1)])
def test_the_mark_counts_columns_of_the_terminal(words: str, cells: int) -> None:
    shown, mark = point_at(f"{words}!", len(words), "here").splitlines()
    assert mark == f"  {' ' * cells}^ here"
    assert shown.endswith("!") and "\x1b" not in shown


def test_a_recipe_has_registered_passes_only() -> None:
    with pytest.raises(ConfigurationError, match=r"test-options is not registered, so the recipe .*@register_pass"):
        Recipe((), (Many(),))


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("remove-no-ops,balance-channels{exponent=0.5", "{"),
        ("remove-no-ops}", "}"),
        ("remove-no-ops balance-channels", "b"),
        ("remove-no-ops,{x=1}", "{"),
        ("balance-channels{exponent=0.5 exponent=0.6}", "e"),
        ("balance-channels{power=1}", "p"),
        ("remove-no-ops,balance-channels{exponent=half}", "h"),
        ('balance-channels{exponent="0.5}', '"'),
        ('assign-precision{overrides="a"b}', "b"),
        ("remove-no-ops ; rtn", ";"),
    ],
)
def test_an_error_points_at_the_character(text: str, marked: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        Pipeline.parse(text)
    _, shown, mark = str(error.value).splitlines()
    assert shown == f"  {text}"
    assert shown[mark.index("^")] == marked


def test_an_error_in_a_long_text_shows_the_part_around_it() -> None:
    text = "remove-no-ops," * 40 + "remove-no-ops{" + ",remove-no-ops" * 40
    with pytest.raises(ConfigurationError) as error:
        Recipe.parse(text + " ; remove-no-ops")
    _, shown, mark = str(error.value).splitlines()
    assert len(shown) < 120 and shown[mark.index("^")] == ","
    assert "option=value should come here" in mark


def test_a_semicolon_in_quotes_does_not_end_the_first_half() -> None:
    text = 'assign-precision{overrides="a=w8a8 ; b=float"} ; remove-no-ops'
    assert str(Recipe.parse(text)) == text
