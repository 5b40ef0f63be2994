"""Run the released TRL with losses of the toolkit: docs/how-to/train-in-trl.md, and what has to be equal.

    python gold_in_trl.py PAGE FOLDER

Works in the folder. Writes what it found as JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cdm_toolkit import kd
from cdm_toolkit.hub.cut_vocabulary import load_cut
from cdm_toolkit.integrations.trl import GoldLoss, set_loss
from cdm_toolkit.kd.given_ids import row_of_ids

MODELS = {
    "mistralai/Mistral-7B-Instruct-v0.1": "mistral",
    "Qwen/Qwen2.5-32B-Instruct": "smollm2",
    "byte-level": "smollm2",
}
"""The models of the page, one more, and the tokenizers that these have here; byte-level ones are cut to `ENTRIES`."""
ENTRIES = 900
SENTENCEPIECE, TEACHER, BYTE_LEVEL = MODELS
ROWS = [
    {
        "prompt": f"What is {n} + {n}?\n",
        "completion": f"It is {2 * n}, says the naïve one: {n} twice." + " So!" * n,
    }
    for n in range(1, 9)
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"].strip()}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in ROWS
]


def make_model(folder: str, name: str, seed: int) -> None:
    tokenizer = load_cut(name, ENTRIES if name == "smollm2" else None).tokenizer
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def gold_trainer(student: str, teacher: str, rows: list[dict[str, Any]] = ROWS, **settings: Any) -> Any:
    """Make a trainer that changes no weights."""
    from trl.experimental.gold import GOLDConfig, GOLDTrainer  # not in the environment of the other tests

    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    used = {"use_uld_loss": True, "use_extended_uld": False, "lmbda": 0.0, "temperature": 1.0}
    used |= {"learning_rate": 0.0, "max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    used |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    used |= {"bf16": False, "use_cpu": True, "report_to": "none"}
    args = GOLDConfig("out", max_length=128, max_completion_length=12, **(used | settings))
    data = {"train_dataset": Dataset.from_list(ROWS), "eval_dataset": Dataset.from_list(rows)}
    return GOLDTrainer(student, teacher, args, processing_class=tokenizer, **data)


class Recorded(GoldLoss):
    """Keep what the trainer hands over last, and what it gets."""

    handed: dict[str, torch.Tensor]
    value: float

    def __call__(self, *given: Any, **handed: Any) -> torch.Tensor:
        loss = super().__call__(*given, **handed)
        self.handed = {name: each.detach() for name, each in handed.items() if "byte" not in name}
        self.value = loss.item()
        return loss

    def of_rows(self, some: list[int]) -> float:
        return super().__call__(**{name: each[some] for name, each in self.handed.items()}).item()


# What is compared


def page(path: str) -> dict[str, Any]:
    """Do what the page shows, for a few tokens on the CPU."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    names: dict[str, Any] = {}
    text, small = (
        Path(path).read_text(encoding="utf-8"),
        '"out", use_cpu=True, bf16=False, max_completion_length=16',
    )
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        exec(code.replace('"out"', f"{small}, max_steps=2"), names)
    log = [line for line in names["trainer"].state.log_history if "kd" in line]
    return {name: [line[name] for line in log] for name in ("loss", "kd", "aligned", "on_policy_loss")}


def same_rows() -> Iterator[dict[str, Any]]:
    """Compare the losses of a batch with those of one's own loop, whose rows are the student's ids."""
    trainer = gold_trainer(SENTENCEPIECE, TEACHER)
    pair = set_loss(trainer, kd.ULD).method.pair
    for trainer.lmbda in (0.0, 1.0):
        for method in (kd.Spelling(pair), kd.ALM(pair), kd.GOLD(pair)):
            trainer.uld_loss_fn = loss = Recorded(method, alpha=0.3)
            torch.manual_seed(5)
            trainer.train()
            some = [nth for nth in range(4) if _as_kd_has_it(pair, loss.handed, nth)]
            rows = [_row(pair, loss.handed, nth) for nth in some]
            teacher = pair.teacher
            pair.teacher = replace(teacher, start=None)  # TRL adds what the teacher's tokenizer does: nothing
            batch = pair.collate(rows)
            pair.teacher = teacher
            student = trainer.accelerator.unwrap_model(trainer.model).eval()
            signal = method.signal(trainer.teacher_model, batch)
            out = method(student(**batch.student).logits, signal, batch)
            yield {
                "method": method.name,
                "lmbda": trainer.lmbda,
                "rows": len(some),
                "groups": batch.teachers[0].groups,
                "ours": 0.3 * out.ce.item() + 0.7 * out.kd.item(),
                "theirs": loss.value if len(some) == 4 else loss.of_rows(some),
            }


