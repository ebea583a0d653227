"""Small tasks of lm-evaluation-harness, whose questions lie beside them."""

from __future__ import annotations

import json
from pathlib import Path

CHOICES = [
    {"question": "def area(self", "choices": [", x):", "): return", " import"], "answer": 1},
    {"question": "import os, ", "choices": ["sys", "re", "json"], "answer": 0},  # the blank belongs to the choices
    {"question": "", "choices": ["class A:", "raise", "  "], "answer": 2},
    {"question": "for name in sorted(self._handlers): " * 8, "choices": ["pass", "yield name"], "answer": 1},
    {"question": "é ü 漢字 ", "choices": ["x", "é"], "answer": 1},
]
TEXTS = ["x", "import logging\nlogger = logging.getLogger(__name__)\n" * 4, "class Policy(_PolicyBase):"]
PROMPTS = ["def _f(", "import ", "raise ValueError('not a valid value for this: ' + repr(value))" * 3]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl, train: {folder}/{name}.jsonl}}}}
test_split: test
output_type: {kind}
"""
FIELDS = {
    "choice": """
fewshot_split: train
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "text": """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
    "greedy": """
doc_to_text: "{{text}}"
doc_to_target: "self"
generation_kwargs: {until: ["\\n", ")"], max_gen_toks: 9}
metric_list: [{metric: exact_match}]
""",
    "drawn": """
doc_to_text: "{{text}}"
doc_to_target: "self"
generation_kwargs: {until: ["\\n"], max_gen_toks: 9, do_sample: true, temperature: 0.9, top_k: 40}
repeats: 2
metric_list: [{metric: exact_match}]
""",
}
KINDS = {
    "choice": "multiple_choice",
    "text": "loglikelihood_rolling",
    "greedy": "generate_until",
    "drawn": "generate_until",
}


def write_tasks(folder: Path) -> None:
    """NAME.yaml of each task, and its questions as NAME.jsonl."""
    prompts = [{"text": text} for text in PROMPTS]
    questions = {"choice": CHOICES, "text": [{"text": each} for each in TEXTS], "greedy": prompts, "drawn": prompts}
    for name, kind in KINDS.items():
        lines = (json.dumps(each) + "\n" for each in questions[name])
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        task = TASK.format(name=name, folder=folder, kind=kind) + FIELDS[name]
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
