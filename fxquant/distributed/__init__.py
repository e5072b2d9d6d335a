"""Several processes that work on one conversion, started by torchrun or accelerate: what they tell each other.

Nothing here is imported while one process works alone. ``team`` exchanges values and notices ranks that fail,
``agreement`` compares what the ranks were given, ``launch`` joins the processes of a command, ``meeting`` is where they
find each other.
"""
