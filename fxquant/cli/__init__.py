"""The command line: quantize, generate, export; report, inspect, explain, compare, attribute errors; profile, list.

``new-pass`` writes a package for authors of passes. Each command has its own file. Module level imports only what the
help needs; torch and diffusers are imported when a command runs.
"""
