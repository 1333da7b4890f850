# SPDX-License-Identifier: Apache-2.0
"""Decode steps as a CUDA graph, without compiling the model."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from rq_hf.graph_inputs import CannotBeKept, put_together, take_apart
from rq_hf.graph_state import CacheState
from rq_hf.static_cache import RotorQuantStaticCache

_FORWARD, _CRITERIA = "forward", "_valid_auto_compile_criteria"
# a sliding window that fills, or another kind of output: a handful at most
_MOST_GRAPHS = 4
# calls whose arguments change each time must not push out those that come back
_MOST_SEEN = 16

_caches_in_use: weakref.WeakSet[RotorQuantStaticCache] = weakref.WeakSet()


@contextmanager
def cuda_graph(model: PreTrainedModel, cache: RotorQuantStaticCache) -> Iterator[PreTrainedModel]:
    """Runs the model's decode steps with this cache as a CUDA graph, recorded once.

    The host then does next to nothing in a step, and nothing is compiled: `generate()` leaves it
    alone here. What counts as a step is a call of the model with one new token a sequence and this
    cache behind its prompt, without gradients or autocast; all other calls run as they always do.
    The first step of a kind runs so too, the second is recorded, and all that differ from it in
    the numbers of their tensors alone are replayed, with new prompts too after `cache.reset()`.

    A loop of one's own passes no `attention_mask`, or one of a fixed size; with sliding layers
    also `position_ids`, and masks as `generate()` makes them. Weights must stay where they are.

    Args:
        model: A decoder model on one CUDA device.
        cache: Its cache. Steps beyond `max_cache_len` tokens are not noticed, and store nothing.

    Yields:
        The model.

    Raises:
        ValueError: The model is not on one CUDA device, model or cache are of another kind or in
            use here already, or `generate()` gets a `compile_config`. In the end: a step has stored
            keys or values that are NaN or infinite, see `RotorQuantStaticCache.check_steps`.
        RuntimeError: A step does what no CUDA graph can hold. The cache is as it was before it.

    Example:
        >>> cache = RotorQuantStaticCache(config=model.config, max_cache_len=4096)
        >>> with cuda_graph(model, cache):
        ...     model.generate(**inputs, past_key_values=cache)
    """
    _check(model, cache)
    steps = GraphedSteps(model, cache, make_recorder(_device_of(model)))
    before = {name: vars(model)[name] for name in (_FORWARD, _CRITERIA) if name in vars(model)}
    criteria = getattr(model, _CRITERIA, None)
    _caches_in_use.add(cache)
    try:
        setattr(model, _FORWARD, steps)
        if criteria is not None:
            setattr(model, _CRITERIA, functools.partial(_never_compiles, criteria, cache))
        yield model
    finally:
        for name in (_FORWARD, _CRITERIA):
            vars(model).pop(name, None)
        vars(model).update(before)
        _caches_in_use.discard(cache)
        steps.close()
    cache.check_steps()


class Recorder:
    """Records what a function does on a CUDA device.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], Any]) -> None:
        """Calls `step` where it will be recorded, so that nothing is left to be made there."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def record(self, step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Returns what `step` returns, with nothing in its tensors, and what fills them.

        Raises:
            RuntimeError: `step` does what cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self.device),
                # what other threads do meanwhile is no part of the step
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                outputs = step()
        except RuntimeError as error:
            raise RuntimeError(
                f"this model's step cannot be recorded as a CUDA graph ({error}); run it without "
                "cuda_graph"
            ) from error
        return outputs, graph.replay


def make_recorder(device: torch.device) -> Recorder:
    """Returns a recorder.

    Raises:
        ValueError: It is no CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"cuda_graph needs a model on a CUDA device, got {device}")
    return Recorder(device)


