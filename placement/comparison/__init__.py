"""Whether one plan is better than another, and how sure that is.

`compare` is the entry, `per_step` its figures, `verdict` its sentence; `bootstrap`, `noise_band`
and `cross_validation` say what chance alone would do. Knows nothing of how plans are made.
"""
