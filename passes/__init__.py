"""The passes, one per file. Passes import the core; the core finds passes only through the registry."""
