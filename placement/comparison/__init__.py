"""Whether one plan is better than another, and how significant that is.

`compare` is the entry, `per_step` its figures, `verdict` its sentence, `promise` what an earlier
verdict said of the same plan. `intervals` says which interval is used where, here and above, and
why; `noise_band`, `bootstrap` and `cross_validation` say what chance alone would do. Knows nothing
of how plans are made.
"""
