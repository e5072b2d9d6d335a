"""Facts about a float model before it is captured (device, dtype, class), and checks that refuse unsuitable models."""

from __future__ import annotations

import hashlib
import itertools
import keyword
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxquant.calibration.calibrate import refuse_redirected
from fxquant.capture.hooks import refuse_hooks
from fxquant.capture.whole import own_class, whole_of
from fxquant.disk.finished_work import digest_of_tensors
from fxquant.errors import AlreadyCompiledError, ConfigurationError, NonFiniteError
from fxquant.ir.tensors import weights_of
from fxquant.memory.bound import relax
from fxquant.numerics.finite import require_finite
from fxquant.runtime.drop_in import DropIn


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first tensor; the CPU if it has none."""
    return next((tensor.device for tensor in weights_of(model).values()), torch.device("cpu"))


def class_path(model: nn.Module) -> str:
    """The import path of a model's class: ``diffusers:DiTTransformer2DModel``, or its module and its name.

    For a part of a model, the path of the part follows: ``diffusers:AutoencoderKL/decoder``.
    """
    cls, whole = own_class(model), whole_of(model)
    root = cls.__module__.partition(".")[0]
    part = "" if whole is None else f"/{whole.path}"
    return f"{root if root in ('diffusers', 'transformers') else cls.__module__}:{cls.__qualname__}{part}"


_DIGESTED = 1024  # Elements of each tensor that a digest of the weights reads.


def weights_digest(model: nn.Module) -> str:
    """A digest of the names, shapes and dtypes of a model's tensors, and of 1,024 elements of each.

    It distinguishes models that were trained differently, at a small cost. Damage of single elements may go unnoticed.
    """
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in weights_of(model).items():
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // _DIGESTED)].cpu().contiguous()
        found.update(some.view(torch.uint8).numpy().tobytes())
        relax()
    return found.hexdigest()


def whole_digest(model: nn.Module) -> str:
    """A digest of all values of a model's tensors, for results that are kept in files."""
    return digest_of_tensors(weights_of(model))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a model reports (some models keep a part in float32); else that of its first float tensor."""
    said = getattr(model, "dtype", None)
    if isinstance(said, torch.dtype):
        return said
    tensors = weights_of(model).values()
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def check_model(model: Any) -> None:
    """Refuse anything that is not a float model from which a graph can be captured.

    Raises:
        AlreadyCompiledError: If fxquant made it.
        ConfigurationError: If it is not a module, went through ``torch.compile``, has hooks or is being calibrated, or
            if a module is called like a keyword of Python.
    """
    if isinstance(model, DropIn):
        raise AlreadyCompiledError("this model was made by fxquant; give the original float model")
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"a {type(model).__name__} is not a model; give the transformer itself, such as pipe.transformer"
        )
    compiled = next((path for path, part in model.named_modules() if "_orig_mod" in part._modules), None)
    if compiled is not None:  # An isinstance check would need a class that is slow to import.
        raise ConfigurationError(
            f"{f'module {compiled!r}' if compiled else 'this model'} went through torch.compile; give the original "
            "to fxquant, and the result of fxquant to torch.compile. In the other order fxquant cannot see a graph"
        )
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        part = next(filter(keyword.iskeyword, name.split(".")), None)
        if part is not None:
            raise ConfigurationError(
                f"{name!r} holds {part!r}, a keyword of Python, and the code of a graph could not read it; rename the "
                "module"
            )
    refuse_hooks(model)
    refuse_redirected(model)


def refuse_adapters(model: nn.Module) -> None:
    """Refuse models with adapters in their layers.

    Raises:
        ConfigurationError: Names the layer, and says how to fuse the adapter into the weights.
    """
    for name, module in model.named_modules():
        if any(
            base.__name__ == "BaseTunerLayer" and base.__module__.startswith("peft.") for base in type(module).__mro__
        ):
            raise ConfigurationError(
                f"layer {name!r} of the model holds an adapter, such as a LoRA. Fuse it into the weights first: "
                "pipe.fuse_lora(), then pipe.unload_lora_weights(). Or unload it, compile the model, and load it into "
                "the quantized model, where it can be scaled, switched off and swapped"
            )


def check_storage(model: nn.Module) -> None:
    """Refuse weights that are not plain floats: weights without values, and weights that were already quantized."""
    for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
        kind, dtype = type(weight), weight.dtype
        # Wrapper classes hold other tensors; bitsandbytes and GGUF hold packed bytes in parameter classes of their own.
        packed = kind not in (nn.Parameter, nn.Buffer, Tensor) and not dtype.is_floating_point
        if is_lazy(weight) or weight.is_meta:
            found = "without values" + (", on the meta device" if weight.is_meta else "")
            advice = "load the weights first; if accelerate offloads them, load the model again without offloading"
        elif packed or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            held = type(weight.data) if kind is nn.Parameter else kind
            found = f"a {held.__qualname__} of {held.__module__}"
            advice = "load the float model, neither quantized nor distributed by another library"
        elif weight.is_quantized or (dtype.is_floating_point and dtype.itemsize < 2):
            found = f"stored as {dtype}"
            advice = "load the float model, in bfloat16 or float32, without enable_layerwise_casting"
        else:
            continue
        raise ConfigurationError(
            f"{name!r} of the model is {found}; fxquant starts from floating-point weights of 16, 32 or 64 bits: "
            f"{advice}"
        )


def check_weights(model: nn.Module) -> None:
    """Refuse NaN and infinity in parameters. Buffers are not checked: a mask holds minus infinity on purpose.

    Raises:
        NonFiniteError: Names the parameter.
    """
    for name, weight in model.named_parameters():
        try:
            require_finite(weight.detach(), f"weight {name!r} of the model")
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error} Load the model again, in bfloat16 or float32 if a cast to float16 overflowed."
            ) from None
