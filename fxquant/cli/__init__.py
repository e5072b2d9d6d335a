"""The command line: quantize a pipeline, generate images, export, report, profile, and show what there is.

Each command has its own file. Module level imports only what the help needs; torch and diffusers are imported when a
command runs.
"""
