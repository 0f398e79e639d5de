"""The one place that puts the parts together: a checkpoint, a selector, a cache, a conversation."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.chat.chat_template import chat_ids
from ifp_mlx.errors import ResourceError, UsageError
from ifp_mlx.selection.selection import Selection
from ifp_mlx.selection.selectors import NamedSelector, select
from ifp_mlx.selection.spec import SelectorSpec
from ifp_mlx.slicing.compact import DEFAULT_CUT, CutOptions, ModelSize
from ifp_mlx.slicing.drift import Drift, with_drift
from ifp_mlx.slicing.sharded import load_share, several_machines
from ifp_mlx.storage.config_file import read_config
from ifp_mlx.storage.identity import file_states, fingerprint
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.transformers_import import begin_importing_transformers
from ifp_mlx.storage.weights import stored_unit_shape
from ifp_mlx.subnets import memory
from ifp_mlx.subnets.compact_models import CompactModels
from ifp_mlx.subnets.compact_store import CompactStore, module_digest
from ifp_mlx.subnets.dense_model import DenseModel, open_dense_model
from ifp_mlx.subnets.model_files import ModelFiles, find_adapter, find_calibration, misfit
from ifp_mlx.subnets.prompt_selection import selecting_pays
from ifp_mlx.subnets.selectors import (
    SELECTORS,
    SelectorFiles,
    choose_selector,
    make_selector,
    selector_version,
)
from ifp_mlx.subnets.subnetwork import DENSE, SubNetwork
from ifp_mlx.subnets.task_cache import CacheKey, Reuse, TaskCache, fold_task
from ifp_mlx.text.task_examples import TaskExample
from ifp_mlx.units.amounts import Amounts
from ifp_mlx.units.kinds import UnitKind

if TYPE_CHECKING:  # mlx-lm takes seconds to import: ``load`` does so beside its own work
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ifp_mlx.chat.conversation import Conversation
    from ifp_mlx.chat.sampling import KVCacheOptions

logger = logging.getLogger(__name__)

DEFAULT_KEEP_RATIO = 0.95
"""Of FFN units, without an adapter: the least that cost a 0.5B coder nothing that was seen. Nine
tenths cost it a sixth of what it got right (docs/fidelity.md)."""

DEFAULT_EXPERT_RATIO = 0.75
DEFAULT_READING_RATIO = 0.67
"""A part that only reads. Less loses facts in long texts, too (docs/reading.md)."""

MANY_EXPERTS = 64
"""Mixtures of this many experts a layer lost little with a quarter of them gone, for the task that
chose (docs/experts.md); those of fewer lost much."""

PREDICTED_REUSE_OVERLAP = 0.92
"""Predicted sub-networks that have more than this in common are worth a word. Half of those were of
different tasks (docs/chat.md), so they are shared on request only. Other selectors tell tasks apart
too little to compare them."""


class Assistant:
    """A dense checkpoint from which sub-networks are cut on request.

    Use ``Assistant.load``. Compact models of recent selections stay in memory within a byte
    budget, so switching back to a task costs nothing; those of small models are on disk as well,
    so that a task known from an earlier run needs nothing of the dense model.

    Attributes:
        files: the checkpoint and what belongs to it.
        cache: where selections are kept, None for nowhere.
        reads_with_part: sub-networks only read, the whole model writes.
    """

    def __init__(
        self,
        files: ModelFiles,
        *,
        open_dense: Callable[[], DenseModel],
        compact_models: CompactModels,
        cache: TaskCache | None = None,
        options: CutOptions = DEFAULT_CUT,
        reads_with_part: bool = False,
        reuse_threshold: float = 0.0,
    ):
        self.files = files
        self.reads_with_part = reads_with_part
        self._options = options
        self.cache = cache
        self._open_dense = open_dense
        self._compact_models = compact_models
        self._selector: NamedSelector | None = None
        self._whole: nn.Module | None = None
        self._reuse_threshold = reuse_threshold

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        adapter: Path | None = None,
        use_adapter: bool = True,
        calibration: Path | None = None,
        selector: SelectorSpec | None = None,
        options: CutOptions = DEFAULT_CUT,
        reads_with_part: bool = False,
        cache: TaskCache | None = None,
        reuse_threshold: float = 0.0,
        preload: bool = True,
    ) -> "Assistant":
        """Open a checkpoint with what belongs to it.

        The adapter and the calibration are, in this order: the ones named here, those in the
        checkpoint's ``ifp/`` folder, those shipped with this package for this model. What the user
        should know is logged as a warning.

        Args:
            path: a checkpoint directory.
            adapter: an IFP adapter directory.
            use_adapter: False ignores every adapter.
            calibration: a file of ``ifp calibrate``.
            selector: None takes the best there is.
            options: how sub-networks are cut.
            reads_with_part: sub-networks only read prompts; the whole model writes the answers.
                Adapters are left out: what one changes in the part it does not in the whole.
            cache: where selections by task are kept; None keeps nothing.
            reuse_threshold: share of units in common above which another cached task's
                sub-network is taken instead; 0 never does.
            preload: False leaves the dense model alone until something needs it, which a task
                whose compact model is on disk does not.

        Raises:
            CheckpointError: the directory is not a usable checkpoint.
            AdapterError: the adapter was made for another model.
            UsageError: the selector needs a file that is not there.
        """
        config = read_config(path)
        open_dense = functools.cache(
            functools.partial(open_dense_model, path, options, lazy=not preload)
        )
        prior = find_calibration(path, config, calibration)
        if reads_with_part and adapter is not None:
            raise UsageError("what only reads is cut from the model itself; leave out `adapter`")
        use_adapter = use_adapter and not reads_with_part
        found = find_adapter(path, config, adapter) if use_adapter else None
        if reads_with_part and selector is None and prior is not None:
            selector = SelectorSpec("static")  # selecting must not cost what reading saves
        chosen = choose_selector(selector, SelectorFiles(found, prior))
        begin_importing_transformers()  # while weights are read
        files = ModelFiles(path, config, found, prior, chosen)
        store = _store_of(files, options, cache)
        # What is stored was cut from this checkpoint, with this adapter: they are sound and fit.
        is_proven = store is not None and store.is_known() and not preload
        if found is not None and not is_proven:
            found.verify()
            if adapter is None and (reason := misfit(found, open_dense)) is not None:
                logger.warning("the adapter that was found is left out: %s", reason)
                chosen = choose_selector(selector, SelectorFiles(None, prior))
                files = dataclasses.replace(files, adapter=None, selector=chosen)
                store = _store_of(files, options, cache)
        assistant = cls(
            files,
            open_dense=open_dense,
            compact_models=CompactModels(
                path,
                open_dense,
                adapt=files.adapter.apply if files.adapter and files.is_adapted else None,
                store=store,
            ),
            cache=cache,
            options=options,
            reads_with_part=reads_with_part,
            reuse_threshold=reuse_threshold,
        )
        if not is_proven:  # refuse now what cannot be loaded
            assistant.selector()
            assistant.tokenizer  # noqa: B018
        return assistant

    @property
    def model_path(self) -> Path:
        """The checkpoint directory."""
        return self.files.path

    @property
    def kind(self) -> UnitKind:
        """The kind of units that sub-networks are cut in."""
        return self.files.config.family.kind

    @functools.cached_property
    def amounts(self) -> Amounts:
        """Of units that sub-networks can keep."""
        return Amounts.of(self.files.config, self.num_units)

    @functools.cached_property
    def num_units(self) -> int:
        """F."""
        return stored_unit_shape(self.files.path).num_units

    @property
    def context_length(self) -> int:
        """The most positions that the model was made for."""
        return self.files.config.context_length

    @functools.cached_property
    def tokenizer(self) -> "TokenizerWrapper":
        """mlx-lm's wrapper.

        Raises:
            CheckpointError: the tokenizer files are missing or damaged.
        """
        return load_tokenizer(self.files.path)

    def selector(self) -> NamedSelector:
        """Return what scores units for an instruction; opens the dense model.

        Raises:
            AdapterError: the adapter was made for another model.
            SelectionError: no such task was calibrated.
        """
        if self._selector is None:
            files = self.files
            self._selector = make_selector(
                files.selector, self._open_dense().reader, files.for_selectors
            )
        return self._selector

    @property
    def default_num_kept_units(self) -> int:
        """K when the user does not say: what the adapter was trained for, or by the kind."""
        if self.reads_with_part:
            return self.amounts.nearest(DEFAULT_READING_RATIO)
        if self.files.adapter is not None and self.files.is_adapted:
            return max(self.files.adapter.keep_units)
        if self.kind.router is None:
            return self.amounts.nearest(DEFAULT_KEEP_RATIO)
        is_large = self.num_units >= MANY_EXPERTS
        return self.amounts.nearest(DEFAULT_EXPERT_RATIO if is_large else 1.0)

    @property
    def memory_limit(self) -> int | None:
        """The most memory that the user allows, in bytes; None for what the machine has."""
        return self._options.memory_bytes

    @property
    def keeps_whole(self) -> bool:
        """Whether the whole model is kept in memory beside its sub-networks."""
        return self._open_dense().is_kept

    @property
    def reader(self) -> nn.Module:
        """The base model for reading; where it does not fit, one layer is in memory at a time."""
        return self._open_dense().reader

    def predict_memory(self, num_kept_units: int) -> memory.MemoryPrediction:
        """Return the peak memory of a sub-network with a conversation of the usual length."""
        return self._open_dense().sizes.predict(num_kept_units, self._options.context_tokens)

    def stored_bytes(self, num_kept_units: int) -> int:
        """Return what a sub-network's weights take on a disk, in the checkpoint's precision."""
        sizes = memory.checkpoint_sizes(self.files.path, exact_down=self._options.exact_down)
        return sizes.predict(num_kept_units, 0).weights_bytes

    def most_that_fit(self) -> int:
        """Return the largest K whose sub-network fits in the memory that may be used.

        Raises:
            ResourceError: not even the smallest fits.
        """
        sizes, options = self._open_dense().sizes, self._options
        available_bytes = memory.usable_memory_bytes(options.memory_bytes)
        most = sizes.largest_k_that_fits(options.context_tokens, available_bytes)
        if most is None:
            memory.require_memory(
                sizes, self.amounts.least, options.context_tokens, available_bytes
            )
        assert most is not None
        return most

    @property
    def skeleton(self) -> nn.Module:
        """The base model for what its modules say; its weights need not be in memory."""
        return self._open_dense().skeleton

    def dense(self) -> SubNetwork:
        """Return the whole base model, without an adapter's changes."""
        dense = self._open_dense()
        if self._whole is None and (group := several_machines()) is not None:
            self._whole = load_share(self.files.path, None, group)[0].model
        elif self._whole is None:
            self._whole = dense.whole()
        return SubNetwork(
            model=self._whole,
            selection=None,
            selector=DENSE,
            task=None,
            kind=self.kind,
            num_kept_units=self.num_units,
            num_units=self.num_units,
            size=dense.size,
            source=dense.size,
        )

    def subnetwork_for_task(
        self, task: str, num_kept_units: int, examples: Sequence[TaskExample] = ()
    ) -> SubNetwork:
        """Return the sub-network for a task description, from the cache if it is there. Evaluates.

        Args:
            task: the description.
            num_kept_units: K.
            examples: requests of the task, with answers or without. With any, it is selected
                anew from both, and what is cached for the description is replaced.

        Raises:
            UsageError: the description is empty or too long, or the selector reads no examples.
            SelectionError: K is out of range.
        """
        if not task.strip():
            raise UsageError("the task description is empty; say what you need help with")
        if examples and not SELECTORS[self.files.selector.name].reads:
            raise UsageError(
                f"{self.files.selector} selects without reading; leave out the examples"
            )
        if num_kept_units == self.num_units:
            return dataclasses.replace(self.dense(), task=task)
        return self._in_use(self._part_for_task(task, num_kept_units, examples))

    def _part_for_task(
        self, task: str, num_kept_units: int, examples: Sequence[TaskExample]
    ) -> SubNetwork:
        if self.cache is None:
            selection, selection_s = self._select(task, num_kept_units, examples)
            return self._cut(selection, task=task, selection_s=selection_s)
        key = self.cache_key(task, num_kept_units)
        if not examples and (subnet := self._from_cache(key)) is not None:
            return subnet
        with self.cache.lock(key):
            # Another process may have been faster.
            if not examples and (subnet := self._from_cache(key)) is not None:
                return subnet
            selection, selection_s = self._select(task, num_kept_units, examples)
            reuse, facts = None, {}
            near = None if examples else self._close_task(key, selection)
            if near is not None and near[0].overlap >= (self._reuse_threshold or math.inf):
                reuse, selection = near
            elif near is not None:
                facts = {"close_task": near[0]}
            try:
                name, num_examples = self.files.path.name, len(examples)
                self.cache.put(key, selection, name, num_examples=num_examples, reuse=reuse)
            except ResourceError as error:
                logger.warning("the sub-network is not cached: %s", error)
        return self._cut_cached(key, selection, reuse, selection_s=selection_s, **facts)

    def _close_task(self, key: CacheKey, selection: Selection) -> tuple[Reuse, Selection] | None:
        """Return the cached task whose units are closest, if they are close enough to speak of."""
        threshold = self._reuse_threshold
        if not threshold and self.files.is_adapted:  # others tell tasks apart too little
            threshold = PREDICTED_REUSE_OVERLAP
        if not threshold or self.cache is None:
            return None
        return self.cache.find_overlapping(key, selection, threshold)

    def subnetwork_for_prompt(self, text: str, num_kept_units: int) -> SubNetwork:
        """Return the sub-network that one prompt selects for itself; nothing is cached on disk.

        Raises:
            UsageError: the prompt is empty.
            SelectionError: K is out of range.
        """
        if not text.strip():
            raise UsageError("the prompt is empty; say what you want")
        if num_kept_units == self.num_units:
            return self.dense()
        selection, selection_s = self._select(text, num_kept_units)
        return self._in_use(self._cut(selection, selection_s=selection_s))

    def selecting_pays(self, text: str, num_kept_units: int) -> bool:
        """Return whether a prompt is answered sooner by the part that it selects for itself.

        Always where the whole model is not kept in memory: it would be read from the disk.
        """
        if not self.keeps_whole:
            return True
        num_tokens = len(chat_ids(self.tokenizer, [{"role": "user", "content": text}]))
        return selecting_pays(
            self.files.config,
            self.num_units,
            num_kept_units,
            prompt_tokens=num_tokens,
            tokens_read=SELECTORS[self.files.selector.name].tokens_read(num_tokens),
        )

    def subnetwork_of(self, selection: Selection) -> SubNetwork:
        """Return the sub-network of units that were selected elsewhere. Evaluates.

        Raises:
            SelectionError: the selection does not fit this model.
        """
        selection.check_shape(self.kind.name, stored_unit_shape(self.files.path))
        return self._cut(selection)

    def select_for(
        self, text: str, num_kept_units: int, examples: Sequence[TaskExample] = ()
    ) -> Selection:
        """Return the units that a text selects, without slicing or caching. Evaluates.

        Args:
            text: an instruction, or a task's description.
            num_kept_units: K.
            examples: requests of the task.
        """
        return self._select(text, num_kept_units, examples)[0]

    def cache_key(self, task: str, num_kept_units: int) -> CacheKey:
        """Return the key under which a task's selection is kept."""
        files = self.files
        return CacheKey(
            task=task,
            base=fingerprint(files.path),
            adapter=files.adapter_fingerprint,
            selector=str(files.selector),
            selector_version=selector_version(files.selector, files.for_selectors),
            kind=self.kind.name,
            num_kept_units=num_kept_units,
        )

    def kv_identity(self, subnet: SubNetwork) -> dict[str, Any]:
        """Return what the keys and values that a sub-network computes depend on."""
        read = {} if subnet.reader is None else {"read_by": self.kv_identity(subnet.reader)}
        return read | {
            "base": fingerprint(self.files.path),
            "adapter": self.files.adapter_fingerprint,
            "selector": str(subnet.selector),
            "selection": None if subnet.selection is None else subnet.selection.digest,
            "modules": module_digest(subnet.model),
        }

    def converse(
        self,
        subnet: SubNetwork,
        kv_options: "KVCacheOptions | None" = None,
    ) -> "Conversation":
        """Return a conversation that a sub-network answers."""
        from ifp_mlx.chat.conversation import Conversation

        model, drift = self._answering(subnet)
        return Conversation(
            model, self.tokenizer, self.context_length, kv_options=kv_options, drift=drift
        )

    def switch(self, conversation: "Conversation", subnet: SubNetwork) -> None:
        """Let another sub-network go on with a conversation."""
        conversation.switch(*self._answering(subnet))

    def limit_resident_bytes(self, max_resident_bytes: int) -> None:
        """Set how much memory the units of sub-networks may take; the oldest go."""
        self._compact_models.limit_resident_bytes(max_resident_bytes)

    def release(self, subnet: SubNetwork) -> None:
        """Say that a sub-network is about to be replaced.

        Where memory is short, the next one is made of it; ``is_whole`` says whether it was.
        """
        if subnet.selection is not None:
            self._compact_models.release(subnet.selection)

    def is_whole(self, subnet: SubNetwork) -> bool:
        """Return whether a sub-network that was released can still answer."""
        return subnet.selection is None or self._compact_models.is_resident(subnet.selection)

    def _answering(self, subnet: SubNetwork) -> tuple[nn.Module, Drift | None]:
        """Return the model that answers for a sub-network, and what it shows of its drift."""
        if subnet.selection is None or self.kind.router is None:
            return subnet.answering, None
        return with_drift(subnet.model, subnet.selection, self.skeleton)

    def _in_use(self, part: SubNetwork) -> SubNetwork:
        """Return what answers: a part itself, or the whole model, for which the part reads."""
        if not self.reads_with_part or part.selection is None:
            return part
        return dataclasses.replace(self.dense(), task=part.task, reader=part)

    def _select(
        self, text: str, num_kept_units: int, examples: Sequence[TaskExample] = ()
    ) -> tuple[Selection, float]:
        start = time.perf_counter()
        ids = self._instruction_ids(fold_task(text))
        example_ids = [self._instruction_ids(e.prompt, e.answer) for e in examples]
        selection = select(self.selector(), ids, num_kept_units, example_ids)
        return selection, time.perf_counter() - start

    def _instruction_ids(self, text: str, answer: str | None = None) -> list[int]:
        """Return what every selector reads: the text as the model's user would send it.

        Of a known answer as much follows as the context has room for.
        """
        ids = chat_ids(self.tokenizer, [{"role": "user", "content": text}])
        if answer:
            ids += self.tokenizer.encode(answer, add_special_tokens=False)
            ids = ids[: self.context_length - 1]
        if len(ids) >= self.context_length:
            raise UsageError(
                f"the instruction has {len(ids)} tokens, the model's context "
                f"{self.context_length}; shorten it or describe the task with `task`"
            )
        return ids

    def _from_cache(self, key: CacheKey) -> SubNetwork | None:
        assert self.cache is not None
        cached = self.cache.get(key)
        return None if cached is None else self._cut_cached(key, *cached, from_cache=True)

    def _cut_cached(
        self, key: CacheKey, selection: Selection, reuse: Reuse | None, **facts: Any
    ) -> SubNetwork:
        """Return the sub-network of a cache entry; note in it what cutting it showed."""
        if reuse is not None:
            facts |= {"reused_task": reuse.task, "reuse_overlap": reuse.overlap}
        subnet = self._cut(selection, task=key.task, **facts)
        if self.cache is not None:
            with contextlib.suppress(ResourceError):  # a read-only cache still serves
                self.cache.note_cut(key, subnet.requantization_error, subnet.size.num_bytes)
        return subnet

    def _cut(self, selection: Selection, *, task: str | None = None, **facts: Any) -> SubNetwork:
        if (group := several_machines()) is not None:
            cut, size = load_share(self.files.path, selection, group)
        else:
            # What one prompt selects is unlikely to come again: on disk are tasks only.
            cut = self._compact_models.get(selection, keep_on_disk=task is not None)
            size = ModelSize.of(cut.model)
        return SubNetwork(
            model=cut.model,
            selection=selection,
            selector=selection.selector,
            task=task,
            kind=self.kind,
            num_kept_units=selection.num_kept_units,
            num_units=selection.num_units,
            slicing_s=cut.seconds,
            weights_from_disk=cut.is_stored,
            requantization_error=cut.requantization_error,
            size=size,
            source=cut.source,
            **facts,
        )


def _store_of(
    files: ModelFiles, options: CutOptions, cache: TaskCache | None
) -> CompactStore | None:
    """Return where the compact models of a dense model are kept, if they are."""
    if cache is None:
        return None
    identity = {
        "base": fingerprint(files.path),
        "files": [(Path(name).name, *rest) for name, *rest in file_states(files.path)],
        "adapter": files.adapter_fingerprint,
        "adapted": files.is_adapted,
        "exact_down": options.exact_down,
        # These decide which type is computed in.
        "device": str(mx.default_device()),
        "memory_bytes": memory.usable_memory_bytes(),
    }
    return CompactStore(cache.compact_folder, identity, files.config, as_stored=options.as_stored)
