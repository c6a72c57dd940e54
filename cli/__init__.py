"""How it is typed: one file a verb; options, printing, exit codes. No logic, no heavy import
outside a verb.

`main` is the entry; `options`, `output` and `progress` are shared.
"""