class GraphedSteps:
    """A model's forward whose steps with one cache are recorded and replayed.

    Args:
        model: The model.
        cache: The cache.
        recorder: What records.

    Attributes:
        recorded: How many graphs were recorded.
        replayed: How many steps were replayed.
    """

    def __init__(
        self, model: PreTrainedModel, cache: RotorQuantStaticCache, recorder: Recorder
    ) -> None:
        self.model, self.cache, self.recorder = model, cache, recorder
        self.run: Callable[..., Any] = model.forward
        self.device = recorder.device
        self.recorded = self.replayed = 0
        self._is_open = True
        self.state = CacheState(cache)
        self._names = list(inspect.signature(self.run).parameters)
        self._decoder = model.config.get_text_config(decoder=True)
        self._graphs: OrderedDict[Hashable, RecordedStep] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        # `generate` asks for the signature
        functools.update_wrapper(self, self.run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self._may_be_held():
            return self.run(*args, **kwargs)
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tensors: list[Tensor] = []
        key = self._key(arguments, tensors)
        if key is None or not self._is_known(key):
            return self.run(*args, **kwargs)
        self.state.return_to_places()
        step = self._graphs.get(key)
        if step is None:
            step = self._graphs[key] = self._record(arguments, tensors)
            if len(self._graphs) > _MOST_GRAPHS:
                self._forget(next(iter(self._graphs)))
        self._graphs.move_to_end(key)
        outputs = step.replay(tensors)
        self.state.count_step()
        self.replayed += 1
        return outputs

    def close(self) -> None:
        """Gives the graphs' memory back; later calls run as they always do."""
        self._is_open = False
        self._graphs.clear()

    def _may_be_held(self) -> bool:
        return self._is_open and not (
            torch.is_grad_enabled()
            or self.model.training
            or torch.is_autocast_enabled(self.device.type)
        )

    def _key(self, arguments: dict[str, Any], tensors: list[Tensor]) -> Hashable | None:
        """Returns what calls have in common that one graph serves; None if none can."""
        if not self._is_step(arguments) or not self.state.takes_steps:
            return None
        try:
            call = take_apart(arguments, self.cache, self.device, tensors)
        except CannotBeKept:
            return None
        return call, self._decoder._attn_implementation, self.state.way()

    def _is_step(self, arguments: dict[str, Any]) -> bool:
        if arguments.get("past_key_values") is not self.cache:
            return False
        if arguments.get("use_cache") is False:
            return False
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or tokens.dim() < 2 or tokens.shape[1] != 1:
            return False
        if not self.state.counts_on_host:
            return True
        return arguments.get("position_ids") is not None and _is_made(
            arguments.get("attention_mask")
        )

    def _is_known(self, key: Hashable) -> bool:
        """Whether such a call has been before: of those that never come back nothing is kept."""
        known = key in self._graphs or key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return known

    def _forget(self, key: Hashable) -> None:
        del self._graphs[key]
        self._seen.pop(key, None)

    def _record(self, arguments: dict[str, Any], tensors: list[Tensor]) -> RecordedStep:
        # written to in every mode, which those made in inference mode cannot be
        with torch.inference_mode(False):
            inputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
            for mine, new in zip(inputs, tensors, strict=True):
                mine.copy_(new)
        step = functools.partial(self.run, **put_together(arguments, iter(inputs)))
        self.state.hold()
        saved = self.state.save()
        try:
            self.recorder.warm_up(step)
            saved.restore()
            outputs, replay = self.recorder.record(step)
            if self.state.has_moved:
                raise RuntimeError(
                    "this model's step puts new tensors into the cache, which a CUDA graph cannot "
                    "do; run it without cuda_graph"
                )
            recorded = RecordedStep(inputs, outputs, replay, self.cache, self.state.tables())
        finally:
            saved.restore()
        self.recorded += 1
        return recorded


class RecordedStep:
    """One recorded step.

    Args:
        inputs: The tensors that it reads.
        outputs: What the model returned.
        replay: Runs it.
        cache: May be among the outputs.
        tables: What else it reads, which must live as long as it.

    Raises:
        RuntimeError: There is something among the outputs that cannot be copied.
    """

    def __init__(
        self,
        inputs: list[Tensor],
        outputs: Any,
        replay: Callable[[], None],
        cache: RotorQuantStaticCache,
        tables: list[Tensor],
    ) -> None:
        self._inputs, self._replay, self._tables = inputs, replay, tables
        self._outputs, self._form = tree_flatten(outputs)
        for x in self._outputs:
            if x is not cache and not isinstance(x, (Tensor, bool, int, float, str, type(None))):
                raise RuntimeError(
                    f"the model returns a {type(x).__name__}, which cuda_graph cannot copy; run "
                    "it without cuda_graph"
                )

    def replay(self, tensors: list[Tensor]) -> Any:
        """Runs the step with other inputs; returns copies of its outputs."""
        for mine, new in zip(self._inputs, tensors, strict=True):
            mine.copy_(new)
        self._replay()
        copies = [x.clone() if isinstance(x, Tensor) else x for x in self._outputs]
        return tree_unflatten(copies, self._form)


def _never_compiles(
    criteria: Callable[[dict[str, Any], Any], bool],
    cache: RotorQuantStaticCache,
    model_kwargs: dict[str, Any],
    generation_config: Any,
) -> bool:
    """Whether `generate` compiles steps: never those of this cache."""
    if model_kwargs.get("past_key_values") is not cache:
        return criteria(model_kwargs, generation_config)
    if generation_config.compile_config is not None and not generation_config.disable_compile:
        raise ValueError(
            "compile_config asks generate() to compile steps that cuda_graph records; leave one "
            "of the two"
        )
    return False


def _is_made(mask: Any) -> bool:
    """Whether masks are of their final form, which the model leaves as it is."""
    if isinstance(mask, dict):
        return all(x is None or _is_made(x) for x in mask.values())
    return isinstance(mask, Tensor) and mask.dim() == 4


def _device_of(model: PreTrainedModel) -> torch.device:
    devices = {x.device for x in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "one without parameters"
        raise ValueError(f"cuda_graph needs a model on one CUDA device, got {names}")
    return devices.pop()


def _check(model: PreTrainedModel, cache: RotorQuantStaticCache) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a model of transformers itself, neither wrapped nor compiled, got "
            f"{type(model).__name__}"
        )
    if not isinstance(cache, RotorQuantStaticCache):
        raise ValueError(
            f"cache must be a RotorQuantStaticCache, got {type(cache).__name__}: the addresses of "
            "other caches change"
        )
    if isinstance(vars(model).get(_FORWARD), GraphedSteps):
        raise ValueError("the model is in use by cuda_graph already; leave that first")
    if cache in _caches_in_use:
        raise ValueError("the cache is in use by cuda_graph with another model; leave that first")
