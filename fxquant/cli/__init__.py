"""The command line: quantize a pipeline, generate with it, report on it, profile it, list what there is.

A file per command. Only what help needs is imported at the top; torch and diffusers wait until a command runs.
"""
