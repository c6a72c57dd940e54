"""What engines write: SGLang's recorder, TensorRT-LLM's statistics, responses with routing.

One module per form. Knows the engines' keys and axes. Knows nothing of how dumps are recognised.
"""
