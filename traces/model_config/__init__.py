"""What a model's own files say of its experts, as the fields of a ModelSpec.

Read `checkpoint` first: it puts together what the others find.
"""
