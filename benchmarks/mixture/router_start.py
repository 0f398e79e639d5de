"""First routers of a mixture: balanced clusters of the tokens that each layer sees."""

import numpy as np
import torch
import torch.nn.functional as F
from mixture_torch import Mixture
from text_rows import Rows
from torch import Tensor


def sample_tokens(rows: Rows, num_rows: int, seed: int = 0) -> Tensor:
    """Return (num_rows, T) token ids, as many rows of each domain as of the others."""
    generator = np.random.default_rng(seed)
    by_domain = [
        generator.permutation(np.flatnonzero(rows.domains == domain))
        for domain in range(len(rows.names))
    ]
    turns = [found[turn] for turn in range(num_rows) for found in by_domain if turn < len(found)]
    return torch.from_numpy(rows.tokens[np.array(turns[:num_rows])].astype(np.int64))


@torch.no_grad()
def start_routers(model: Mixture, tokens: Tensor, dtype: torch.dtype, scale: float) -> None:
    """Set every router: one direction a variant, the same for all of its slices.

    Args:
        model: freshly grown.
        tokens: (R, T) text that is clustered.
        dtype: of the products.
        scale: standard deviation of the logits, over variants.
    """
    x, cos, sin = model.embed(tokens, dtype)
    variants = model.shape.experts // model.shape.slices
    for layer in model.layers:
        h = torch.cat([layer.attend(part, cos, sin) for part in x.split(8)])
        y = layer.post_norm(h)
        directions = balanced_directions(y.float(), variants, scale)
        layer.router.copy_(directions.repeat_interleave(model.shape.slices, dim=0))
        mixed = [layer.mix(part.flatten(0, 1))[0] for part in y.split(8)]
        x = h + torch.cat(mixed).view_as(h)


@torch.no_grad()
def unit_orders(dense: Mixture, tokens: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return each layer's units, those first whose contributions have the largest energy."""
    x, cos, sin = dense.embed(tokens, dtype)
    orders = []
    for layer in dense.layers:
        h = torch.cat([layer.attend(part, cos, sin) for part in x.split(8)])
        y = layer.post_norm(h)
        energy = sum(layer.units(part).float().square().sum((0, 1)) for part in y.split(8))
        orders.append((energy * layer.w2[0].square().sum(0)).argsort(descending=True))
        x = h + torch.cat([layer.mix(part.flatten(0, 1))[0] for part in y.split(8)]).view_as(h)
    return orders


def balanced_directions(y: Tensor, num: int, scale: float, rounds: int = 5) -> Tensor:
    """Return (num, D) directions that part tokens (R, T, D) into clusters of about equal size.

    Clusters start from whole rows (contexts), so that they follow what a text is about, and are
    then refined on tokens. The part that all tokens share carries each cluster's offset.
    """
    tokens = y.flatten(0, 1)
    mean = F.normalize(tokens.mean(0), dim=0)
    common = tokens @ mean
    level = common.mean()
    rest = tokens - common[:, None] * mean
    centres = _row_centres(rest.view_as(y).mean(1), num)
    offsets = torch.zeros(num, device=y.device)
    for round_number in range(rounds):
        centres = F.normalize(centres - centres.mean(0), dim=1)
        logits = rest @ centres.T
        centres = centres / (logits - logits.mean(1, keepdim=True)).std()
        logits = rest @ centres.T
        offsets = _even_offsets(logits, common / level, offsets)
        owner = (logits + (common / level)[:, None] * offsets).argmax(1)
        if round_number < rounds - 1:
            one_hot = F.one_hot(owner, num).float()
            centres = (one_hot.T @ rest) / one_hot.sum(0).clamp(min=1)[:, None]
    return scale * (centres + offsets[:, None] / level * mean)


def _even_offsets(logits: Tensor, ratio: Tensor, offsets: Tensor) -> Tensor:
    """Return offsets under which every cluster owns about as many tokens."""
    num = logits.shape[1]
    step = 1.0
    for _ in range(60):
        owner = (logits + ratio[:, None] * offsets).argmax(1)
        loads = torch.bincount(owner, minlength=num).float() / len(owner)
        offsets = offsets - step * (loads * num - 1).clamp(-1, 1)
        step *= 0.93
    return offsets - offsets.mean()


def _row_centres(contexts: Tensor, num: int) -> Tensor:
    """Return num centres of contexts (R, D): farthest first, then ten rounds of k-means."""
    unit = F.normalize(contexts - contexts.mean(0), dim=1)
    chosen = [int(unit.norm(dim=1).argmax())]
    for _ in range(num - 1):
        chosen.append(int((unit @ unit[chosen].T).amax(1).argmin()))
    centres = unit[chosen]
    for _ in range(10):
        one_hot = F.one_hot((unit @ centres.T).argmax(1), num).float()
        centres = F.normalize(one_hot.T @ unit + 1e-6 * centres, dim=1)
    return centres
