"""Routing and loads in other tools' files: one module per format, import only."""
