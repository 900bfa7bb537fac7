"""What a request lets one sequence say next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.engine.grammar.token_rules import BITS, TokenRules

if TYPE_CHECKING:
    import torch

    from runtime.engine.grammar.compilations import Copy
    from runtime.engine.sequence import Sequence


class Constraint:
    """Where one sequence stands in its grammar, and the rules for its tokens, as far as there are such.

    `complete` says that nothing can follow the tokens that it has; `spent`, that nothing may follow them as
    the request has it, which shows only in a mask: the next token is void. `problem` says why the request
    cannot be met any further, if that is so, and `field` which part of it.
    """

    __slots__ = ("complete", "copy", "field", "problem", "rules", "spent")

    def __init__(self, copy: Copy | None, rules: TokenRules | None, field: str) -> None:
        self.copy = copy
        self.rules = rules
        self.field = field
        self.complete = False
        self.spent = False
        self.problem: str | None = None

    def accept(self, token_id: int) -> None:
        """Go on by a token, as drawn from what the mask leaves."""
        if self.copy is None:
            return
        matcher = self.copy.matcher
        if not matcher.consume_token(token_id):
            self.problem = (
                f"'{self.field}' cannot be followed any further: no token is left that it allows and that "
                "'bad_words' or 'logit_bias' do not rule out."
            )
        self.complete = matcher.is_stopped()

    def narrow(self, bits: torch.Tensor, sequence: Sequence, end: tuple[int, int] | None) -> bool:
        """Finish the mask [W] of the sequence's next token; False if nothing may follow.

        `end` is where the mask has the bit for the grammar's end, if that may come now.
        """
        if end is not None:
            self._let_end(bits, sequence, *end)
        if self.rules is not None:
            self.rules.apply(bits, sequence.token_ids, sequence.num_prompt)
            if not bits.any() and not self.spent:
                self.spent = True
                self.problem = (
                    f"'{self.field}' cannot be met any further: what the request allows and what it rules "
                    "out leave no token."
                )
        return not self.spent

    def _let_end(self, bits: torch.Tensor, sequence: Sequence, word: int, place: int) -> None:
        """Put the tokens that end the sequence in the place of the bit for the end."""
        assert self.copy is not None
        if len(sequence.token_ids) - sequence.num_prompt >= sequence.sampling.min_tokens:
            for token_id in sequence.stop_token_ids:
                bits[token_id // 32] |= BITS[token_id % 32]
        bits[word] &= ~BITS[place]
        # A matcher that has failed says that this is the end.
        matcher = self.copy.matcher
        self.spent = matcher.is_error() or not bits.any()
        if matcher.is_error():
            self.problem = f"'{self.field}' takes too much to follow: {matcher.get_error()}"
