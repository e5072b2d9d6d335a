"""A text that is equal for callables that compute the same: their classes, options and code, without weights.

Code of functions that they call is not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from fxquant.disk.finished_work import digest_of_tensor, digest_of_tensors

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_OF_MODULES = frozenset(vars(nn.Module()))  # What every module has for torch itself.
_DEEPEST = 4


def described(what: Any) -> str:
    """The classes, options and code of a module, function or other callable."""
    if isinstance(what, nn.Module):
        return "; ".join(f"{name} {_of_object(part)}" for name, part in what.named_modules())
    return _value(what, _DEEPEST)


def digest_of_state(what: Any, text: str = "") -> str:
    """SHA-256 of a text and, if it is a module, of its tensors."""
    state = what.state_dict() if isinstance(what, nn.Module) else {}
    return digest_of_tensors({name: value for name, value in state.items() if isinstance(value, Tensor)}, text)


def _of_object(what: Any, depth: int = _DEEPEST) -> str:
    kind = type(what)
    options = {
        name: value
        for name, value in sorted(getattr(what, "__dict__", {}).items())
        if not (isinstance(what, nn.Module) and name in _OF_MODULES)
    }
    shown = ", ".join(f"{name}={_value(value, depth - 1)}" for name, value in options.items())
    return f"{kind.__module__}.{kind.__qualname__}({shown}) {' '.join(_methods(kind))}"


def _methods(kind: type) -> Iterator[str]:
    """The code of a class and of those that it inherits from, other than torch's."""
    for base in kind.__mro__:
        if base.__module__.split(".")[0] not in ("torch", "builtins"):
            for name, member in sorted(vars(base).items()):
                function = getattr(member, "__func__", member)  # Of static and class methods.
                if isinstance(function, FunctionType):
                    yield f"{name}: {_function(function, 1)}"


def _value(value: Any, depth: int) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if depth <= 0:
        return f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_value(k, 1)}: {_value(v, depth - 1)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(_value(item, depth - 1) for item in value)})"
    if isinstance(value, (set, frozenset)):
        return f"set({', '.join(sorted(_value(item, depth - 1) for item in value))})"
    if isinstance(value, MethodType):
        return f"{_value(value.__func__, depth)} of {_value(value.__self__, depth - 1)}"
    if isinstance(value, FunctionType):
        return _function(value, depth)
    if isinstance(value, Tensor):
        return digest_of_tensor(value)
    if isinstance(value, nn.Module):
        return described(value)
    return _of_object(value, depth)


def _function(function: FunctionType, depth: int) -> str:
    closure = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *closure]
    given = ", ".join(_value(value, depth - 1) for value in held)
    return f"{function.__module__}.{function.__qualname__}[{_code(function.__code__)}]({given})"


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # A name that is not set yet.
        return False


def _code(code: CodeType) -> str:
    constants = [_code(item) if isinstance(item, CodeType) else _value(item, 2) for item in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
