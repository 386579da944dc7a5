"""Which token lies in which column of a padded batch.

A row's tokens are its columns where the attention mask is 1, in order; padding before them shifts columns, not positions.
Padding columns are masked out: whatever they hold, nothing sees it. But what lies behind a *gap*, padding that follows a
token, is not what the bare sequence would give: transformers numbers generated tokens on from the last column, padding or
not, and sliding windows count columns. So a row counts up to its first gap: right-padded prompts, not their answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts on the CPU.

    Attributes:
        ids: token ids, (rows, columns) int64.
        mask: which columns hold tokens, (rows, columns) bool.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def rows(self) -> int:
        """Batch size."""
        return self.ids.shape[0]

    @property
    def columns(self) -> int:
        """Columns of the prompt, padding included."""
        return self.ids.shape[1]

    @cached_property
    def before(self) -> torch.Tensor:
        """Tokens in the first c columns of each row, (rows, columns + 1) int64."""
        counts = torch.zeros(self.rows, self.columns + 1, dtype=torch.int64)
        torch.cumsum(self.mask, 1, out=counts[:, 1:])
        return counts

    def tokens(self, row: int) -> torch.Tensor:
        """The row's token sequence."""
        return self.ids[row][self.mask[row]]

    def gaps(self) -> torch.Tensor:
        """The first column of each row that is padding *after* a token, or the number of columns; (rows,) int64."""
        gap = ~self.mask & (self.before[:, :-1] > 0)
        return torch.where(gap.any(1), gap.int().argmax(1), self.columns)

    def shared_columns(self, hits: list[int], stop: int) -> int:
        """The most leading columns, at most `stop`, that need no more than `hits[row]` tokens of each row.

        0 if they would hold no token at all.
        """
        fits = (self.before[:, : stop + 1] <= torch.tensor(hits)[:, None]).all(0)
        columns = int(fits.sum()) - 1  # counts never fall, so what fits is a prefix
        return columns if columns > 0 and int(self.before[:, columns].max()) > 0 else 0

    def extended(self, sequences: torch.Tensor, computed: int) -> Prompt:
        """Prompt and generated tokens: the first `computed` columns of `sequences` (rows, more columns), on the CPU."""
        ids = sequences[:, :computed].to("cpu", torch.int64)
        grown = torch.ones(self.rows, computed - self.columns, dtype=torch.bool)
        return Prompt(ids, torch.cat([self.mask, grown], 1))

    def until_end(self, prompt_columns: int, ends: tuple[int, ...]) -> Prompt:
        """Without the padding that rows get while others are still being generated: nothing after a row's first end."""
        if not ends or self.rows == 1:
            return self
        ended = torch.isin(self.ids, torch.tensor(ends))
        ended[:, :prompt_columns] = False
        past = ended.cumsum(1) - ended.long() > 0
        return Prompt(self.ids, self.mask & ~past)

    def slots(self, row: int, *, first: int, last: int, count: int) -> torch.Tensor:
        """Where the row's first `count` tokens lie in a tensor that holds columns [first, last) of every row.

        Returns:
            (count,) int64, `row · (last − first) + column − first`; −1 for tokens of other columns.
        """
        columns = self.mask[row].nonzero().squeeze(1)[:count]
        inside = (columns >= first) & (columns < last)
        return torch.where(inside, columns - first + row * (last - first), -1)
