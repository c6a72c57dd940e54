"""Measurements to machine profiles: `measurements` reads, `fits` fits, `machine_profile` joins
them."""
