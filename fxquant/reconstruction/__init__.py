"""Block reconstruction: parts of a float graph are run again, with quantized linears whose grids are being learned.

The room of :mod:`fxquant.passes.reconstruct_blocks`, which alone enters: ``segments`` parts the graph, ``cache`` holds
what calibration calls bring to each part, ``simulate`` runs a part with soft weights and learned steps, ``learn``
optimizes one part, and ``store`` keeps what is finished, so that a run that was cut off goes on from there.
"""
