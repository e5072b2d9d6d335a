"""Recipes: named lists of passes, one readable list per recipe.

A recipe's name ends in the precision: ``ptq4dit-w4a8``. The part before the precision names a function that takes the
precision and returns the passes. Other packages register their functions under the entry point ``fxquant.recipes`` or
with :func:`register_recipe`. Two options may come between the name and the precision, in this order:

- ``-dynamic``: every token that a linear reads gets its own range at run time.
- A rounding method for the weights; the default is nearest. ``ptq4dit-gptq-w4a8`` is ``ptq4dit-w4a8`` with GPTQ;
  ``-adaround`` learns roundings layer by layer, and ``-reconstruct`` learns them block by block.

``ptq4dit-dynamic-gptq-w4a8`` has both options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxquant.errors import ConfigurationError, PluginError, UnknownNameError, shortened
from fxquant.ir.stages import Stage, later
from fxquant.pipeline.options import convert, no_option, option_types
from fxquant.pipeline.pipeline import PASSES, Pass, Pipeline, parse_pass, parse_passes
from fxquant.pipeline.syntax import Reader
from fxquant.planning.plan import Plan
from fxquant.planning.precision import Precision
from fxquant.registry import Registry


@dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
        prepare: Passes on the captured graph before calibration, which decide what is observed.
        convert: Passes after calibration.
    """

    prepare: tuple[Pass, ...]
    convert: tuple[Pass, ...]

    def __post_init__(self) -> None:
        passes = [*self.prepare, *self.convert]
        Pipeline(passes)  # Refuses an impossible order, and options that cannot be written as text.
        for step in passes:  # A plan keeps the text of the recipe, from which the passes are made again.
            if step.name not in PASSES:
                raise ConfigurationError(
                    f"pass {step.name} is not registered, so the recipe could not be read back from a plan; decorate "
                    f"{type(step).__name__} with @register_pass"
                )
        _check_observable(self.prepare)

    def __str__(self) -> str:
        return ",".join(map(str, self.prepare)) + " ; " + ",".join(map(str, self.convert))

    @property
    def may_change_inputs(self) -> tuple[str, ...]:
        """The passes before calibration that may change what layers read, as text."""
        return tuple(str(step) for step in self.prepare if not step.keeps_inputs)

    def with_options(self, pass_name: str, **options: Any) -> Recipe:
        """The same recipe with other options for one of its passes.

        Args:
            pass_name: Name of the pass, such as ``balance-channels``.
            options: Fields of the pass, such as ``exponent=0.4``; a value of an enum may be its text.

        Raises:
            ConfigurationError: If the recipe has no such pass, or the pass no such option.
        """
        names = dict.fromkeys(step.name for step in (*self.prepare, *self.convert))
        if pass_name not in names:
            raise ConfigurationError(f"the recipe has no pass {shortened(pass_name)!r}; its passes: {', '.join(names)}")

        types = option_types(PASSES[pass_name])
        changed: dict[str, Any] = {}
        for name, value in options.items():
            if name not in types:
                given = f"{name.replace('_', '-')}={value}"
                raise ConfigurationError(no_option("pass", pass_name, given, types))
            try:
                changed[name] = convert(value, types[name])
            except ConfigurationError as error:
                raise ConfigurationError(f"{pass_name}: {name}={value!r} {error}") from None

        def change(step: Any) -> Any:
            return replace(step, **changed) if step.name == pass_name else step

        return Recipe(tuple(map(change, self.prepare)), tuple(map(change, self.convert)))

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read what ``str(recipe)`` writes: two pipelines with a semicolon between.

        Raises:
            ConfigurationError: If the text cannot be read.
        """
        reader = Reader(text, "pass")
        prepare = parse_passes(reader, ";")
        if reader.at == len(text):
            raise ConfigurationError(
                f"{shortened(text)!r} is not a recipe; write the passes before and after calibration like this: "
                "a,b ; c,d"
            )
        reader.at += 1
        return cls(tuple(prepare), tuple(parse_passes(reader)))


def _check_observable(prepare: Sequence[Pass]) -> None:
    """Refuse passes before calibration that leave graphs that cannot be observed.

    Raises:
        ConfigurationError: Names the pass.
    """
    stage, latest = Stage.CAPTURED, PASSES["insert-observers"].requires
    for step in prepare:
        stage = later(stage, step.establishes)
        if not stage <= latest:
            raise ConfigurationError(
                f"{step.name} comes before calibration and makes {stage} graphs, and calibration observes {latest} "
                "graphs at most; move it behind the semicolon of the recipe, to the passes after calibration"
            )


def recipe_of(plan: Plan) -> Recipe:
    """The recipe that a plan was made with.

    Raises:
        PluginError: If one of its passes is not registered here; the message names the package to install.
        ConfigurationError: If the recipe in the plan cannot be read.
    """
    try:
        return Recipe.parse(plan.recipe)
    except UnknownNameError as error:
        for entry in plan.passes:
            name, module = str(entry.get("pass")).partition("{")[0], entry.get("module")
            if module and name not in PASSES:
                advice = f"install that package ({module.partition('.')[0]}), or import the module first"
                if module == "__main__":
                    advice = "it was defined in a script or notebook; run that code first"
                raise PluginError(
                    f"the plan was made with the pass {name!r} of {module}, which is not known here: {advice}"
                ) from error
        raise


RecipeMaker = Callable[[Precision, str], Recipe]
"""Makes a recipe from a precision and the layers option (``default``, ``blocks``, ``all``)."""

RECIPES: Registry[RecipeMaker] = Registry("recipe", "fxquant.recipes")
"""All known recipes by name, without the precision."""

register_recipe = RECIPES.register
"""Decorator: ``@register_recipe("name")`` on a function of precision and layers that returns a :class:`Recipe`."""

ROUNDINGS = {
    "gptq": "weights rounded with second moments of their inputs, in one pass",
    "adaround": "with the same moments, learns layer by layer whether each weight is rounded up or down",
    "reconstruct": "learns roundings and input steps block by block; runs calibration calls again",
}
"""How linears are rounded; one key may come between a recipe's name and its precision, as in ``ptq4dit-gptq-w4a8``."""

