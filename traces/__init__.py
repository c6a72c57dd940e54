"""What happened: which experts a router chose, in which steps, and when requests came.

Read `trace` (the recorded choices), `steps` (how they become the steps a plan is judged on),
`model_spec` (the model's sizes) and `profile` (a compact stand-in) first. `model_config/` reads a
model's sizes from its own files, `catalogue` has those of published models. Then: `storage/` keeps
traces on disk, `recording/` writes them from a running model, `formats/` reads other tools' dumps,
`analysis/` says what a trace holds and whether it drifts, `synth/` makes one. Knows nothing of
placement: ids are logical experts everywhere.
"""
