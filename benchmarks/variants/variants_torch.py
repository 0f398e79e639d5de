"""A dense llama whose feed-forward layers have variants, one for each group of domains (PyTorch).

Attention, norms and embeddings are shared. Every variant starts as the dense layer's own weights.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from mixture_torch import Layer, Mixture, Shape
from text_rows import Rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class VariantLayer(Layer):
    """A layer whose ``w13`` (R, 2F, D) and ``w2`` (R, D, F) hold R variants; no router."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        del self.router

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, group: int | None = None) -> Tensor:
        """Return the layer's output for x (B, T, D); ``group`` as in ``VariantModel``."""
        h = self.attend(x, cos, sin)
        w13, w2 = self.w13, self.w2
        if group is not None:
            w13, w2 = w13[group, None], w2[group, None]
        w13, w2 = w13.to(h.dtype), w2.to(h.dtype)
        parts = self.post_norm(h).reshape(len(w13), -1, x.shape[-1])
        gate, up = torch.bmm(parts, w13.transpose(1, 2)).chunk(2, dim=-1)
        return h + torch.bmm(F.silu(gate) * up, w2.transpose(1, 2)).view_as(h)


class VariantModel(Mixture):
    """A model with ``shape.experts`` variants."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.layers = nn.ModuleList(VariantLayer(shape) for _ in range(shape.layers))

    @classmethod
    def grown(cls, dense: Mixture, num_variants: int) -> "VariantModel":
        """Return a model whose variants are all copies of a dense model's layers."""
        model = cls(dataclasses.replace(dense.shape, experts=num_variants))
        own = dict(dense.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(own[name])  # (1, ...) to (R, ...) for w13 and w2
        return model

    def forward(self, tokens: Tensor, dtype: torch.dtype, group: int | None = None) -> Tensor:
        """Return last hidden states (B, T, D).

        Args:
            tokens: (B, T).
            dtype: of the products; weights are float32.
            group: whose variants read all rows; None if the rows are as many of each group, those
                of group 0 first, and each group's are read by its own.
        """
        x, cos, sin = self.embed(tokens, dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, group)
        return self.norm(x)


@dataclasses.dataclass(frozen=True)
class Scored:
    """Rows on a device; of each scored token the row and place it is predicted at, and itself."""

    tokens: Tensor
    rows: Tensor
    places: Tensor
    targets: Tensor

    @classmethod
    def of(cls, rows: Rows, indices: npt.NDArray[np.int64], device: torch.device) -> "Scored":
        """Return some rows, without the columns behind their last scored token."""
        is_target = rows.is_target[indices][:, 1:]
        row, column = np.nonzero(is_target)
        tokens = rows.tokens[indices, : column.max(initial=0) + 2].astype(np.int64)
        arrays = (tokens, row, column, tokens[row, column + 1])
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


def token_losses(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Return the (N,) float32 cross-entropy of targets, in nats; hidden is (N, D)."""
    logits = F.linear(hidden, embedding.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets, reduction="none")


def summed_loss(model: VariantModel, batch: Scored, dtype: torch.dtype, chunk: int) -> Tensor:
    """Return the summed cross-entropy of rows that are sorted by group, as many of each."""
    scored = model(batch.tokens, dtype)[batch.rows, batch.places]
    losses = [
        checkpoint(token_losses, part, model.embedding, targets, use_reentrant=False)
        for part, targets in zip(scored.split(chunk), batch.targets.split(chunk), strict=True)
    ]
    return torch.cat(losses).sum()


@torch.no_grad()
def example_losses(
    model: VariantModel, rows: Rows, groups: dict[str, int], dtype: torch.dtype, chunk: int
) -> dict[str, list[float]]:
    """Return the summed cross-entropy in nats of each example (one a row), by domain.

    Args:
        model: computed without compilation, logits in float32.
        rows: examples.
        groups: whose variants read each domain.
        dtype: of the layers' products.
        chunk: tokens whose logits exist at once.
    """
    found = {}
    device = model.embedding.device
    for domain, name in enumerate(rows.names):
        indices = np.flatnonzero(rows.domains == domain)
        batch = Scored.of(rows, indices, device)
        with torch.compiler.set_stance("force_eager"):
            hidden = model(batch.tokens, dtype, groups[name])[batch.rows, batch.places]
        losses = [
            token_losses(part.float(), model.embedding, targets)
            for part, targets in zip(hidden.split(chunk), batch.targets.split(chunk), strict=True)
        ]
        nats = torch.cat(losses).double().cpu().numpy()
        found[name] = np.bincount(batch.rows.cpu().numpy(), nats, len(indices)).tolist()
    return found
