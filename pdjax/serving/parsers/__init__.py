"""Readers of what models write besides plain text: calls of tools, and reasoning. A file a syntax;
`registry.py` lists them by name."""
