"""Quantized models on several ranks: which channels each rank holds, and graphs that exchange what they lack.

``styles`` chooses how each linear is divided, from the graph; ``rules`` says how a division passes through an op.
``insertion`` rewrites a graph to the part of one rank, with the functions of ``exchange`` between ranks, and ``cuts``
divides its tensors. ``plan`` shows the choice, ``parallelize`` carries it out.
"""
