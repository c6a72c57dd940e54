"""A whole planning run: settings and traffic in, a plan with its evidence out.

Read `planner` first. `layer_capacity` says what every layer may use, `linked_layers` numbers
devices consistently between layers, `evidence` bounds and reports. Knows nothing of a plan that
already runs.
"""
