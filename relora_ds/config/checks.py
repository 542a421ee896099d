"""The rules that a run's fields and its model must keep together, whatever its method.

A rule is a generator whose parameters name the sections it reads; it yields what is wrong. It is
skipped while one of its sections is itself invalid, so one report can hold both kinds of problems.
`architecture` is the model's; all other names are sections of `RunConfig`. General rules are in
`rules`; those that belong to one method are methods of its settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from relora_ds.config.reading.document import Finding, Rule
from relora_ds.config.rules.corpora import (
    builtin_vocabulary_fits_model,
    data_keys_match_source,
    rows_have_documents,
    rows_have_targets,
    validation_is_held_out,
)
from relora_ds.config.rules.islands import ISLAND_RULES
from relora_ds.config.rules.optimizers import (
    matrices_are_trained,
    pairs_are_moved,
    pairs_have_their_own_rate,
    scaled_head_is_free,
)
from relora_ds.config.rules.schedules import (
    decay_is_of_wsd,
    decay_leaves_a_stable_phase,
    warmup_ends,
)
from relora_ds.config.rules.tensors import (
    heads_divide_over_tensor,
    rank_divides_over_tensor,
    rank_fits_projections,
    tensor_parallelism_is_supported,
)
from relora_ds.config.rules.training import (
    allowed_changes_are_keys,
    base_precision_has_a_use,
    guards_can_decide_before_the_update,
    masters_can_be_left_out,
    micro_batch_divides_batch,
    per_layer_update_has_optimizer,
    precisions_agree,
    sequence_fits_model,
    traced_steps_are_trained,
)
from relora_ds.config.rules.unused import UNUSED_RULES


def find_problems(sections: Mapping[str, Any]) -> list[Finding]:
    """What breaks a rule, general or the method's own.

    Args:
        sections: the valid sections of a run by name, and `architecture` if the model is valid.
    """
    own = sections["method"].rules() if "method" in sections else ()
    return apply_rules((*RULES, *own), sections)


def find_doubts(sections: Mapping[str, Any]) -> list[Finding]:
    """What is allowed, but probably not meant.

    Args:
        sections: all sections of a run by name, and its `architecture`.
    """
    return apply_rules((*sections["method"].warnings(), *WARNINGS), sections)


def apply_rules(rules: Iterable[Rule], sections: Mapping[str, Any]) -> list[Finding]:
    """What all rules find whose parameters are among `sections`."""
    findings: list[Finding] = []
    for rule in rules:
        names = inspect.signature(rule).parameters
        if all(name in sections for name in names):
            findings += rule(**{name: sections[name] for name in names})
    return findings


RULES: tuple[Rule, ...] = (
    rank_fits_projections,
    rank_divides_over_tensor,
    sequence_fits_model,
    traced_steps_are_trained,
    micro_batch_divides_batch,
    warmup_ends,
    decay_leaves_a_stable_phase,
    per_layer_update_has_optimizer,
    guards_can_decide_before_the_update,
    masters_can_be_left_out,
    data_keys_match_source,
    rows_have_documents,
    rows_have_targets,
    builtin_vocabulary_fits_model,
    precisions_agree,
    heads_divide_over_tensor,
    tensor_parallelism_is_supported,
    allowed_changes_are_keys,
    matrices_are_trained,
    pairs_are_moved,
    scaled_head_is_free,
    *ISLAND_RULES,
)
WARNINGS: tuple[Rule, ...] = (
    base_precision_has_a_use,
    decay_is_of_wsd,
    pairs_have_their_own_rate,
    validation_is_held_out,
    *UNUSED_RULES,
)
