"""From logits to tokens on the device.

A row of logits is cut into chunks, one program each, whatever the batch; every sum over a row is one of
integers (a probability is a whole number of 2^-40 of the likeliest token's) or is taken in a fixed order.
So a request's tokens do not depend on what else is in the batch.

    parameters.py   what is kept of each request's sampling parameters, by slot
    adjust.py       penalties, biases and banned tokens
    mask.py         what grammars rule out
    scan.py         the largest logit of each chunk: all that greedy rows need
    threshold.py    where top-k and top-p cut
    draw.py         one token of those that are left
    sampler.py      these stages in order, as far as a batch needs them
    logprobs.py     log probabilities of the tokens drawn, and of the likeliest
"""