DYNAMIC = "dynamic"
"""May come after a recipe's name, before the rounding: each token that a linear reads then has its own range."""

_CHOOSES = "choose-variants"
_STATIC = (_CHOOSES, "bin-ranges")  # Passes without effect where each token has its own range.
_FEW = 4  # Bits at which rounding is most of the error, so that wide branches and rotations are worth their cost.

_NAME = re.compile(r"(?P<name>.+?)-(?P<precision>w\w+a\w+(?:-g\d+|-b\d+(?:x\d+)?|-tensor)?)")


def make_recipe(recipe: str | Recipe, layers: str = "default") -> Recipe:
    """A recipe from its name, such as ``ptq4dit-w4a8``, or the recipe itself.

    Args:
        recipe: Name with precision, the text of a recipe (``passes ; passes``), or a recipe.
        layers: Which layers are quantized: ``default``, ``blocks`` or ``all``. Not used for the text of a recipe or for
            a recipe, because these say it themselves.

    Raises:
        UnknownNameError: If there is no recipe of that name.
        ConfigurationError: If the name lacks a precision or the bits are out of range.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if ";" in recipe:
        return Recipe.parse(recipe)
    match = _NAME.fullmatch(recipe)
    if match is None:
        if recipe in RECIPES:
            raise ConfigurationError(f"recipe {recipe!r} lacks a precision; write {recipe}-w8a8 or {recipe}-w4a8")
        _check_precision(recipe)
        raise UnknownNameError("recipe", recipe, (f"{name}-w4a8" for name in RECIPES))
    name, precision = match["name"], Precision.parse(match["precision"])
    if name in RECIPES:
        return RECIPES[name](precision, layers)
    method, _, last = name.rpartition("-")
    method, rounding = (method, last) if last in ROUNDINGS else (name, None)
    base, _, last = method.rpartition("-")
    by_token = method not in RECIPES and last == DYNAMIC and base != DYNAMIC
    base = base if by_token else method
    if base not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES)
    recipe = RECIPES[base](precision, layers)
    if by_token:
        recipe = _by_token(recipe)
    return recipe if rounding is None else _rounded(recipe, rounding)


def has_precision(recipe: str) -> bool:
    """Whether the name of a recipe ends in a precision, also one of formats, such as ``rtn-wfp8e5m2afp8``."""
    return _NAME.fullmatch(recipe) is not None


def _check_precision(name: str) -> None:
    """Refuse what stands behind the name of a known recipe and is not a precision, such as ``rtn-wnvfp4``.

    Raises:
        ConfigurationError: Says what is wrong with it.
    """
    parts = name.split("-")
    start = next((at for at, part in enumerate(parts) if at and part[:1] in ("w", "W")), None)
    if start is not None and parts[0] in {known.partition("-")[0] for known in RECIPES}:
        Precision.parse("-".join(parts[start:]))


def _by_token(recipe: Recipe) -> Recipe:
    """The same recipe with a range for each token that a linear reads, found at run time; nothing is left to choose."""
    recipe = Recipe(recipe.prepare, tuple(step for step in recipe.convert if step.name not in _STATIC))
    changed = ("quantize-linears", "reconstruct-blocks")
    for name in dict.fromkeys(step.name for step in recipe.convert if step.name in changed):
        recipe = recipe.with_options(name, activation_range=DYNAMIC)
    return recipe


def _rounded(recipe: Recipe, rounding: str) -> Recipe:
    """The same recipe with another rounding of the weights of linears."""
    if any(step.name == _CHOOSES for step in recipe.convert):  # It rounds the weights before quantize-linears does.
        recipe = recipe.with_options(_CHOOSES, rounding="nearest" if rounding == "reconstruct" else rounding)
    if rounding != "reconstruct":
        return recipe.with_options("quantize-linears", rounding=rounding)
    convert = list(recipe.convert)
    if any(step.name == "reconstruct-blocks" for step in convert):
        return recipe
    position = next(number for number, step in enumerate(convert) if step.name == "quantize-linears")
    names = ("weight_range", "activation_range")
    ranges = (f"{name.replace('_', '-')}={getattr(convert[position], name).value}" for name in names)
    convert.insert(position, parse_pass(f"reconstruct-blocks{{{' '.join(ranges)}}}"))
    return Recipe(recipe.prepare, tuple(convert))


def _recipe(
    precision: Precision,
    layers: str,
    *middle: str,
    ranges: str = "",
    linears: str = "",
    before: Sequence[str] = (),
) -> Recipe:
    # One string per pass, so that a recipe reads as a list of passes.
    attention = " attention=quantized" if layers == "all" else ""  # Part of the papers' setting.
    prepare = ("remove-no-ops", f"assign-precision{{precision={precision} layers={layers}{attention}}}")
    options = f"{{{ranges}}}" if ranges else ""
    products = f"quantize-attention{{{' '.join(re.findall('activation-range=[^ ]+', ranges))}}}"
    linears = f"{{{linears or ranges}}}" if linears or ranges else ""
    quantize = (f"quantize-linears{linears}", f"quantize-convolutions{options}", products, "quantize-embeddings")
    return Recipe(
        tuple(map(parse_pass, (*prepare, *before))),
        tuple(map(parse_pass, (*middle, *quantize))),
    )


def rtn(precision: Precision, layers: str) -> Recipe:
    """Round to nearest, min-max ranges: the plain baseline."""
    return _recipe(precision, layers)


def smoothquant(precision: Precision, layers: str) -> Recipe:
    """SmoothQuant with alpha 0.5: factors from the largest activation over timesteps, min-max ranges."""
    return _recipe(precision, layers, "balance-channels{salience=max}", "absorb-affines")


def smoothquant_search(precision: Precision, layers: str) -> Recipe:
    """SmoothQuant with alpha searched for each group of layers, 0 to 1 in steps of 0.1."""
    return _recipe(precision, layers, "balance-channels{salience=max search=11}", "absorb-affines")


def dynamic(precision: Precision, layers: str) -> Recipe:
    """Round to nearest; every token that a linear reads has its own range, found at run time."""
    return _recipe(precision, layers, linears="activation-range=dynamic")


def auto(precision: Precision, layers: str) -> Recipe:
    """PTQ4DiT's balancing, branches, rotations at few bits, GPTQ, and ranges chosen layer by layer."""
    if precision.activation_bits is None:
        return make_recipe(f"ptq4dit-gptq-{precision}", layers)
    middle = ["balance-channels", "absorb-affines"]
    if precision.activation_bits <= _FEW:
        middle.append("rotate-channels")
    # Float formats of 8 bits have 3 bits or fewer between two powers of two.
    if precision.weight_format is not None or (precision.weight_bits or _FEW) <= _FEW:
        middle.append("split-low-rank{iterations=4 branch=half}")
    else:
        middle.append("split-low-rank{rank=16 branch=half}")
    return _recipe(precision, layers, *middle, "choose-variants{rounding=gptq}", linears="rounding=gptq")


