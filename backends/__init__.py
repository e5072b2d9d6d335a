"""The backends, one per folder. They import the core but no pass; the core finds them only through the registry."""
