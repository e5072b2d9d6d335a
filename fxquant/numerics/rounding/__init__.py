"""Rounding methods that choose between the codes next to a weight by the statistics of the layer's inputs."""
