"""States of texts that were read, by their tokens: a text that begins like one of them is read from there on."""

from lizard_models.model.prefix.store import PrefixStates

__all__ = ["PrefixStates"]
