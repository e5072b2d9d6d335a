"""Passes and what runs them: pipelines, recipes, backends and the registries in which they are found."""
