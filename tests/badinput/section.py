"""The section "Bad input" of docs/reliability.md, from the campaign's figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WHAT = {
    "YAML file, mutated": "a whole configuration with one to three mutations: values, keys, bytes, indents, encodings",
    "value of the schema": "hypothesis draws a key of the schema and a value of any type",
    "prompt file": "encodings, ends of lines, keys, quotes, nulls, torn files, very long and non-Latin prompts",
    "key of the data": "columns, splits, selections, weights and held-out shares that do not fit their files",
    "saved dataset": "folders of `datasets`: shards missing or cut, splits, columns of other types and of nulls",
    "model folder": "truncated, mis-shaped, missing and pickled weights, shards, variants, configurations",
    "reward model": "each file of eight rewards: missing, cut, something else, keys of JSON, tensors of weights",
}


def section(figures: Mapping[str, Any]) -> str:
    kinds = figures["kinds"]
    total = {key: sum(row[key] for row in kinds.values()) for key in ("cases", "refused", "accepted", "faults")}
    rows = [
        f"| {kind} | {WHAT.get(kind, '')} | {row['cases']} | {row['refused']} | {row['accepted']} | {row['faults']} |"
        for kind, row in {**kinds, "all": total}.items()
    ]
    return "\n".join(
        [
            "## Bad input",
            "What a run reads is checked before an actor starts. A mistake ends in one line that names the file, line",
            "or key and says what to write instead, with exit code 2; what is accepted is compared with an independent",
            f"reading of the same bytes. `make bad-input` ({figures['seconds']} s, {figures['date']}) tries:",
            "",
            "| input | what is wrong with it | cases | refused with a line | accepted and right | otherwise |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "Prompts longer than a text encoder reads are cut off by it. `train` and `encode` say so at their start,",
            "for each tokenizer: how many prompts of those that the run draws, and the length of the longest.",
            "",
        ]
    )
