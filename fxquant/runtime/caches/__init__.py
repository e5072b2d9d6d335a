"""Caches of denoising steps: they skip a part of a graph whose result is like that of the step before."""
