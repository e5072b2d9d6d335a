"""Chooses the precision of each layer, from measured sensitivities and a target: size, quality or speed."""
