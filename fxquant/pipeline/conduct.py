"""What a pass does besides its edits: it returns nothing, keeps its options, decides well, and answers questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fxquant.errors import ConfigurationError, FxquantError, PassError
from fxquant.planning.plan import Plan

if TYPE_CHECKING:
    from fxquant.pipeline.pipeline import Pass


def ask(step: Pass, method: str, *arguments: Any) -> Any:
    """Call a method of a pass, such as ``wants_moments``.

    Raises:
        PassError: If it raises an error that is not an :class:`FxquantError`; names the pass and the method.
    """
    try:
        return getattr(step, method)(*arguments)
    except FxquantError:
        raise
    except Exception as error:
        raise PassError(f"pass {step}: its method {method} failed: {type(error).__name__}: {error}") from error


def check_repeats(passes: Sequence[Pass], plan: Plan) -> None:
    """Refuse two passes of one name that decide about the same layer with different options.

    The first decision stays, so the second pass would do nothing.

    Raises:
        ConfigurationError: Names both passes and the layer.
    """
    for number, second in enumerate(passes):
        for first in passes[:number]:
            if first.name != second.name or str(first) == str(second):
                continue
            for name, layer in plan.layers.items():
                if ask(first, "decides", name, layer) and ask(second, "decides", name, layer):
                    raise ConfigurationError(
                        f"the recipe has {first} and {second}, and both decide about layer {name!r}, where only the "
                        f"first one would count; {_remedy(second)}"
                    )


def _remedy(step: Pass) -> str:
    options = [option.name for option in fields(step) if option.name in ("layers", "roles")]  # type: ignore[arg-type]
    apart = f"give them different {' or '.join(options)}, or " if options and step.name != "assign-precision" else ""
    return f"{apart}keep one {step.name}"


def check_conduct(before: str, after: str, returned: object) -> None:
    """Refuse a pass that returned something, or that has other options than before it ran.

    Args:
        before: Text of the pass before it ran.
        after: Text of the pass afterwards.
        returned: What its ``run`` returned.

    Raises:
        PassError: Names the pass.
    """
    if returned is not None:
        raise PassError(
            f"pass {before}: run() returned a {type(returned).__name__}, which nothing reads: a pass edits the graph "
            "by its rewriter and returns nothing (a function with yield does not run)"
        )
    if before != after:
        raise PassError(
            f"pass {before} changed its own options to {after} while it ran, so the recipe in the plan does not stand "
            "for it; decorate the class with @dataclass(frozen=True), and put decisions into the plan"
        )


def check_decisions(text: str, given: Plan, plan: Plan, earlier: Plan) -> None:
    """Refuse a pass that exchanged or emptied the plan, or put a value into it that no plan can hold.

    Later passes would fail because of it, or decide again what was decided.

    Args:
        text: Text of the pass.
        given: The plan of the context that the pass was given.
        plan: The plan after the pass, which should be the same object.
        earlier: A copy of the plan from before the pass, which could be saved.

    Raises:
        PassError: Names the pass and the entry of the plan.
    """
    if given is not plan:
        raise PassError(
            f"pass {text} put another plan into context.plan, which nothing reads; let it change entries of the plan"
        )
    try:
        plan.check_changes(earlier)
    except ConfigurationError as error:
        raise PassError(
            f"pass {text} put a value into the plan that cannot be saved: {error}. Let the pass write a value of the "
            "type that the plan documents, for example float(x) for a tensor of one number"
        ) from error
    for what in ("layers", "attentions"):
        if lost := getattr(earlier, what).keys() - getattr(plan, what).keys():
            raise PassError(
                f"pass {text} removed {min(lost)} from plan.{what}, and with it what earlier passes decided; let it "
                "change single fields, for example layer.weight_bits = None to keep a layer in float"
            )
