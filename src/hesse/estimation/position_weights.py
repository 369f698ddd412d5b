"""How much each position of a calibration sample counts in a block: by the attention that it receives there."""

import torch
from torch import Tensor

from hesse.networks.attention import attention_received
from hesse.networks.network import Block
from hesse.passes.stream import StreamBatch

LEAST = 0.1  # of the position that receives least attention; that with the most has 1


def position_weights(flows: list[StreamBatch], block: Block, index: int) -> list[Tensor] | None:
    """The weights of each flow's positions (samples, tokens), from a pass through the block; None without attention.

    A sample's weights lie between LEAST and 1, in a line with the attention that its positions receive. Source: RSQ
    (Sung et al., 2025), whose best of several weights this is.
    """
    found: list[Tensor] = []
    with torch.no_grad():
        for flow in flows:
            with attention_received(block.module) as attention:
                flow.through(block.module, index)
            if not attention:
                return None
            found.append(in_range(torch.stack(attention).sum(0)))
    return found


def in_range(attention: Tensor) -> Tensor:
    """`attention` (samples, tokens) mapped in a line to [LEAST, 1] in each sample; 1 where all receive alike."""
    least, most = attention.amin(1, keepdim=True), attention.amax(1, keepdim=True)
    share = torch.where(most > least, (attention - least) / (most - least), 1.0)
    return LEAST + (1 - LEAST) * share
