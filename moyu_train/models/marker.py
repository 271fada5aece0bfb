"""The marker in a sparse model's activation field, by which stock transformers refuses what it would misread."""

import copy
from typing import Any

import torch

from moyu_train.errors import MoyuError

ACTIVATION_FIELDS = ("hidden_activation", "hidden_act", "activation_function", "activation")


def _place(config: Any) -> tuple[Any, str] | None:
    """The config that holds the activation (itself, or the text part of a composite one) and the field's name.

    A field that the config's class declares goes first: old checkpoints carry others, which no code reads any more.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    places = [
        (owner, name)
        for owner in (config, text)
        for name in ACTIVATION_FIELDS
        if isinstance(getattr(owner, name, None), str)
    ]
    return min(places, key=lambda place: not hasattr(type(place[0]), place[1]), default=None)


def _found(config: Any) -> tuple[Any, str]:
    place = _place(config)
    if place is None:
        raise MoyuError(
            f"{type(config).__name__} has no activation field (looked for {', '.join(ACTIVATION_FIELDS)}), so a sparse "
            "checkpoint could be loaded densely without notice; this family cannot be exported"
        )
    return place


def activation_field(config: Any) -> str:
    """Name of the config field that holds the activation.

    Raises: MoyuError where the family has none, since then stock code could not be stopped from answering nonsense.
    """
    return _found(config)[1]


def base_activation(config: Any) -> str:
    """The activation's stock name, whether or not the marker is on."""
    owner, name = _found(config)
    value: str = getattr(owner, name)
    return value.split(":")[2].split(" ")[0] if value.startswith("moyu:") else value


def set_activation(config: Any, activation: str) -> None:
    """Put a stock activation's name where the family keeps it; without the marker."""
    owner, name = _found(config)
    setattr(owner, name, activation)


def set_marker(config: Any, rule: str) -> None:
    """Put the marker on a live config: stock transformers refuses the saved model with a KeyError that prints it."""
    if marked_rule(config) is None:
        set_activation(config, f"moyu:{rule}:{base_activation(config)} (load with moyu_kernels.from_pretrained)")


def clear_marker(config: Any) -> None:
    set_activation(config, base_activation(config))


def marked_rule(config: Any) -> str | None:
    """The rule that a marker names; None where there is no marker."""
    place = _place(config)
    value = getattr(*place) if place else ""
    return value.split(":")[1] if value.startswith("moyu:") else None


def check_marker(config: Any) -> None:
    """Try on the meta device that stock code trips over the marker.

    Raises: MoyuError where the family has no activation field, or its code does not read it.
    """
    from transformers import AutoModelForCausalLM

    marked = copy.deepcopy(config)
    set_marker(marked, "check")
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(marked)
    except KeyError as error:
        if "moyu:" not in str(error):
            raise
        return
    raise MoyuError(
        f"stock code does not read {activation_field(config)!r} of {type(config).__name__}, so a sparse checkpoint "
        "could be loaded densely without notice; this family cannot be exported"
    )
