"""Pictures judged by a vision-language model: the probability that it says they show their caption.

VQAScore (Lin et al. 2024, arXiv 2404.01291): the judge is asked ``Does this figure show "..."?``,
and the score is the probability of the answer Yes. Question and answer are those of its own code,
github.com/linzhiqiu/t2v_metrics, for judges that are chat models.

Shapes: B pictures judged at once, V vocabulary.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

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
from ...schemas.display import Table
from ..plots.images import sample_grid
from .shapes import interval

QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
"""What t2v_metrics asks chat models; of CLIP-FlanT5, the paper's own judge, it ends in ``Please
answer yes or no.``"""
ANSWERS = ("Yes", "No")
RECORD = "judge.json"
JUDGEMENTS = "judgements.parquet"
SCORES = "scores.parquet"
FIGURE = "judged.png"
JUDGEMENTS_SCHEMA = pa.schema(
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
"""A row a picture and caption: which picture of the list, its bytes, what it is to show, what was
``asked`` of it, and the probabilities of both answers."""
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
"""A row a group of captions; see :func:`summarise`."""
ALL = "all"
SAVE_SECONDS = 10.0
"""Between writings of what was judged."""
NUM_SHOWN = 24
"""Pictures in the figure."""
ANSWERS_EXPECTED = 0.5
"""Where Yes and No together are less probable than this on average, the judge answers otherwise."""


Dtype = Literal["float32", "bfloat16"]


def default_dtype() -> Dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


class VQAScorer:
    """A vision-language model of transformers that is asked about pictures.

    Args:
        folder: what transformers loads.
        name: for messages.
        dtype: in which it runs.
        device: default: the first GPU, or the CPU.
        trust_remote_code: run the code that comes with the model.

    Raises:
        InputError: no model there that transformers loads as one of images and text, or one that is
            not made for chats.
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
            self.model = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(
                f"--judge {name}: transformers cannot load it as a model of images and text: "
                f"{error}\\nA model with code of its own needs --trust-remote-code; most "
                "processors of images need torchvision: pip install 'semroute[judge]'"
            ) from error
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

        Of an answer of several tokens it is their geometric mean, as t2v_metrics takes it. They are
        the model's own, without the penalties and temperature that its settings for generating may
        name.
        """
        texts = [self._prompt(question) for question in questions]
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        inputs = self.processor(
            text=texts,
            images=[[image] for image in images],
            padding=True,
            return_tensors="pt",
            # A chat template that begins with BOS has it already.
            add_special_tokens=not (bos is not None and texts[0].startswith(bos)),
        ).to(self.device, self.model.dtype)
        steps = self._say(inputs, self._answers[0])
        found = []
        for answer in self._answers:
            if len(answer) > 1 and answer is not self._answers[0]:
                steps = self._say(inputs, answer)
            logs = [s.float().log_softmax(-1)[:, t] for s, t in zip(steps, answer, strict=False)]
            found.append(torch.stack(logs).mean(0).exp())
        return torch.stack(found, 1).numpy(force=True)

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text

    def _say(self, inputs: Any, tokens: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Logits [B, V] of each token where the model is made to say these, whatever its kind."""
        from transformers import LogitsProcessorList

        step = 0

        def force(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            nonlocal step
            only = torch.full_like(scores, -torch.inf)
            only[:, tokens[step]] = 0
            step += 1
            return only

        with _quiet():
            said = self.model.generate(
                **inputs,
                max_new_tokens=len(tokens),
                do_sample=False,
                num_beams=1,
                logits_processor=LogitsProcessorList([force]),
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits: tuple[torch.Tensor, ...] = said.logits
        return logits


@contextmanager
def _quiet() -> Any:
    """Without what transformers says of settings for sampling that are not used."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@dataclass(frozen=True, eq=False)
class VQAScores:
    """What a judge says of a list of pictures.

    Attributes:
        judgements: :data:`JUDGEMENTS_SCHEMA`.
        unreadable: of the pictures that could not be read, which and why.
    """

    judgements: pa.Table
    unreadable: list[str]

    def scores(self) -> pa.Table:
        """:data:`SCORES_SCHEMA`; see :func:`summarise`."""
        return summarise(self.judgements)

    @property
    def answered(self) -> float:
        """Mean probability that the judge says either Yes or No."""
        table = self.judgements
        return float(np.mean(table["yes"].to_numpy() + table["no"].to_numpy()))

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
    """Judge what is not judged yet, and write ``judgements.parquet`` as it goes.

    Args:
        judge: loads it; called where something is left to do.
        files: the encoded bytes of each picture, in order, or something with the ``reason`` why
            there are none.
        captions: what each is to show.
        groups: what each is summarised under, besides all.
        out: folder of the results.
        record: who judges and how.
        batch_size: pictures judged at once.
        chance: ask of each picture another caption too.

    Raises:
        InputError: ``out`` holds the results of another judge or question, or no picture could be
            read.
    """
    _check_judge(out, record)
    known, used = _read(out), set()
    # Whoever asked for chance once keeps it.
    chance = chance or any(row["asked"] != row["caption"] for row in known.values())
    asked = [[caption] for caption in captions]
    if chance:
        for own, other in zip(asked, _others(captions), strict=True):
            own += other
    shown = {int(i) for i in np.linspace(0, len(captions) - 1, min(NUM_SHOWN, len(captions)))}
    pictures: dict[int, NDArray[np.uint8]] = {}
    rows: list[dict[str, Any]] = []
    unreadable: list[str] = []
    waiting: list[tuple[dict[str, Any], Image.Image]] = []
    loaded: VQAScorer | None = None
    saved = time.monotonic()

    def save() -> None:
        left = [row for key, row in known.items() if key not in used]
        _write(out / JUDGEMENTS, _table([*rows, *left]))

    def judge_waiting() -> None:
        nonlocal loaded, saved
        if waiting:
            if loaded is None:
                loaded = judge()
                write_document(out / RECORD, record.model_dump_json(indent=1) + "\n")
            questions = [record.question.replace("{}", row["asked"]) for row, _ in waiting]
            answers = loaded.ask([image for _, image in waiting], questions)
            for (row, _), (yes, no) in zip(waiting, answers.tolist(), strict=True):
                rows.append(row | {"yes": yes, "no": no})
            bar.update(len(waiting))
            waiting.clear()
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()

    with tqdm(total=sum(map(len, asked)), unit="question") as bar:
        try:
            for sample, file in enumerate(files):
                image = _open(file, f"{sample} ({captions[sample]!r})", unreadable)
                if image is None:
                    bar.update(len(asked[sample]))
                    continue
                if sample in shown:
                    pictures[sample] = np.asarray(image)
                digest = hashlib.sha256(file).hexdigest()
                for question in asked[sample]:
                    row = {
                        "sample": sample,
                        "sha256": digest,
                        "group": groups[sample],
                        "caption": captions[sample],
                        "asked": question,
                    }
                    key = (digest, question)
                    if key in known:
                        used.add(key)
                        rows.append(known[key] | row)
                        bar.update(1)
                        continue
                    waiting.append((row, image))
                    if len(waiting) == batch_size:
                        judge_waiting()
            judge_waiting()
        except BaseException:
            save()
            raise
    if not rows:
        listed = "\n  ".join(unreadable[:3])
        raise InputError(f"none of the {len(captions)} pictures can be read:\n  {listed}")
    verdict = VQAScores(_table(rows), unreadable)
    _write(out / JUDGEMENTS, verdict.judgements)
    _write(out / SCORES, verdict.scores())
    _draw(pictures, verdict.judgements, out / FIGURE)
    return verdict


def summarise(judgements: pa.Table, *, seed: int = 0) -> pa.Table:
    """Mean scores by group, and of all: :data:`SCORES_SCHEMA`.

    ``score`` is the mean probability of Yes over the ``num_images`` pictures; ``low`` and ``high``
    are its 95 % percentile bootstrap over the ``num_prompts`` captions: all pictures of a caption
    are drawn together, for they are not independent. ``chance`` is the mean where another caption
    was asked than the picture's own; null where none was.

    Args:
        judgements: :data:`JUDGEMENTS_SCHEMA`.
        seed: of the resamples.
    """
    rng = np.random.default_rng(seed)
    rows = judgements.to_pylist()
    named = [name for name in dict.fromkeys(row["group"] for row in rows) if name is not None]
    found = []
    for group in (ALL, *named):
        members = [row for row in rows if group == ALL or row["group"] == group]
        own: dict[str, list[float]] = {}
        for row in members:
            if row["asked"] == row["caption"]:
                own.setdefault(row["caption"], []).append(row["yes"])
        other = [row["yes"] for row in members if row["asked"] != row["caption"]]
        totals, counts = (
            np.array([sum(v) for v in own.values()]),
            np.array([*map(len, own.values())]),
        )
        low, high = interval(totals, counts, rng)
        found.append(
            {
                "group": group,
                "score": float(totals.sum() / counts.sum()),
                "low": low,
                "high": high,
                "chance": float(np.mean(other)) if other else None,
                "num_images": int(counts.sum()),
                "num_prompts": len(own),
            }
        )
    return pa.Table.from_pylist(found, schema=SCORES_SCHEMA)


def _others(captions: Sequence[str]) -> list[list[str]]:
    """For each picture another caption of the list: its neighbour on a seeded circle; none where
    all are the same."""
    unique = list(dict.fromkeys(captions))
    if len(unique) == 1:
        return [[] for _ in captions]
    circle = np.random.default_rng(0).permutation(len(unique))
    after = {
        unique[own]: unique[other] for own, other in zip(circle, np.roll(circle, 1), strict=True)
    }
    return [[after[caption]] for caption in captions]


def _open(file: Any, what: str, unreadable: list[str]) -> Image.Image | None:
    """The picture, or None and a line why not."""
    if not isinstance(file, bytes):
        unreadable.append(f"{what}: {file.reason}")
        return None
    try:
        with Image.open(io.BytesIO(file)) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        unreadable.append(f"{what}: {type(error).__name__}: {error}")
        return None


def _check_judge(out: Path, record: JudgeRecord) -> None:
    """Refuse the results of another judge or question."""
    file = out / RECORD
    if not file.exists():
        return
    try:
        before = parse(JudgeRecord, json.loads(file.read_text("utf-8")), str(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is damaged: {error}") from error
    same = {"judge"}  # where it is may change; its files may not
    refuse_differences(
        differences(record.model_dump(exclude=same), before.model_dump(exclude=same)),
        f"{out} holds what another judge said; asked for now, against that one",
        "Name another folder with --out.",
    )


def _read(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What was judged before, by picture and question."""
    file = out / JUDGEMENTS
    if not file.exists():
        return {}
    rows = pyarrow.parquet.read_table(file).to_pylist()
    return {(row["sha256"], row["asked"]): row for row in rows}


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist([*rows], schema=JUDGEMENTS_SCHEMA)
    return table.sort_by([("sample", "ascending")])


def _write(file: Path, table: pa.Table) -> None:
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    write_whole(file, content.getvalue())


def _draw(pictures: dict[int, NDArray[np.uint8]], judgements: pa.Table, file: Path) -> None:
    """Some pictures, each over its caption and score, from the best to the worst."""
    rows = [
        row
        for row in judgements.to_pylist()
        if row["sample"] in pictures and row["asked"] == row["caption"]
    ]
    rows.sort(key=lambda row: -row["yes"])
    sizes = {pictures[row["sample"]].shape for row in rows}
    images = [pictures[row["sample"]] for row in rows]
    if len(sizes) > 1:  # a grid has pictures of one size
        side = max(max(size[:2]) for size in sizes)
        images = [np.asarray(Image.fromarray(image).resize((side, side))) for image in images]
    texts = [f"{row['yes']:.2f}  {row['caption']}" for row in rows]
    figure = sample_grid(np.stack(images), texts)
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI)
    write_whole(file, content.getvalue())