def repq(precision: Precision, layers: str) -> Recipe:
    """RepQ-ViT: each channel has a range whose middle and width are absorbed, so that one range remains."""
    return _recipe(
        precision,
        layers,
        "group-timesteps{groups=1}",
        "shift-channels",
        "absorb-shifts",
        "balance-channels{salience=max exponent=1}",
        "absorb-affines",
        ranges="weight-range=percentile activation-range=percentile",
    )


def single_step(precision: Precision, layers: str) -> Recipe:
    """Single-step calibration: the first step and two later ones from its output; min-max ranges, nothing else."""
    return _recipe(precision, layers, before=["observe-step{later=2}"])


def htg(precision: Precision, layers: str) -> Recipe:
    """HTG: timesteps in groups, each with its shift and range; one moving-average scale, all absorbed offline."""
    return _recipe(
        precision,
        layers,
        "group-timesteps",
        "shift-channels",
        "absorb-shifts",
        "balance-channels{salience=moving-average}",
        "absorb-affines",
        ranges="weight-range=percentile activation-range=percentile",
    )


def ptq4dit(precision: Precision, layers: str) -> Recipe:
    """PTQ4DiT: Spearman-guided balancing absorbed offline, ranges by the best of three percentiles."""
    ranges = "weight-range=percentile activation-range=percentile"
    return _recipe(precision, layers, _balance(precision), "absorb-affines", ranges=ranges)


