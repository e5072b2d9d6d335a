"""Block reconstruction: segments of a float graph run again, with quantized linears whose grids are learned.

Only :mod:`fxquant.passes.reconstruct_blocks` imports this package. ``segments`` splits the graph, ``cache`` holds the
values that calibration calls bring to each segment, ``simulate`` runs a segment with soft weights and learned steps,
``learn`` optimizes one segment, and ``store`` keeps finished segments, so that an interrupted run continues from there.
"""
