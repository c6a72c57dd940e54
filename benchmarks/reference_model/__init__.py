"""How the reference model in `workers/reference/` was trained and measured."""
