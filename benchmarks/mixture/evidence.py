"""What selects experts for a domain: its description, examples of it, other text, or nothing."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ifp_mlx.chat.chat_template import ChatTokenizer, chat_ids
from ifp_mlx.evaluation.quality import DOCUMENT_PREFIX, DOCUMENT_PROMPT_TOKENS
from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.expert_statistics import CRITERIA, ExpertStatistics
from ifp_mlx.selection.selection import Selection
from ifp_mlx.selection.selectors import (
    BlendSelector,
    NamedSelector,
    PromptSelector,
    RandomSelector,
    Selector,
    StaticSelector,
    select,
)
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.text.records import (
    BadLines,
    check_document,
    check_prompt_response,
    messages_of,
    question_of,
    read_records,
)
from ifp_mlx.units.modules import unit_shape

NUM_EXAMPLES = 64
FEW_EXAMPLES = 8
MAX_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Examples:
    """Training text of a domain, never what is scored.

    Attributes:
        texts: token ids, with the answers.
        requests: the same without the answers; of documents the beginning.
    """

    texts: list[list[int]]
    requests: list[list[int]]


def read_examples(data: Path, domain: str, tokenizer: ChatTokenizer) -> Examples | None:
    """Return examples of a domain drawn at random, None if it has no training text.

    Args:
        data: holds ``sft`` and ``pretrain``.
        domain: as the evaluation names it: those of documents begin with ``lm_``.
        tokenizer: of the model.
    """
    is_document = domain.startswith(DOCUMENT_PREFIX)
    name = f"{domain.removeprefix(DOCUMENT_PREFIX)}.jsonl.xz"
    path = data / ("pretrain" if is_document else "sft") / name
    if not path.exists():
        return None
    check = check_document if is_document else check_prompt_response
    records = list(read_records(path, check, BadLines(skip=True)))
    random.Random(1).shuffle(records)
    if is_document:
        chosen = [record["text"] for record in records[:NUM_EXAMPLES]]
        texts = [tokenizer.encode(text, add_special_tokens=False) for text in chosen]
        requests = [ids[:DOCUMENT_PROMPT_TOKENS] for ids in texts]
    else:
        records = records[:NUM_EXAMPLES]
        texts = [
            chat_ids(tokenizer, messages_of(record), add_generation_prompt=False)
            for record in records
        ]
        requests = [chat_ids(tokenizer, question_of(record)) for record in records]
    return Examples([ids[:MAX_TOKENS] for ids in texts], [ids[:MAX_TOKENS] for ids in requests])


class _Remembering:
    """A selector that reads no text twice."""

    def __init__(self, selector: Selector):
        self._selector = selector
        self._known: dict[tuple[int, ...], mx.array] = {}

    def scores(self, texts: Sequence[Sequence[int]]) -> mx.array:
        wanted = [tuple(text) for text in texts]
        new = [text for text in dict.fromkeys(wanted) if text not in self._known]
        if new:
            self._known |= zip(new, self._selector.scores(new), strict=True)
        return mx.stack([self._known[text] for text in wanted])


class Evidence:
    """Selections by criterion and domain.

    Criteria:

    - ``task64``, ``task8``: gate times norm, summed over the tokens of so many examples;
    - ``task64:CRITERION``: by another of ``CRITERIA``;
    - ``requests64``, ``requests8``: the description and so many requests, as in ``ifp cache add``;
    - ``description``: gate times norm over its tokens;
    - ``generic``: the mean norm of an expert's outputs on all domains' examples;
    - ``blend0.7``: ranks of description and generic, the number is generic's share;
    - ``random0``: of a seed.

    Args:
        model: the whole mixture.
        examples: by domain.
        descriptions: token ids by domain.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Mapping[str, Examples],
        descriptions: Mapping[str, Sequence[int]],
    ):
        self._model = model
        self._examples = examples
        self._descriptions = descriptions
        many = {domain: _statistics(model, of.texts) for domain, of in examples.items()}
        few = {
            domain: _statistics(model, of.texts[:FEW_EXAMPLES]) for domain, of in examples.items()
        }
        prior = ExpertStatistics.prior(list(many.values()))
        mx.eval(prior)

        def calibration(of: Mapping[str, ExpertStatistics], criterion: str) -> Calibration:
            return Calibration(prior, {name: one.score(criterion) for name, one in of.items()}, 0)

        self.calibrations = {
            "task8": calibration(few, CRITERIA[0]),
            "task64": calibration(many, CRITERIA[0]),
            **{f"task64:{criterion}": calibration(many, criterion) for criterion in CRITERIA[1:]},
        }
        self._reading: dict[str, _Remembering] = {}

    @property
    def domains(self) -> list[str]:
        """Those that have examples."""
        return list(self._examples)

    def select(self, criterion: str, domain: str, num_kept: int) -> Selection | None:
        """Return the experts that a criterion keeps for a domain, None if it has no text for it."""
        ids: Sequence[int] = ()
        requests: Sequence[Sequence[int]] = ()
        selector: Selector
        if criterion.startswith("random"):
            seed = int(criterion.removeprefix("random"))
            selector = RandomSelector(unit_shape(self._model), seed)
        elif criterion == "generic":
            selector = StaticSelector(self.calibrations["task64"])
        elif criterion in self.calibrations:
            if domain not in self._examples:
                return None
            selector = StaticSelector(self.calibrations[criterion], domain)
        else:
            if domain not in self._descriptions:
                return None
            ids = self._descriptions[domain]
            if criterion.startswith("requests"):
                if domain not in self._examples:
                    return None
                requests = self._examples[domain].requests[: int(criterion[len("requests") :])]
            selector = self._reader("description" if requests else criterion)
        named = NamedSelector.of_model(selector, SelectorSpec(criterion), self._model)
        return select(named, ids, num_kept, requests)

    def _reader(self, criterion: str) -> Selector:
        if criterion not in self._reading:
            selector: Selector = PromptSelector(self._model)
            if criterion != "description":
                share = float(criterion.removeprefix("blend"))
                selector = BlendSelector(self._model, self.calibrations["task64"], share)
            self._reading[criterion] = _Remembering(selector)
        return self._reading[criterion]

    def routing_figures(self) -> dict[str, object]:
        """Return how evenly experts are used, and how much that differs between domains."""
        of_domains = self.calibrations["task64:frequency"].tasks
        uses = {domain: np.array(counts, np.float64) for domain, counts in of_domains.items()}
        shares = {domain: use / use.sum(1, keepdims=True) for domain, use in uses.items()}
        mean = np.mean(list(shares.values()), axis=0)  # (L, E)
        inside = np.mean([_entropy(share) for share in shares.values()], axis=0)
        half = mean.shape[1] // 2
        halves = {domain: self.select("task64", domain, half) for domain in self.domains}
        kept = [selection for selection in halves.values() if selection is not None]
        return {
            "usage_entropy": (_entropy(mean) / np.log(mean.shape[1])).round(4).tolist(),
            "information_about_domain": (_entropy(mean) - inside).round(4).tolist(),
            "share_of_usage_by_best_half": {
                domain: round(float(np.sort(share, axis=1)[:, -half:].sum(1).mean()), 4)
                for domain, share in shares.items()
            },
            "overlap_of_best_halves": {
                "domains": self.domains,
                "shares": [[round(a.mean_overlap(b), 3) for b in kept] for a in kept],
            },
        }


def _statistics(model: nn.Module, texts: Sequence[Sequence[int]]) -> ExpertStatistics:
    statistics = ExpertStatistics(model)
    statistics.read(texts)
    return statistics


def _entropy(
    shares: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """Return the (L,) entropies, in nats, of (L, E) shares."""
    return np.asarray(-(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=-1))
