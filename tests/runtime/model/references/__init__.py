"""Families that transformers has no class for, written out plainly from what their releases publish.

Each module saves a tiny random checkpoint with the family's own keys and names, and returns a function from
tokens, of which the first `num_prompt` are the prompt, to the logits after each of them [T, vocab_size].
Nothing here is shared with the runtime: no cache, no batches, one sequence at a time.
"""
