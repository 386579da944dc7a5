"""Maps tokens to columns of a padded batch.

A row's tokens are its columns where the attention mask is 1, in order; padding before them shifts columns, not positions.
Padding columns are masked out, so their KV is never attended to. But KV after a *gap* (padding that follows a token) differs
from that of the unpadded sequence: transformers numbers generated tokens on from the last column, padding or not, and
sliding windows count columns. Hence a row is cached up to its first gap: right-padded prompts are, their answers are not.
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
        mask: True where a column holds a token, (rows, columns) bool.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    @cached_property
    def rows(self) -> int:
        """Batch size."""
        return self.ids.shape[0]

    @cached_property
    def columns(self) -> int:
        """Number of columns of the prompt, including padding."""
        return self.ids.shape[1]

    @cached_property
    def before(self) -> torch.Tensor:
        """`before[row, c]`: number of tokens in the row's first c columns, (rows, columns + 1) int64."""
        counts = torch.zeros(self.rows, self.columns + 1, dtype=torch.int64)
        torch.cumsum(self.mask, 1, out=counts[:, 1:])
        return counts

    def tokens(self, row: int) -> torch.Tensor:
        """Token ids of one row, without padding, 1-D."""
        return self.ids[row][self.mask[row]]

    def gaps(self) -> torch.Tensor:
        """First column of each row that is padding *after* a token, or the number of columns; (rows,) int64."""
        gap = ~self.mask & (self.before[:, :-1] > 0)
        return torch.where(gap.any(1), gap.int().argmax(1), self.columns)

    def shared_columns(self, hits: list[int], stop: int) -> int:
        """Returns the largest number of leading columns, at most `stop`, with no more than `hits[row]` tokens in any row.

        0 if those columns hold no token at all.
        """
        fits = (self.before[:, : stop + 1] <= torch.tensor(hits)[:, None]).all(0)
        columns = int(fits.sum()) - 1  # counts are non-decreasing, so `fits` is a prefix
        return columns if columns > 0 and int(self.before[:, columns].max()) > 0 else 0

    def extended(self, sequences: torch.Tensor, computed: int) -> Prompt:
        """Returns prompt plus generated tokens: the first `computed` columns of `sequences` (rows, more columns), on the CPU."""
        ids = sequences[:, :computed].to("cpu", torch.int64)
        grown = torch.ones(self.rows, computed - self.columns, dtype=torch.bool)
        return Prompt(ids, torch.cat([self.mask, grown], 1))

    def until_end(self, prompt_columns: int, ends: tuple[int, ...]) -> Prompt:
        """Masks every column after a row's first end token: padding that rows get once they have finished before others."""
        if not ends or self.rows == 1:
            return self
        ended = torch.isin(self.ids, torch.tensor(ends))
        ended[:, :prompt_columns] = False
        past = ended.cumsum(1) - ended.long() > 0
        return Prompt(self.ids, self.mask & ~past)

    def slots(self, row: int, *, first: int, last: int, count: int) -> torch.Tensor:
        """Slot mapping of the row's first `count` tokens into a tensor that holds columns [first, last) of every row.

        Returns:
            (count,) int64, `row · (last − first) + column − first`; −1 for tokens in other columns.
        """
        columns = self.mask[row].nonzero().squeeze(1)[:count]
        inside = (columns >= first) & (columns < last)
        return torch.where(inside, columns - first + row * (last - first), -1)