def _balance(precision: Precision) -> str:
    # Float activations are not rounded, so only salient channels are balanced, and less of their salience moves to the
    # weights.
    for_weights = "balance-channels{exponent=0.25 salient=2}"
    return "balance-channels" if precision.activation_bits is not None else for_weights


def q_diffusion(precision: Precision, layers: str) -> Recipe:
    """Q-Diffusion: block reconstruction without balancing, ranges by the lowest squared error."""
    plain = _recipe(precision, layers, ranges="weight-range=mse activation-range=mse")
    return _rounded(plain, "reconstruct")


def svdquant(precision: Precision, layers: str) -> Recipe:
    """SVDQuant: balancing as PTQ4DiT, then a float branch of rank 32 beside each linear of the blocks."""
    ranges = "weight-range=percentile activation-range=percentile"
    middle = (_balance(precision), "absorb-affines", "split-low-rank{iterations=4 branch=half}")
    return _recipe(precision, layers, *middle, ranges=ranges)


def svdquant_bins(precision: Precision, layers: str) -> Recipe:
    """SVDQuant at 8 bits: alpha searched, branches of rank 16, and for each input a range per bin of timesteps."""
    middle = (
        "balance-channels{salience=max search=11}",
        "absorb-affines",
        "split-low-rank{rank=16 branch=half}",
        "bin-ranges",
    )
    return _recipe(precision, layers, *middle)


def quarot(precision: Precision, layers: str) -> Recipe:
    """QuaRot: inputs of the linears of the blocks are rotated by Hadamard matrices, absorbed offline where possible."""
    ranges = "weight-range=percentile activation-range=percentile"
    return _recipe(precision, layers, "rotate-channels", ranges=ranges)


def svdquant_rotated(precision: Precision, layers: str) -> Recipe:
    """SVDQuant on inputs that are balanced and then rotated: the best of these recipes at 4 bits."""
    ranges = "weight-range=percentile activation-range=percentile"
    middle = (_balance(precision), "absorb-affines", "rotate-channels", "split-low-rank{iterations=4 branch=half}")
    return _recipe(precision, layers, *middle, ranges=ranges)
