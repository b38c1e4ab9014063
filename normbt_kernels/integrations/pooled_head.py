"""A scalar head that scores one token of each sequence instead of all tokens, in fp32, inside any decoder classifier.

    hidden (N, S, H) -> rows (N, H) at the last real token -> rewards (N, 1) in fp32 -> logits (N, S, 1), expanded

The classifier then picks `logits[i, its last token]` as before: every token of a sequence has the reward of that one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normbt_kernels.errors import UserError
from normbt_kernels.integrations.head import ModelInputs, compile_anew, each_at, find_head, last_token, mask_of


def pool_head(model: nn.Module, head: nn.Linear | None = None) -> PooledHead:
    """Makes the scalar head of a decoder classifier a `PooledHead`.

    Only the class of the module changes; its parameters, its name and the checkpoint's keys stay. It works on a bare or
    a peft model, before or after `get_peft_model`, and before `fully_shard`, DDP and `torch.compile` (no graph break).

    Args:
        model: a classifier whose forward takes `input_ids`, by name or position.
        head: the scalar head. Default: the last `Linear` with one output.

    Raises:
        ValueError: the model has no scalar head; or the head is pooled already, is not a plain `nn.Linear` (quantised,
            sharded by itself), or is in no module whose forward takes `input_ids`.
    """
    found = find_head(model, head)
    head = found.linear()
    if type(head) is not nn.Linear:
        raise UserError(f"only a plain nn.Linear with one output can be pooled, got {type(head).__name__}: {head}")
    if found.owner is None:
        raise UserError(f"no module of {type(model).__name__} around its head takes input_ids")
    head.__class__ = PooledHead
    head._attach(found.owner)
    compile_anew()
    return head


class PooledHead(nn.Linear):
    """A scalar head that `pool_head` has changed: it gives fp32 rewards of the pooled tokens only.

    The pooled token is the last real one of `attention_mask` (N, S), with padding on either side. A final <eos> is
    therefore scored even if it is also the pad token; transformers' classifiers would skip it. Without a mask the head
    takes their token: the rightmost one that is not the pad token.

    Its forward, and every hook on it, sees only the pooled rows (N, H). The model's logits are the rewards in fp32
    (fp64 for fp64 rows), also under autocast. The gradients are those of scoring every token in that precision. The
    heads of encoders see (N, H) anyway: they keep their rows and gain fp32 rewards.

    Only its own forward reads its weight, so sharded weights (FSDP2, ZeRO-3) are gathered as for any other layer.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """Rewards (N, 1) of rows (N, H)."""
        dtype = torch.promote_types(rows.dtype, torch.float32)
        # A product and a sum: autocast would run a matrix product in 16 bits.
        rewards = (rows.to(dtype) * self.weight.to(dtype)).sum(dim=-1, keepdim=True)
        return rewards if self.bias is None else rewards + self.bias.to(dtype)

    def _attach(self, owner: nn.Module) -> None:
        self._inputs = ModelInputs(owner)
        # (N, S, 1), kept for its shape: with a number S, torch.compile would compile again for each S.
        self._tokens: Tensor | None = None
        # Pool before all other hooks of the head, and expand after them.
        self.register_forward_pre_hook(PooledHead._pool, prepend=True)
        self.register_forward_hook(PooledHead._expand)

    def _pool(self, args: tuple[Tensor]) -> Tensor:
        (hidden,), inputs = args, self._inputs.take()
        if hidden.dim() == 2:
            return hidden
        self._tokens = hidden.detach()[:, :, :1]
        mask = mask_of(inputs, hidden)
        token = self._inputs.unpadded_token(inputs, hidden) if mask is None else last_token(mask)
        return hidden[each_at(token)]

    def _expand(self, args: tuple[Tensor], rewards: Tensor) -> Tensor:
        tokens, self._tokens = self._tokens, None
        return rewards if tokens is None else rewards[:, None].expand_as(tokens)
