"""The passes, one a file. They import the core, which finds them only through the registry."""
