"""Integrations with other packages, each imported by its own name and only then."""
