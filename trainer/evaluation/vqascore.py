"""Images scored by a vision-language model, the judge.

VQAScore (Lin et al. 2024, arXiv 2404.01291): the judge is asked ``Does this figure show "..."?``,
and the score is the probability of the answer Yes. Question and answer are those of its own code,
github.com/linzhiqiu/t2v_metrics, for judges that are chat models.

Shapes: B images scored at once, V vocabulary.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from ...pipeline.models.weights import LOADING_REPORT, refuse_misread
from ...pipeline.sources.images import open_upright
from ...pipeline.store.checks.parquet import READ_ERRORS, read_table
from ...pipeline.style import DPI
from ...schemas import (
    InputError,
    JudgeRecord,
    differences,
    parse,
    refuse_differences,
    write_document,
    write_whole,
)
from ...schemas.arrow import ascending
from ...schemas.display import Table
from ...schemas.json_file import read_json
from ...schemas.verbosity import progress_bar
from ..plots.images import sample_grid
from .shapes import interval

QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
"""The question of t2v_metrics for chat models; for CLIP-FlanT5, the paper's own judge, it ends in
``Please answer yes or no.``"""
ANSWERS = ("Yes", "No")
RECORD = "judge.json"
JUDGEMENTS = "judgements.parquet"
SCORES = "scores.parquet"
FIGURE = "judged.png"
ANSWERS_SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("group", pa.string()),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("asked", pa.string(), nullable=False),
        pa.field("yes", pa.float32(), nullable=False),
        pa.field("no", pa.float32(), nullable=False),
    ]
)
"""One row per image and question: the number of the image in the list, the sha256 of its bytes, its
group and caption, the caption ``asked`` about, and the probabilities of both answers."""
SCORES_SCHEMA = pa.schema(
    [
        pa.field("group", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("low", pa.float64(), nullable=False),
        pa.field("high", pa.float64(), nullable=False),
        pa.field("chance", pa.float64()),
        pa.field("num_images", pa.int64(), nullable=False),
        pa.field("num_prompts", pa.int64(), nullable=False),
    ]
)
"""One row per group of captions; see :func:`summarise`."""
ALL = "all"
"""The group of all captions."""
SAVE_SECONDS = 10.0
"""Time between writes of the answers so far."""
NUM_SHOWN = 24
"""Number of images in the figure."""
ANSWERS_EXPECTED = 0.5
"""Mean probability of Yes and No together below which the judge answers in other words."""

Dtype = Literal["float32", "bfloat16"]


def default_dtype() -> Dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


class VQAScorer:
    """A vision-language model of transformers that answers questions about images.

    Args:
        folder: folder of the model.
        name: name of the model, for messages.
        dtype: precision of the model.
        device: by default, the first GPU, or the CPU.
        trust_remote_code: run the code that comes with the model.

    Raises:
        InputError: transformers cannot load the folder as a model of images and text, the model
            has no chat template, or its files and its weights do not fit.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: Dtype,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.processor = AutoProcessor.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
            made: Any = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                **LOADING_REPORT,
            )
            self.model, loaded = made
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(
                f"--judge {name}: transformers cannot load it as a model of images and text: "
                f"{error}\nA model with its own code needs --trust-remote-code; most image "
                "processors need torchvision: pip install 'semroute[judge]'"
            ) from error
        refuse_misread(f"--judge {name}", self.model, loaded)
        if getattr(self.processor, "chat_template", None) is None:
            raise InputError(
                f"--judge {name} has no chat template; expected a model made for chats, such as "
                "Qwen2.5-VL, InternVL or LLaVA"
            )
        self.model.eval().requires_grad_(False).to(self.device)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # so that the answer comes after every question
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._answers = [tokenizer.encode(text, add_special_tokens=False) for text in ANSWERS]

    @torch.inference_mode()
    def ask(self, images: Sequence[Image.Image], questions: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities of Yes and No, [B, 2].

        For an answer of several tokens it is their geometric mean, as in t2v_metrics. The
        probabilities are the model's own, without the penalties and temperature that its generation
        settings may name.
        """
        texts = [self._prompt(question) for question in questions]
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        inputs = self.processor(
            text=texts,
            images=[[image] for image in images],
            padding=True,
            return_tensors="pt",
            # Unless the chat template begins with BOS already.
            add_special_tokens=not (bos is not None and texts[0].startswith(bos)),
        ).to(self.device, self.model.dtype)
        # The first token of every answer has the same logits, whatever the model is made to say.
        steps = self._logits_of(inputs, self._answers[0])
        probabilities = []
        for answer in self._answers:
            if len(answer) > 1 and answer is not self._answers[0]:
                steps = self._logits_of(inputs, answer)
            logs = [
                logits.float().log_softmax(-1)[:, token]
                for logits, token in zip(steps, answer, strict=False)
            ]
            probabilities.append(torch.stack(logs).mean(0).exp())
        return torch.stack(probabilities, 1).numpy(force=True)

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text

    def _logits_of(self, inputs: Any, tokens: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Logits [B, V] at each of these tokens, which the model is made to generate.

        Through ``generate``, because models of all kinds have it.
        """
        from transformers import LogitsProcessorList

        step = 0

        def force(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            nonlocal step
            only = torch.full_like(scores, -torch.inf)
            only[:, tokens[step]] = 0
            step += 1
            return only

        with _quiet():
            generated = self.model.generate(
                **inputs,
                max_new_tokens=len(tokens),
                do_sample=False,
                num_beams=1,
                logits_processor=LogitsProcessorList([force]),
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits: tuple[torch.Tensor, ...] = generated.logits
        return logits


@contextmanager
def _quiet() -> Any:
    """Silence the warnings of transformers about unused generation settings."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@dataclass(frozen=True, eq=False)
class VQAScores:
    """Answers of a judge about a list of images.

    Attributes:
        answers: :data:`ANSWERS_SCHEMA`.
        unreadable: one line per image that could not be read: which, and why.
    """

    answers: pa.Table
    unreadable: list[str]

    def scores(self) -> pa.Table:
        """:data:`SCORES_SCHEMA`; see :func:`summarise`."""
        return summarise(self.answers)

    @property
    def answered(self) -> float:
        """Mean probability that the judge says either Yes or No."""
        return float(np.mean(self.answers["yes"].to_numpy() + self.answers["no"].to_numpy()))

    def to_text(self) -> str:
        """The scores as an aligned table."""
        return str(Table(self._rows()))

    __str__ = to_text
    __repr__ = to_text

    def _repr_html_(self) -> str:
        return Table(self._rows()).to_html()

    def _rows(self) -> list[list[str]]:
        return [
            ["group", "P(Yes)", "95 % interval", "chance", "images", "prompts"],
            *(
                [
                    row["group"],
                    f"{row['score']:.3f}",
                    f"{row['low']:.3f} to {row['high']:.3f}",
                    "-" if row["chance"] is None else f"{row['chance']:.3f}",
                    str(row["num_images"]),
                    str(row["num_prompts"]),
                ]
                for row in self.scores().to_pylist()
            ),
        ]


def score_images(
    judge: Callable[[], VQAScorer],
    files: Iterable[bytes | Any],
    captions: Sequence[str],
    groups: Sequence[str | None],
    out: Path,
    record: JudgeRecord,
    *,
    batch_size: int,
    chance: bool = False,
) -> VQAScores:
    """Score images, reusing stored answers; new ones are written to ``judgements.parquet`` as they
    come.

    Args:
        judge: loads the judge; called only if there is a new question.
        files: the encoded bytes of each image, in order, or an object whose ``reason`` says why
            there are none.
        captions: caption of each image.
        groups: group that each image is summarised under, besides all.
        out: folder of the results.
        record: the judge, and how it is asked.
        batch_size: images scored at once.
        chance: also ask about each image with another caption. Stays on once it was asked for.

    Raises:
        InputError: ``out`` holds the results of another judge or question, or no image could be
            read.
    """
    _check_judge(out, record)
    stored = _read(out)
    chance = chance or any(row["asked"] != row["caption"] for row in stored.values())
    others = _other_captions(captions) if chance else [[] for _ in captions]
    shown = {int(i) for i in np.linspace(0, len(captions) - 1, min(NUM_SHOWN, len(captions)))}
    images: dict[int, NDArray[np.uint8]] = {}
    unreadable: list[str] = []
    with progress_bar(total=len(captions) + sum(map(len, others)), unit="question") as bar:
        answers = _Answers(judge, record, out, stored, batch_size, bar)
        try:
            for sample, file in enumerate(files):
                questions = [captions[sample], *others[sample]]
                image = _open(file, f"{sample} ({captions[sample]!r})", unreadable)
                if image is None:
                    bar.update(len(questions))
                    continue
                if sample in shown:
                    images[sample] = np.asarray(image)
                digest = hashlib.sha256(file).hexdigest()
                for question in questions:
                    row = {
                        "sample": sample,
                        "sha256": digest,
                        "group": groups[sample],
                        "caption": captions[sample],
                        "asked": question,
                    }
                    answers.add(row, image)
            answers.ask()
        except BaseException:
            answers.save()
            raise
    if not answers.rows:
        listed = "\n  ".join(unreadable[:3])
        raise InputError(f"none of the {len(captions)} images can be read:\n  {listed}")
    scores = VQAScores(_table(answers.rows), unreadable)
    _write(out / JUDGEMENTS, scores.answers)
    _write(out / SCORES, scores.scores())
    _write_figure(images, scores.answers, out / FIGURE)
    return scores


class _Answers:
    """Answers of a judge so far: stored ones that were reused, and new ones, asked in batches.

    Args:
        load: loads the judge; called at the first batch.
        record, out, batch_size: as in :func:`score_images`.
        stored: rows of an earlier call, by sha256 of the image and caption asked about.
        bar: counts questions.

    Attributes:
        rows: of :data:`ANSWERS_SCHEMA`.
    """

    def __init__(
        self,
        load: Callable[[], VQAScorer],
        record: JudgeRecord,
        out: Path,
        stored: Mapping[tuple[str, str], dict[str, Any]],
        batch_size: int,
        bar: Any,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._load = load
        self._record = record
        self._out = out
        self._stored = stored
        self._reused: set[tuple[str, str]] = set()
        self._batch_size = batch_size
        self._bar = bar
        self._waiting: list[tuple[dict[str, Any], Image.Image]] = []
        self._judge: VQAScorer | None = None
        self._saved_at = time.monotonic()

    def add(self, row: dict[str, Any], image: Image.Image) -> None:
        """Take the stored answer to a question, or ask it as soon as a batch is full.

        Args:
            row: a row without the answer.
        """
        key = row["sha256"], row["asked"]
        if key in self._stored:
            self._reused.add(key)
            self.rows.append(self._stored[key] | row)
            self._bar.update(1)
            return
        self._waiting.append((row, image))
        if len(self._waiting) == self._batch_size:
            self.ask()

    def ask(self) -> None:
        """Ask all waiting questions, and save from time to time."""
        if self._waiting:
            rows, images = zip(*self._waiting, strict=True)
            questions = [self._record.question.replace("{}", row["asked"]) for row in rows]
            answers = self._open_judge().ask(images, questions)
            for row, (yes, no) in zip(rows, answers.tolist(), strict=True):
                self.rows.append(row | {"yes": yes, "no": no})
            self._bar.update(len(rows))
            self._waiting.clear()
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()
            self._saved_at = time.monotonic()

    def save(self) -> None:
        """Write all answers, with the stored ones that no question has reused yet."""
        unused = [row for key, row in self._stored.items() if key not in self._reused]
        _write(self._out / JUDGEMENTS, _table([*self.rows, *unused]))

    def _open_judge(self) -> VQAScorer:
        if self._judge is None:
            self._judge = self._load()
            write_document(self._out / RECORD, self._record.model_dump_json(indent=1) + "\n")
        return self._judge


def summarise(answers: pa.Table, *, seed: int = 0) -> pa.Table:
    """Mean scores of all images and of each group: :data:`SCORES_SCHEMA`.

    ``score`` is the mean probability of Yes over the ``num_images`` images; ``low`` and ``high``
    are its 95 % percentile bootstrap interval over the ``num_prompts`` captions: all images of a
    caption are resampled together, because they are not independent. ``chance`` is the mean over
    questions about another caption than the image's own; null if none was asked.

    Args:
        answers: :data:`ANSWERS_SCHEMA`.
        seed: seed of the resamples.
    """
    rng = np.random.default_rng(seed)
    rows = answers.to_pylist()
    groups = [name for name in dict.fromkeys(row["group"] for row in rows) if name is not None]
    summary = []
    for group in (ALL, *groups):
        members = [row for row in rows if group == ALL or row["group"] == group]
        by_caption: dict[str, list[float]] = {}
        for row in members:
            if row["asked"] == row["caption"]:
                by_caption.setdefault(row["caption"], []).append(row["yes"])
        others = [row["yes"] for row in members if row["asked"] != row["caption"]]
        totals = np.array([sum(each) for each in by_caption.values()])
        counts = np.array([len(each) for each in by_caption.values()])
        low, high = interval(totals, counts, rng)
        summary.append(
            {
                "group": group,
                "score": float(totals.sum() / counts.sum()),
                "low": low,
                "high": high,
                "chance": float(np.mean(others)) if others else None,
                "num_images": int(counts.sum()),
                "num_prompts": len(by_caption),
            }
        )
    return pa.Table.from_pylist(summary, schema=SCORES_SCHEMA)


def _other_captions(captions: Sequence[str]) -> list[list[str]]:
    """Another caption of the list for each image, its neighbour on a seeded circle; none if all
    captions are the same."""
    unique = list(dict.fromkeys(captions))
    if len(unique) == 1:
        return [[] for _ in captions]
    circle = np.random.default_rng(0).permutation(len(unique))
    neighbour = {
        unique[own]: unique[other] for own, other in zip(circle, np.roll(circle, 1), strict=True)
    }
    return [[neighbour[caption]] for caption in captions]


def _open(file: Any, name: str, unreadable: list[str]) -> Image.Image | None:
    """The image; or None, with a line in ``unreadable``."""
    if not isinstance(file, bytes):
        unreadable.append(f"{name}: {file.reason}")
        return None
    try:
        with open_upright(file) as image:
            return image.read().convert("RGB")
    except Exception as error:  # decoders raise anything on damaged bytes
        unreadable.append(f"{name}: {type(error).__name__}: {error}")
        return None


def _check_judge(out: Path, record: JudgeRecord) -> None:
    """Refuse the results of another judge or question."""
    file = out / RECORD
    if not file.exists():
        return
    before = parse(JudgeRecord, read_json(file, follow=True), str(file))
    free = {"judge"}  # the judge may move, its files may not change
    refuse_differences(
        differences(record.model_dump(exclude=free), before.model_dump(exclude=free)),
        f"{out} holds answers of another judge or question; requested, against the existing ones",
        "Name another folder with --out.",
    )


def _read(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Stored rows, by sha256 of the image and caption asked about."""
    file = out / JUDGEMENTS
    if not file.exists():
        return {}
    try:
        table = read_table(file, ANSWERS_SCHEMA)
    except READ_ERRORS as error:
        raise InputError(
            f"{file} does not hold answers of a judge: {error}. Move it away"
        ) from error
    return {(row["sha256"], row["asked"]): row for row in table.to_pylist()}


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist([*rows], schema=ANSWERS_SCHEMA)
    return ascending(table, ["sample"])


def _write(file: Path, table: pa.Table) -> None:
    content = io.BytesIO()
    pq.write_table(table, content)
    write_whole(file, content.getvalue())


def _write_figure(images: Mapping[int, NDArray[np.uint8]], answers: pa.Table, file: Path) -> None:
    """Some images, each over its score and caption, from the best to the worst."""
    rows = [
        row
        for row in answers.to_pylist()
        if row["sample"] in images and row["asked"] == row["caption"]
    ]
    rows.sort(key=lambda row: -row["yes"])
    shown = [images[row["sample"]] for row in rows]
    if len({image.shape for image in shown}) > 1:  # a grid has images of one size
        side = max(max(image.shape[:2]) for image in shown)
        shown = [np.asarray(Image.fromarray(image).resize((side, side))) for image in shown]
    texts = [f"{row['yes']:.2f}  {row['caption']}" for row in rows]
    content = io.BytesIO()
    sample_grid(np.stack(shown), texts).savefig(content, dpi=DPI)
    write_whole(file, content.getvalue())
