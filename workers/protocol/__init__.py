"""What coordinator and ranks say to each other: steps, plans per phase, switches, transfers,
settings."""
