"""What happened: which experts a router chose, in which steps, and when requests came.

Read `trace` (the recorded choices), `steps` (how they become the steps a plan is judged on),
`model_spec` (the model's sizes) and `profile` (a compact stand-in) first. `model_config/` reads a
model's sizes from its own files, `catalogue` has those of published models, `model_layers` says
which rows of a dump are which of its layers. Then: `storage/` keeps traces on disk, `recording/`
writes them from a running model, `formats/` reads other tools' dumps and `arrival_files` their
arrivals, `analysis/` says what a trace holds and whether it drifts, `synth/` makes one. Knows
nothing of placement: ids are logical experts everywhere.
"""
