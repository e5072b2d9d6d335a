"""The backends, one a folder. They import the core, which finds them only through the registry, and never a pass."""
