"""The intermediate representation: FX graphs of ATen ops and of the operators ``torch.ops.fxquant.*``.

Importing any module of this package registers these operators.
"""

from fxquant.ir import ops

__all__ = ["ops"]
