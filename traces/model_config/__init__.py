"""What a model's own files say of its experts, as the fields of a ModelSpec.

Read `checkpoint` first: it puts together what the others find. `files` finds the configuration and
what lies beside it, `fields` a quantity under its many names, `families` what an architecture's
code decides where the file is silent. `layers` says which layers are MoE, `draft` which come after
them. Bytes: `quantisation/` knows what formats take and what quantisers write, `schemes` which of a
model's modules they mean by it, `expert_size` what an expert takes in all, `dense_weights` what
stands beside the experts. `on_disk` reads the `headers` of weights, which decide where there are
any: `differences` says so. What is read with a doubt becomes a note that begins with the figure it
may change. Knows nothing of torch.
"""
