"""The contenders, the cases on which they compete, and the fewest bytes that the work can move.

    entry    what comes in                                         gradients reach
    reward   rewards (P,) of some model, hidden states (P, H) x 2  the rewards
    linear   hidden states (2P, H) and the head                    both
    frozen   the same, from a frozen backbone                      the head
    pooled   (2P, S, H), the last token of each sequence           both
    kwise    K = 4 ranked answers per prompt: rows (N, H) that     both
             serve in several explicit pairs

The contenders in PyTorch are written as a careful user would write them: views instead of gathers where the layout
allows, distances without a graph. "eager" and "compiled" take their loss from reference/. For "pooled" they score every
token and then index, as transformers' classifiers do. Plain BT reads no distances: the difference from it is the cost
of NormBT. All of them know mu, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import reference
from normbt_kernels import linear_normbt_loss, normbt_loss

ENTRIES = ("reward", "linear", "frozen", "pooled", "kwise")
ANSWERS = 4  # of each prompt of "kwise"
PAIRS_OF_PROMPT = torch.combinations(torch.arange(ANSWERS))  # the better answer first


class Inputs(NamedTuple):
    """One buffer: the tensors that a call reads. Fields that the entry does not use are None."""

    mu: Tensor
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    chosen: Tensor | None = None
    rejected: Tensor | None = None
    hidden: Tensor | None = None
    head: Tensor | None = None
    last_token: Tensor | None = None
    pairs: Tensor | None = None
    source: Tensor | None = None  # of the copy
    destination: Tensor | None = None

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self[1:] if t is not None and t.requires_grad)


@dataclass(frozen=True)
class Case:
    """One size of one entry. P of "kwise" is rounded up to whole prompts."""

    entry: str
    num_pairs: int
    hidden_size: int
    dtype: torch.dtype
    sequence_length: int = 1

    def __post_init__(self) -> None:
        if self.entry == "kwise":
            object.__setattr__(self, "num_pairs", -(-self.num_pairs // len(PAIRS_OF_PROMPT)) * len(PAIRS_OF_PROMPT))
        if self.entry != "pooled":
            object.__setattr__(self, "sequence_length", 1)

    def __str__(self) -> str:
        sequence = f" S={self.sequence_length}" if self.entry == "pooled" else ""
        return f"{self.entry} P={self.num_pairs} H={self.hidden_size}{sequence} {str(self.dtype).split('.')[1]}"

    @property
    def num_rows(self) -> int:
        return ANSWERS * self.num_pairs // len(PAIRS_OF_PROMPT) if self.entry == "kwise" else 2 * self.num_pairs

    @property
    def row_bytes(self) -> int:
        """Bytes of the rows in pairs, each counted once: 2*P*H*s if every pair has two rows of its own."""
        return self.num_rows * self.hidden_size * self.dtype.itemsize

    @property
    def hidden_bytes(self) -> int:
        return self.row_bytes * self.sequence_length

    def floor_bytes(self) -> dict[str, int]:
        """The fewest bytes through memory: forward reads each row once, and backward writes its gradient once if it
        needs one. What is O(P) or O(H) is not counted."""
        backward = self.hidden_bytes if self.entry in ("linear", "pooled", "kwise") else 0
        return {"forward": self.row_bytes, "backward": backward, "both": self.row_bytes + backward}

    def make_inputs(self, device: torch.device, copy: bool = True) -> Inputs:
        """Standard normal rows, whose distances are near mu = sqrt(2H). With `copy`, also the two tensors with which a
        plain copy moves as many bytes as the floor of "both"."""
        options = {"device": device, "dtype": self.dtype}
        tensors = {"mu": torch.tensor((2 * self.hidden_size) ** 0.5, device=device)}
        if self.entry == "reward":
            for side in ("chosen", "rejected"):
                tensors[side] = torch.randn(self.num_pairs, self.hidden_size, **options)
                tensors[f"{side}_rewards"] = torch.randn(self.num_pairs, **options, requires_grad=True)
        else:
            shape = (self.num_rows, *([self.sequence_length] if self.entry == "pooled" else []), self.hidden_size)
            tensors["hidden"] = torch.randn(shape, **options, requires_grad=self.entry != "frozen")
            head = torch.randn(self.hidden_size, **options) / self.hidden_size**0.5
            tensors["head"] = head.requires_grad_()
        if self.entry == "pooled":
            tensors["last_token"] = torch.randint(self.sequence_length, (self.num_rows,), device=device)
        if self.entry == "kwise":
            first_answer = torch.arange(0, self.num_rows, ANSWERS).view(-1, 1, 1)
            tensors["pairs"] = (first_answer + PAIRS_OF_PROMPT).view(-1, 2).to(device)
        if copy:
            elements = self.floor_bytes()["both"] // 2 // self.dtype.itemsize
            tensors["source"] = torch.randn(elements, **options)
            tensors["destination"] = torch.empty_like(tensors["source"])
        return Inputs(**tensors)


def rewards_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    if inputs.hidden is None:
        return inputs.chosen_rewards, inputs.rejected_rewards
    rewards = F.linear(inputs.hidden, inputs.head.unsqueeze(0)).squeeze(-1)
    return sides(reference.pool(rewards, inputs.last_token), inputs.pairs)


def rows_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    if inputs.hidden is None:
        return inputs.chosen, inputs.rejected
    return sides(reference.pool(inputs.hidden.detach(), inputs.last_token), inputs.pairs)


def sides(rows: Tensor, pairs: Tensor | None) -> tuple[Tensor, Tensor]:
    return rows.chunk(2) if pairs is None else (rows[pairs[:, 0]], rows[pairs[:, 1]])


def plain_bt(inputs: Inputs) -> Tensor:
    chosen_rewards, rejected_rewards = rewards_of(inputs)
    return -F.logsigmoid(chosen_rewards - rejected_rewards).mean()


def eager_normbt(inputs: Inputs) -> Tensor:
    return reference.normbt_loss(*rewards_of(inputs), *rows_of(inputs), inputs.mu)


def ours(inputs: Inputs) -> Tensor:
    if inputs.hidden is None:
        return normbt_loss(*inputs[1:5], inputs.mu)
    pairs = "halves" if inputs.pairs is None else inputs.pairs
    return linear_normbt_loss(inputs.hidden, inputs.head, inputs.mu, pairs=pairs, last_token=inputs.last_token)


def copy(inputs: Inputs) -> Tensor:
    """As many bytes read and written. On an H200 `copy_` in a CUDA graph moves 2.7 TB/s, and 4.2 out of one, as the
    operator does that stands here in both."""
    if inputs.source.is_cuda:
        return torch.neg(inputs.source, out=inputs.destination)
    return inputs.destination.copy_(inputs.source)


@dataclass(frozen=True)
class Contender:
    """`label` names it in tables and figures."""

    label: str
    function: Callable[[Inputs], Tensor]
    color: str
    compiled: bool = False
    graphed: bool = False
    trains: bool = True

    def prepare(self, backend: str = "inductor") -> Callable[[Inputs], Tensor]:
        """The function to time. Each size is compiled by itself: the caller resets torch.compile between sizes."""
        if not self.compiled:
            return self.function
        return torch.compile(self.function, fullgraph=True, dynamic=False, backend=backend)


CONTENDERS = {
    "bt-eager": Contender("plain BT, eager", plain_bt, "#b0b0b0"),
    "bt-compiled": Contender("plain BT, torch.compile", plain_bt, "#707070", compiled=True),
    "eager": Contender("NormBT, eager", eager_normbt, "#e08a3c"),
    "compiled": Contender("NormBT, torch.compile", eager_normbt, "#b5482a", compiled=True),
    "ours": Contender("NormBT, ours", ours, "#1f6fb4"),
    "ours-graph": Contender("NormBT, ours in a CUDA graph", ours, "#74b3e8", graphed=True),
    "copy": Contender("copy of the floor's bytes", copy, "black", trains=False),
}
