"""The one place that puts the parts together: a checkpoint, a selector, a cache, a conversation."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.adapters.adapter import Adapter, load_adapter
from ifp_mlx.adapters.shipped import find_side_file
from ifp_mlx.errors import AdapterError, ResourceError, SelectionError, UsageError
from ifp_mlx.selection.calibration import Calibration
from ifp_mlx.selection.selection import Selection, Selector, select
from ifp_mlx.storage import checkpoint
from ifp_mlx.subnets import selector_choice
from ifp_mlx.subnets.base_model import (
    DEFAULT_CONTEXT_TOKENS,
    BaseModel,
    open_base_model,
    total_parameters,
)
from ifp_mlx.subnets.compact_models import CompactModels, SubNetwork, dense_identity
from ifp_mlx.subnets.compact_store import CompactStore, module_digest, selection_digest
from ifp_mlx.subnets.task_cache import CacheKey, SubNetCache, fold_task
from ifp_mlx.units import ffn
from ifp_mlx.units.amounts import round_keep_ratio

if TYPE_CHECKING:  # mlx-lm takes seconds to import: ``load`` does so beside its own work
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ifp_mlx.chat.conversation import Conversation, KVCacheOptions, Message

DEFAULT_KEEP_RATIO = 2 / 3
"""Without an adapter, below two thirds of the units a small model loses too much (README)."""

PREDICTED_REUSE_OVERLAP = 0.85
"""Of 768 units, predicted sub-networks of paraphrases have more than this in common, those of
different tasks less (benchmarks/task_pairs.py, with the shipped adapter). Other selectors tell
tasks apart too little to reuse by overlap."""


class Assistant:
    """A dense checkpoint from which sub-networks are cut on request.

    Use ``Assistant.load``. Compact models of recent selections stay in memory within a byte
    budget, so switching back to a task costs nothing; those of small models are on disk as well,
    so that a task known from an earlier run needs nothing of the dense model.

    Attributes:
        model_path: the checkpoint directory.
        config: its ``config.json``.
        context_length: the most positions that the model was made for.
        num_layers: L.
        num_units: F.
        adapter: the IFP adapter in use, if any.
        calibration: the calibrated prior, if any.
        selector_name: which selector is in use.
        cache: where selections are kept, None for nowhere.
    """

    def __init__(
        self,
        *,
        model_path: Path,
        config: dict[str, Any],
        open_base: Callable[[], BaseModel],
        compact_models: CompactModels,
        wait_for_tokenizer: Callable[[], "TokenizerWrapper"],
        selector_name: str,
        adapter: Adapter | None = None,
        calibration: Calibration | None = None,
        cache: SubNetCache | None = None,
        reuse_threshold: float | None = None,
        on_warning: Callable[[str], None] = lambda line: None,
    ):
        self.model_path = model_path
        self.config = config
        self._wait_for_tokenizer = wait_for_tokenizer
        self.adapter = adapter
        self.calibration = calibration
        self.cache = cache
        self.num_layers, self.num_units = ffn.ffn_shape(config)
        self.context_length = int(config.get("max_position_embeddings") or 2**31)
        self._open_base = open_base
        self._selector: Selector | None = None
        self._compact_models = compact_models
        self._dense: nn.Module | None = None
        self._on_warning = on_warning
        self.selector_name = selector_name
        if reuse_threshold is None:
            reuse_threshold = PREDICTED_REUSE_OVERLAP if self.selector_name == "predictor" else 0.0
        self._reuse_threshold = reuse_threshold

    @classmethod
    def load(
        cls,
        model_path: Path,
        *,
        adapter: Path | None = None,
        use_adapter: bool = True,
        calibration: Path | None = None,
        selector: str | None = None,
        compensate: bool = False,
        cache: SubNetCache | None = None,
        reuse_threshold: float | None = None,
        exact_down: bool = False,
        context_tokens: int = DEFAULT_CONTEXT_TOKENS,
        force: bool = False,
        preload: bool = True,
        on_warning: Callable[[str], None] = lambda line: None,
    ) -> "Assistant":
        """Open a checkpoint with what belongs to it.

        The adapter and the calibration are, in this order: the ones named here, those in the
        checkpoint's ``ifp/`` folder, those shipped with this package for this model.

        Args:
            model_path: a checkpoint directory.
            adapter: an IFP adapter directory.
            use_adapter: False ignores every adapter.
            calibration: a file of ``ifp calibrate``.
            selector: as in ``choose_selector``; None takes the best there is.
            compensate: add the removed units' mean contribution as a bias.
            cache: where selections by task are kept; None keeps nothing.
            reuse_threshold: share of units in common above which another cached task's
                sub-network is taken instead; 0 never does, None does for the predictor only.
            exact_down: do not quantize columns of down projections again, at 8 bits; as in
                ``slice_model``.
            context_tokens: the length of conversation that memory must be enough for.
            force: load what is predicted not to fit in memory.
            preload: False leaves the dense model alone until something needs it, which a task
                whose compact model is on disk does not.
            on_warning: called with one line for the user.

        Raises:
            CheckpointError: the directory is not a usable checkpoint.
            AdapterError: the adapter was made for another model.
            UsageError: the selector needs a file that is not there.
        """
        config = checkpoint.read_config(model_path)
        ffn.ffn_layout(config["model_type"])
        calibration_path = calibration or find_side_file(
            model_path, config, "calibration.safetensors"
        )
        background = concurrent.futures.ThreadPoolExecutor(1)
        tokenizer = background.submit(checkpoint.load_tokenizer, model_path)
        background.shutdown(wait=False)
        open_base = functools.cache(
            functools.partial(
                open_base_model,
                model_path,
                exact_down=exact_down,
                context_tokens=context_tokens,
                force=force,
                lazy=not preload,
                on_warning=on_warning,
            )
        )
        prior = Calibration.load(calibration_path) if calibration_path else None
        adapter_path = adapter or find_side_file(model_path, config, "adapter")
        found = load_adapter(adapter_path, verify=False) if use_adapter and adapter_path else None

        def store_for(found: Adapter | None) -> CompactStore | None:
            if cache is None or compensate:
                return None
            adapted = selector_choice.choose_selector(selector, found, prior) == "predictor"
            identity = dense_identity(model_path, found, adapted=adapted, exact_down=exact_down)
            return CompactStore(cache.compact_folder, identity, config, on_warning=on_warning)

        store = store_for(found)
        # What is stored was cut from this checkpoint, with this adapter: they are sound and fit.
        is_proven = store is not None and store.is_known() and not preload
        if found is not None and not is_proven:
            found.verify()
        if found is not None and adapter is None and not is_proven:
            try:
                found.check_base(open_base().reader)
            except AdapterError as error:
                on_warning(f"the adapter in {adapter_path} is left out: {error}")
                found = None
                store = store_for(None)
        selector_name = selector_choice.choose_selector(selector, found, prior)
        # An adapter's changes belong to the units that its own predictor selects.
        adapt = found.apply if found is not None and selector_name == "predictor" else None
        assistant = cls(
            model_path=model_path,
            config=config,
            open_base=open_base,
            compact_models=CompactModels(
                model_path,
                open_base,
                adapt=adapt,
                compensation=prior if compensate else None,
                store=store,
                on_warning=on_warning,
            ),
            wait_for_tokenizer=tokenizer.result,
            selector_name=selector_name,
            adapter=found,
            calibration=prior,
            cache=cache,
            reuse_threshold=reuse_threshold,
            on_warning=on_warning,
        )
        if not is_proven:
            # Refuses now what cannot be loaded.
            assistant.selector()
            assistant.tokenizer  # noqa: B018
        return assistant

    @property
    def tokenizer(self) -> "TokenizerWrapper":
        """mlx-lm's wrapper.

        Raises:
            CheckpointError: the tokenizer files are missing or damaged.
        """
        return self._wait_for_tokenizer()

    def selector(self) -> Selector:
        """Return what scores units for an instruction; opens the dense model.

        Raises:
            AdapterError: the adapter was made for another model.
            SelectionError: no such task was calibrated.
        """
        if self._selector is None:
            self._selector = selector_choice.make_selector(
                self.selector_name, self._open_base().reader, self.adapter, self.calibration
            )
        return self._selector

    @property
    def default_num_kept_units(self) -> int:
        """K when the user does not say: what the adapter was trained for, or two thirds of F."""
        if self.selector_name == "predictor" and self.adapter is not None:
            return max(self.adapter.keep_units)
        return round_keep_ratio(DEFAULT_KEEP_RATIO, self.num_units)

    def dense(self) -> SubNetwork:
        """Return the whole base model, without an adapter's changes."""
        if self._dense is None:
            self._dense = self._open_base().dense()
        parameters = total_parameters(self._open_base())
        return SubNetwork(
            model=self._dense,
            selection=None,
            selector="dense",
            task=None,
            num_kept_units=self.num_units,
            num_units=self.num_units,
            active_parameters=parameters,
            total_parameters=parameters,
        )

    def subnetwork_for_task(
        self, task: str, num_kept_units: int, examples: Sequence[str] = ()
    ) -> SubNetwork:
        """Return the sub-network for a task description, from the cache if it is there. Evaluates.

        Args:
            task: the description.
            num_kept_units: K.
            examples: inputs of the task. With any, it is selected anew from both, and what is
                cached for the description is replaced.

        Raises:
            UsageError: the description is empty or too long, or the selector reads no examples.
            SelectionError: K is out of range.
        """
        if not task.strip():
            raise UsageError("the task description is empty; say what you need help with")
        if examples and self.selector_name not in selector_choice.READING_SELECTORS:
            raise UsageError(
                f"{self.selector_name} selects without reading; leave out the examples"
            )
        if num_kept_units == self.num_units:
            return dataclasses.replace(self.dense(), task=task)
        if self.cache is None:
            selection, selection_s = self._select(task, num_kept_units, examples)
            return self._cut(selection, task=task, selection_s=selection_s)
        key = self.cache_key(task, num_kept_units)
        if not examples and (cached := self.cache.get(key)) is not None:
            return self._cut_cached(key, cached, from_cache=True)
        with self.cache.lock(key):
            # Another process may have been faster.
            if not examples and (cached := self.cache.get(key)) is not None:
                return self._cut_cached(key, cached, from_cache=True)
            selection, selection_s = self._select(task, num_kept_units, examples)
            threshold = None if examples else self._reuse_threshold
            reused = threshold and self.cache.find_overlapping(key, selection, threshold)
            if reused:
                other_task, overlap, selection = reused
                return self._cut(
                    selection,
                    task=task,
                    selection_s=selection_s,
                    reused_task=other_task,
                    reuse_overlap=overlap,
                )
            try:
                self.cache.put(key, selection, self.model_path.name, num_examples=len(examples))
            except ResourceError as error:
                self._on_warning(f"the sub-network is not cached: {error}")
        return self._cut_cached(key, selection, selection_s=selection_s)

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
        return self._cut(selection, selection_s=selection_s)

    def subnetwork_of(self, selection: Selection) -> SubNetwork:
        """Return the sub-network of units that were selected elsewhere. Evaluates.

        Raises:
            SelectionError: the selection does not fit this model.
        """
        if selection.num_layers != self.num_layers or selection.num_units != self.num_units:
            raise SelectionError(
                f"the selection is for {selection.num_layers} layers of {selection.num_units} "
                f"units, the model has {self.num_layers} of {self.num_units}"
            )
        return dataclasses.replace(self._cut(selection), selector=selection.selector)

    def select_for(self, text: str, num_kept_units: int) -> Selection:
        """Return the units that a text selects, without slicing or caching. Evaluates."""
        return self._select(text, num_kept_units)[0]

    def cache_key(self, task: str, num_kept_units: int) -> CacheKey:
        """Return the key under which a task's selection is kept."""
        return CacheKey(
            task=task,
            base=checkpoint.fingerprint(self.model_path),
            adapter=self.adapter.fingerprint if self.adapter is not None else "",
            selector=self.selector_name,
            selector_version=selector_choice.selector_version(self.selector_name, self.adapter),
            num_kept_units=num_kept_units,
        )

    def kv_identity(self, subnet: SubNetwork) -> dict[str, Any]:
        """Return what the keys and values that a sub-network computes depend on."""
        selection = subnet.selection
        return {
            "base": checkpoint.fingerprint(self.model_path),
            "adapter": self.adapter.fingerprint if self.adapter is not None else "",
            "selector": subnet.selector,
            "selection": None if selection is None else selection_digest(selection),
            "modules": module_digest(subnet.model),
        }

    def converse(
        self,
        subnet: SubNetwork,
        *,
        system_prompt: str | None = None,
        messages: "Sequence[Message]" = (),
        kv_options: "KVCacheOptions | None" = None,
    ) -> "Conversation":
        """Return a conversation that a sub-network answers."""
        from ifp_mlx.chat.conversation import Conversation

        return Conversation(
            subnet.model,
            self.tokenizer,
            self.context_length,
            system_prompt=system_prompt,
            messages=messages,
            kv_options=kv_options,
        )

    def _select(
        self, text: str, num_kept_units: int, examples: Sequence[str] = ()
    ) -> tuple[Selection, float]:
        start = time.perf_counter()
        ids = self._instruction_ids(fold_task(text))
        example_ids = [self._instruction_ids(example) for example in examples]
        selection = select(self.selector(), ids, num_kept_units, example_ids)
        mx.eval(selection.indices)
        return selection, time.perf_counter() - start

    def _instruction_ids(self, text: str) -> list[int]:
        """Return what every selector reads: the text as the model's user would send it."""
        tokenizer, message = self.tokenizer, {"role": "user", "content": text}
        if tokenizer.chat_template is None:
            ids = list(tokenizer.encode(text))
        else:
            ids = list(
                tokenizer.apply_chat_template(
                    [message], add_generation_prompt=True, return_dict=False
                )
            )
        if len(ids) >= self.context_length:
            raise UsageError(
                f"the instruction has {len(ids)} tokens, the model's context "
                f"{self.context_length}; shorten it or describe the task with --task"
            )
        return ids

    def _cut_cached(self, key: CacheKey, selection: Selection, **facts: Any) -> SubNetwork:
        """Return the sub-network of a cache entry; note in it what quantizing again cost."""
        subnet = self._cut(selection, task=key.task, **facts)
        if self.cache is not None:
            with contextlib.suppress(ResourceError):  # a read-only cache still serves
                self.cache.note_requantization_error(key, subnet.requantization_error)
        return subnet

    def _cut(
        self,
        selection: Selection,
        *,
        task: str | None = None,
        selection_s: float = 0.0,
        **facts: Any,
    ) -> SubNetwork:
        slicing_s = 0.0
        cut = self._compact_models.resident(selection)
        if cut is None:
            # What one prompt selects is unlikely to come again: on disk are tasks only.
            cut = self._compact_models.make(selection, keep_on_disk=task is not None)
            slicing_s = cut.seconds
        from mlx_lm.utils import get_total_parameters

        return SubNetwork(
            model=cut.model,
            selection=selection,
            selector=self.selector_name,
            task=task,
            num_kept_units=selection.num_kept_units,
            num_units=self.num_units,
            selection_s=selection_s,
            slicing_s=slicing_s,
            weights_from_disk=cut.from_disk,
            requantization_error=cut.requantization_error,
            active_parameters=get_total_parameters(cut.model),
            total_parameters=cut.total_parameters,
            **facts,
        )
