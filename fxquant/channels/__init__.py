"""Channel affines: make a value yield ``a * x + c`` per channel by rewriting whatever produces it.

Balancing (PTQ4DiT), smoothing (SmoothQuant) and shifting (HTG) all ask for this. ``wants`` says what is asked,
``rules`` knows for each op what that asks of its inputs, ``solve`` walks the graph, and ``apply`` rewrites it.
"""
