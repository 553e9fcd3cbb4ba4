"""Multiple choice in MMLU's layout through EleutherAI's lm-evaluation-harness, in this process, on a model that is in memory.

The harness writes the prompts, takes the likelihoods and counts, by its own task mmlu (arXiv 2009.03300): "The following are
multiple choice questions (with answers) about ...", the question, its choices as A to D, "Answer:"; the answer is the likeliest
letter, batch_size sequences a pass. Only the rows come from elsewhere: parquet files in a folder, so no network is asked. The
harness is optional: pip install 'flora[eval]'.
"""
import contextlib
import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from flora.errors import DataError, needs
from flora.evaluate import eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
LETTERS = ["A", "B", "C", "D"]
COLUMNS = ["question", "subject", "choices", "answer"]
SHOTS = 5                                                       # MMLU's own number of examples before a question
TEXT = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"


def lm_eval_mmlu(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", folder: str | Path, batch_size: int = 8,
                 num_fewshot: int | None = None) -> dict[str, Any]:
    """{"acc", "acc_stderr", "questions", "num_fewshot", "subjects": {subject: {"acc", "acc_stderr", "questions"}}}.

    folder: test-*.parquet, and for examples before each question dev-*.parquet, with the columns question, subject, choices (four
    texts), answer (0 to 3). num_fewshot: how many examples, the first of the question's subject; None: five where there are dev
    files, else none. acc: over all questions; acc_stderr: within subjects, pooled, as the harness gives it for a group; None where
    every subject has one question. Raises ConfigError without lm-eval, DataError for missing or malformed files.
    """
    with needs("lm-evaluation-harness", "eval"):
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
    if batch_size < 1:
        raise DataError(f"expected a batch size of at least 1; got {batch_size}. Set it to the sequences that one pass may hold.")
    test, dev, shots = _rows(Path(folder).expanduser(), num_fewshot)
    with _told_only_errors(), eval_mode(model):
        harness = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)     # it may set a pad token
        tasks = {f"mmlu_{subject}": _task(subject, rows, dev.get(subject, []), shots) for subject, rows in test.items()}
        found = evaluate(harness, tasks, log_samples=False, bootstrap_iters=0)["results"]
    subjects = {subject: _summary(found[f"mmlu_{subject}"]["acc,none"], len(rows)) for subject, rows in test.items()}
    questions = sum(map(len, test.values()))
    spread = sum(s["questions"] * s["acc"] * (1 - s["acc"]) for s in subjects.values())
    free = questions - len(subjects)
    return {"acc": sum(s["acc"] * s["questions"] for s in subjects.values()) / questions,
            "acc_stderr": math.sqrt(spread / free / questions) if free else None,
            "questions": questions, "num_fewshot": shots, "subjects": subjects}


def _summary(acc: float, count: int) -> dict[str, Any]:
    """acc_stderr: √(acc (1 - acc) / (n - 1)), the standard error of a mean of zeros and ones; None of one question."""
    return {"acc": acc, "acc_stderr": math.sqrt(acc * (1 - acc) / (count - 1)) if count > 1 else None, "questions": count}


def _task(subject: str, test: list[Row], dev: list[Row], shots: int) -> Any:
    """The harness's task mmlu of one subject on these rows."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    class Task(ConfigurableTask):
        def download(self, dataset_kwargs: object = None) -> None:
            self.dataset = {"test": Dataset.from_list(test), **({"dev": Dataset.from_list(dev[:shots])} if shots else {})}

    examples = {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}} if shots else {}
    about = subject.replace("_", " ")
    return Task(config={
        "task": f"mmlu_{subject}", "dataset_path": "parquet", "test_split": "test", "num_fewshot": shots, **examples,
        "description": f"The following are multiple choice questions (with answers) about {about}.\n\n",
        "doc_to_text": TEXT, "doc_to_choice": LETTERS, "doc_to_target": "answer", "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], "metadata": {"version": 1.0}})


def _rows(folder: Path, wanted: int | None) -> tuple[dict[str, list[Row]], dict[str, list[Row]], int]:
    """(questions by subject, examples by subject, examples before a question)."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with test-*.parquet; there is none. Give the folder of MMLU's parquet files.")
    test, dev = (_by_subject(sorted(folder.glob(f"{split}-*.parquet"))) for split in ("test", "dev"))
    if not test:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise DataError(f"{folder}: expected questions in test-*.parquet; got {names}. Give the folder of MMLU's parquet files.")
    shots = wanted if wanted is not None else SHOTS if dev else 0
    if shots < 0:
        raise DataError(f"expected num_fewshot of at least 0; got {shots}. 0 puts no example before a question.")
    few = [subject for subject in test if len(dev.get(subject, [])) < shots]
    if few:
        raise DataError(f"{folder}: expected {shots} examples of every subject in dev-*.parquet; got {len(dev.get(few[0], []))} of "
                        f"{few[0]}. Lower num_fewshot, or add examples.")
    return test, dev, shots


def _by_subject(files: list[Path]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for path in files:
        for row in _read(path):
            found.setdefault(row["subject"], []).append(row)
    return dict(sorted(found.items()))


def _read(path: Path) -> list[Row]:
    """The rows of a file, each checked: the harness would count a question of another form as wrong."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:                                  # pyarrow raises a dozen kinds
        raise DataError(f"{path}: expected a parquet file; it cannot be read ({error}). Fetch it again.") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"{path}: expected the columns {', '.join(COLUMNS)}; got {', '.join(table.column_names)}, without "
                        f"{', '.join(missing)}. Rename its columns to these.")
    rows = table.select(COLUMNS).to_pylist()
    for number, row in enumerate(rows):
        choices, answer = row["choices"], row["answer"]
        fits = (all(isinstance(row[name], str) and row[name].strip() for name in ("question", "subject"))
                and isinstance(choices, list) and len(choices) == 4 and all(isinstance(choice, str) for choice in choices)
                and isinstance(answer, int) and 0 <= answer <= 3)
        if not fits:
            raise DataError(f"{path}, row {number}: expected a question and a subject (texts), four choices (texts) and an answer, "
                            f"0 to 3; got {str(row)[:160]}. Mend or delete that row.")
    return rows


@contextlib.contextmanager
def _told_only_errors() -> Iterator[None]:
    """The harness's warnings left out while the block runs: they are of its command line."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
