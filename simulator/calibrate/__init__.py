"""Timings to machine profiles: `fits` reads and fits, `machine_profile` makes the profile."""