def _row(pair: kd.TokenizerPair, handed: dict[str, torch.Tensor], nth: int) -> Any:
    ids, labels = (handed[f"student_{name}"][nth].numpy() for name in ("input_ids", "labels"))
    learned = np.flatnonzero(labels != -100)
    before = int(np.flatnonzero(ids != ids[0])[0]) if ids[0] == pair.student.eos else 0
    turns = np.array([[learned[0], learned[-1] + 1]], np.int32) - before
    return row_of_ids(nth + 1, pair.student.view, ids[before : learned[-1] + 1].astype(np.int32), turns)


def _as_kd_has_it(pair: kd.TokenizerPair, handed: dict[str, torch.Tensor], nth: int) -> bool:
    """Say whether prompt and answer are the same tokens when the teacher encodes them as one text."""
    row = _row(pair, handed, nth)
    labels = handed["teacher_labels"][nth]
    last = int((labels != -100).nonzero()[-1])
    ids = handed["teacher_input_ids"][nth, :last].tolist()
    return bool(pair.teacher.view.encode(row.text).ids.tolist() == ids)


def one_tokenizer() -> Iterator[tuple[str, float, float]]:
    """Compare losses of TRL's own with those of the toolkit, for two models of one tokenizer."""
    theirs = gold_trainer(BYTE_LEVEL, TEACHER, ROWS[:3], use_uld_loss=False, per_device_eval_batch_size=2)
    ours = gold_trainer(BYTE_LEVEL, TEACHER, ROWS[:3], per_device_eval_batch_size=2)
    uld = ours.uld_loss_fn
    pair = set_loss(ours, kd.KL).method.pair
    whole = {"top_k": pair.vocab_s}

    def value(method: kd.Method[Any, Any] | None = None) -> float:
        trainer = theirs if method is None else ours
        ours.uld_loss_fn = GoldLoss(method) if method else uld
        return float(trainer.evaluate()["eval_loss"])

    for name, beta, method in (
        ("kl", 0.0, kd.KL(pair, **whole)),
        ("reverse-kl", 1.0, kd.ReverseKL(pair, **whole)),
        ("jsd", 0.3, kd.JSD(pair, beta=0.3, **whole)),
    ):
        theirs.beta = beta
        yield name, value(), value(method)
    theirs = ours
    ours.args.per_device_eval_batch_size = 1  # its means are of each row
    uld.token_merge_strategy, uld.skip_student_eos, uld.skip_teacher_eos = "bayesian", False, False
    yield "uld", value(), value(kd.ULD(pair, **whole))
    uld.use_hybrid_loss, uld.beta = True, 0.3
    partner = pair.exact()  # special tokens without a role have none here
    matched = np.flatnonzero(partner >= 0).tolist()
    uld.mapping_tensor = torch.from_numpy(partner)
    uld._vocab_mapping = dict(zip(matched, partner[matched].tolist(), strict=True))
    uld._teacher_matched_ids, uld._student_matched_ids = set(matched), set(partner[matched].tolist())
    yield "gold", value(), value(kd.GOLD(pair, beta=0.3, **whole))


def accumulated() -> Iterator[list[dict[str, float]]]:
    """Train with accumulated gradients, by a SentencePiece teacher: on texts, then on samples."""
    both = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = gold_trainer(BYTE_LEVEL, SENTENCEPIECE, max_steps=2, **both)
    set_loss(trainer, kd.ALM, alpha=0.25)
    for trainer.lmbda in (0.0, 1.0):
        trainer.train()
        yield [line for line in trainer.state.log_history if "kd" in line]


def chats() -> dict[str, Any]:
    """Evaluate on chats, and count the ends that are learned."""
    trainer = gold_trainer(SENTENCEPIECE, TEACHER, CHATS[:4])
    trainer.uld_loss_fn = loss = Recorded(set_loss(trainer, kd.ULD).method)
    log = trainer.evaluate()
    batch = loss.collate(**{name: each for name, each in loss.handed.items() if "logits" not in name})
    (side,) = batch.teachers
    learned = batch.labels[side.student_token_rows]
    ends = (learned == loss.method.pair.student.eos).sum()
    return {"labels": len(batch.labels), "learned": len(learned), "ends": int(ends), "loss": log["eval_loss"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[2])
    with redirect_stdout(sys.stderr):
        for seed, made in enumerate(MODELS.items()):
            make_model(*made, seed)
        results = {
            "page": page(sys.argv[1]),
            "same rows": list(same_rows()),
            "one tokenizer": list(one_tokenizer()),
            "accumulated": list(accumulated()),
            "chats": chats(),
        }
    sys.stdout.write(json.dumps(results))
