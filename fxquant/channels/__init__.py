"""Channel affines: make a value yield ``a * x + c`` per channel by rewriting the ops that produce it.

Balancing (PTQ4DiT), smoothing (SmoothQuant) and shifting (HTG) all request this. ``wants`` defines the requests,
``rules`` holds for each op what a request asks of the op's inputs, and ``walk`` walks the graph and finds the edits.
"""
