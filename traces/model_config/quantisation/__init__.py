"""What quantisers write: formats and the bytes they take, their keys, their patterns of names.

`formats` first; `quantisers` reads one document's format, `module_names` tells which modules a
pattern means. Knows nothing of configurations, files or models.
"""
