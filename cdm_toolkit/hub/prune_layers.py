"""Make a model smaller by leaving out the layers that change its hidden states least (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float64, Int32
from torch import Tensor

from cdm_toolkit.errors import BadOption, CdmError
from cdm_toolkit.forward import states_by_batch
from cdm_toolkit.hub.hidden_states import token_sequences

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from cdm_toolkit.tokdiff.view import TokenizerView


@dataclass(frozen=True, slots=True)
class Pruned:
    """The block influence of each layer of the whole model, and the layers that were left out, counted from 0."""

    influence: tuple[float, ...]
    removed: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(len(self.influence))) - set(self.removed)))


def prune_layers(
    model: PreTrainedModel, view: TokenizerView, layers: int, texts: Sequence[str]
) -> tuple[PreTrainedModel, Pruned]:
    """Keep the `layers` layers of greatest block influence on the texts, as `view`, the model's own, tokenizes them.

    All influences are measured once, in the whole model. The given model shares its weights with the new one. Raises
    BadOption for another number than 1 to one less than there are, and for a model whose layers cannot be found or
    depend on their number; CdmError where the texts are empty.
    """
    there = len(decoder_layers(model))
    if not 1 <= layers < there:
        raise BadOption("layers", layers, f"1 to {there - 1}: the model has {there}")
    influence = block_influence(model, token_sequences(model, view, texts))
    least_first = np.argsort(influence, kind="stable")
    pruned = Pruned(tuple(influence.tolist()), tuple(sorted(least_first[: there - layers].tolist())))
    return keep_layers(model, pruned.kept), pruned


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Find the list of a model's transformer layers. Raises BadOption where none has as many as its config says."""
    from torch.nn import ModuleList

    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [part for part in model.get_decoder().children() if isinstance(part, ModuleList)]
    match [part for part in lists if len(part) == count]:
        case [layers]:
            return layers
        case _:
            found = f"no list of {count} layers was found in {type(model).__name__}"
            raise BadOption("layers", "a number", f"none for this model: {found}")


# Influence


def influence_of(
    before: Float[Tensor, "*tokens hidden"], after: Float[Tensor, "*tokens hidden"]
) -> Float[Tensor, "*tokens"]:
    """Return 1 − cos of the hidden states before and after a layer, at each token (arXiv 2403.03853, eq. 1)."""
    import torch

    return 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)


def block_influence(
    model: PreTrainedModel, sequences: Sequence[Int32[np.ndarray, " _"]]
) -> Float64[np.ndarray, " layer"]:
    """Return each layer's influence: the mean of `influence_of` over all tokens of the sequences, none of them empty.

    Raises CdmError where there is no sequence.
    """
    if not sequences:
        raise CdmError("the texts to measure layers on are empty", fix="give rows with text as `data`")
    layers = decoder_layers(model)
    sums = np.zeros(len(layers))
    found: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for nth, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(_keeps(found, nth), with_kwargs=True).remove)
        for batch in states_by_batch(model, sequences):
            sums += [found[nth].flatten()[batch.at].double().sum().item() for nth in range(len(layers))]
    return sums / sum(map(len, sequences))


def _keeps(found: dict[int, Tensor], nth: int) -> Callable[..., None]:
    """Make a forward hook that keeps a layer's influence on the tokens of a batch."""

    def keep(_layer: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        found[nth] = influence_of(before, output[0] if isinstance(output, tuple) else output)

    return keep


# The smaller model


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Build the model that has these layers alone, in this order, with the same weights.

    It is built from its own config, so that all that depends on a layer's number is as `from_pretrained` makes it.
    Raises BadOption where a layer would be of another kind at its new place.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = _config_of(model, kept)
    with torch.random.fork_rng(devices=[]):  # initial weights, which are replaced
        smaller: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    pairs = zip(kept, decoder_layers(smaller), strict=True)
    alike = all(_alike(decoder_layers(model)[i], layer, (i, nth)) for nth, (i, layer) in enumerate(pairs))
    weights = _weights_of(model, kept)
    if not alike or weights.keys() != smaller.state_dict().keys():
        name = type(model).__name__
        raise BadOption(
            "layers", len(kept), f"none for this model: what a layer of {name} is depends on its number"
        )
    smaller.load_state_dict(weights, assign=True)
    smaller.tie_weights()
    smaller.generation_config = model.generation_config
    return smaller


def _config_of(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedConfig:
    """Copy a model's config, with lists that have an entry for each layer, such as layer_types, shortened."""
    from copy import deepcopy

    config = deepcopy(model.config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == count:
            setattr(text, name, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)
    return config


def _weights_of(model: PreTrainedModel, kept: Sequence[int]) -> dict[str, Tensor]:
    """Give the state dict of a model with these layers alone."""
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    found: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            found[name] = weight
        elif int(number) in kept:
            found[f"{prefix}{kept.index(int(number))}.{rest}"] = weight
    return found


def _alike(old: torch.nn.Module, new: torch.nn.Module, numbers: tuple[int, int]) -> bool:
    """Tell whether two layers differ in nothing but their weights and their `numbers`."""
    mine, its = dict(old.named_modules()), dict(new.named_modules())
    return mine.keys() == its.keys() and all(
        type(part) is type(its[name])
        and all(
            (value, vars(its[name]).get(key)) == numbers or value == vars(its[name]).get(key)
            for key, value in vars(part).items()
            if isinstance(value, int | float | str | None)
        )
        for name, part in mine.items()
    )
