"""LoRAs on a quantized model: float side branches of low rank beside the quantized layers of its graphs.

``stand_in`` has the original's class without weights, on which diffusers and peft load, weigh and delete adapters;
``branches`` inserts the branches into graphs; ``folding`` brings A and B into the coordinates of a rewritten layer;
``adapters`` keeps the two in step. With no adapter loaded a model is not touched at all.
"""
