"""Keys of the ``meta`` of nodes and graph modules."""

from __future__ import annotations

BORDERS = "fxquant_borders"
"""Key of ``node.meta`` for the modules that receive or return the value (:mod:`fxquant.ir.borders`)."""

BORDER_CHANGES = "fxquant_border_changes"
"""Key of ``node.meta`` of such values for what passes did to them: a tuple of :class:`fxquant.ir.borders.Change`."""

LAYER = "fxquant_layer"
"""Key of ``node.meta`` for the stable name of a linear, convolution or embedding."""

NAMES = "fxquant_names"
"""Key of a graph module's ``meta`` for the names that the model itself uses: True for tensors, False for modules."""

ITEM = "fxquant_item"
"""Key of the ``meta`` of a placeholder that is an item of a list: the name of the list."""

PROVENANCE = "fxquant_provenance"
"""Key of ``node.meta`` for a tuple of :class:`Origin`, the oldest first."""

ROLE = "fxquant_role"
"""Key of ``node.meta`` for what the node does in layers: a dict from layer name to role (:mod:`fxquant.ir.roles`)."""
