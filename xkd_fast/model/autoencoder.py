"""The decoder's way through: tokens stay in the order that put the visible first, so what is masked is one slice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xkd_fast.model.attention import Attend
from xkd_fast.model.layers import mlp, residual_norm_linear
from xkd_fast.model.packing import Group, added, heads_of
from xkd_fast.model.products import through
from xkd_fast.model.vit import BlockRunner
from xkd_fast.reference import Block, Decoder


def decode_masked(decoder: Decoder, encoded: Tensor, order: Tensor, runner: BlockRunner) -> Tensor:
    """Predict the masked patches.

    Attention does not care for order: the tokens are not put back into the grid, only their positions are looked up. The last
    block's queries, its MLP and the output projection are computed for masked tokens alone.

    Args:
        decoder: its weights.
        encoded: [B, (1 +) keep, D] the student's tokens.
        order: [B, N] token numbers, the visible ones first.
        runner: how blocks are run.

    Returns:
        [B, N − keep, P] in the order of ``order[:, keep:]``.
    """
    batch, total = order.shape
    x = through(decoder.project_in, encoded)
    first, width = decoder.first, x.shape[-1]
    cls_token, visible = x[:, :first], x[:, first:]
    masked = total - visible.shape[1]
    positions = F.embedding(order, decoder.position[0, first:])
    mask_tokens = decoder.mask_token.to(x.dtype).expand(batch, masked, -1)
    tokens = torch.cat([visible, mask_tokens], dim=1) + positions
    if first:
        tokens = torch.cat([cls_token + decoder.position[:, :first], tokens], dim=1)
    length = tokens.shape[1]
    x, branch = runner.blocks(decoder.blocks[:-1], tokens.view(-1, width), [Group(batch, length)])  # type: ignore[arg-type]
    tokens = added(x, branch).view(batch, length, width)
    return runner.compile(predict_masked)(decoder, tokens, masked, runner.attention.attend, runner.kernels)


def predict_masked(decoder: Decoder, tokens: Tensor, masked: int, attend: Attend, kernels: str) -> Tensor:
    """The decoder's last block and projection for the last ``masked`` of its tokens: [B, (1 +) N, D] → [B, masked, P]."""
    block: Block = decoder.blocks[-1]  # type: ignore[assignment]
    own = tokens[:, tokens.shape[1] - masked :]
    _, qkv = residual_norm_linear(tokens, None, block.norm1, block.qkv, kernels)
    q, k, v = heads_of(qkv, block.heads)
    branch = through(block.proj, attend(q[:, :, tokens.shape[1] - masked :], k, v))
    return through(decoder.project_out, added(*mlp(own, branch, block.norm2, block.fc1, block.fc2, kernels)))
