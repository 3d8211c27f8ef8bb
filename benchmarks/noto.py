"""Emoji and their names: a small set of real image-caption pairs, and a check of the results.

usage: python benchmarks/noto.py draw OUT [--font FILE] [--size N]
       python benchmarks/noto.py score OUT PICTURES
       python benchmarks/noto.py compare OUT STUDY

Images come from the font Noto Color Emoji (Debian: fonts-noto-color-emoji), names from the package
emoji (``pip install emoji``). ``draw`` writes OUT/images and tables of names and images:
train.parquet; seen.parquet, some of those; and held-out.parquet, names that combine what training
shows separately: a colour of a heart, circle or square, or a skin tone of a person. ``score`` finds
the emoji nearest to each image that ``semroute sample --prompts`` generated, and shows some images
beside the true ones. ``compare`` prints a table of the arms of a study whose runs, STUDY/runs/ARM/
seed-N, have folders of such images, pictures/held-out and pictures/seen.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import emoji
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml
from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from semroute.trainer.evaluation.shapes import interval
from semroute.trainer.plots.images import sample_grid
from semroute.trainer.studies.statistics import over_seeds

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STRIKE = 109
"""The one size of the font's bitmaps, 136 x 128 pixels."""
TONES = ["light", "medium-light", "medium", "medium-dark", "dark"]
COLOURS = {
    "green heart",
    "purple heart",
    "blue circle",
    "yellow circle",
    "red square",
    "orange square",
}
"""Held out; training shows the shape in other colours, and the colour in the two other shapes."""
COLOUR_WORDS = [
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "grey",
    "black",
    "white",
]
EVERY = 4
"""One in this many persons and hands is held out, in one of its five tones."""
NUM_SEEN = 84
"""Number of training names to generate images for."""
NUM_SHOWN = 36
"""Images in the figure of ``score``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    drawing = commands.add_parser("draw")
    drawing.add_argument("out", type=Path)
    drawing.add_argument("--font", default=FONT)
    drawing.add_argument("--size", type=int, default=32, help="pixels per side")
    drawing.set_defaults(run=lambda given: draw(given.out, given.font, given.size))
    scoring = commands.add_parser("score")
    scoring.add_argument("out", type=Path, help="folder of the emoji")
    scoring.add_argument("pictures", type=Path, help="output folder of semroute sample")
    scoring.set_defaults(run=lambda given: score(given.out, given.pictures))
    comparing = commands.add_parser("compare")
    comparing.add_argument("out", type=Path, help="folder of the emoji")
    comparing.add_argument("study", type=Path)
    comparing.set_defaults(run=lambda given: compare(given.out, given.study))
    given = parser.parse_args()
    given.run(given)


def draw(out: Path, font_file: str, size: int) -> None:
    """Write images and tables."""
    if not features.check("raqm"):
        raise SystemExit("Pillow has no raqm here, which joins the parts of an emoji into one")
    font = ImageFont.truetype(font_file, STRIKE)
    names = {
        characters: data["en"].strip(":").replace("_", " ")
        for characters, data in emoji.EMOJI_DATA.items()
        if data["status"] == emoji.STATUS["fully_qualified"] and not is_flag(characters)
    }
    held_out = COLOURS | held_out_tones([*names.values()])
    width = font.getlength("\U0001f600")
    unknown = render(font, "\U0010ffff", size).tobytes()
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "held-out": []}
    absent = 0
    for characters, name in tqdm(sorted(names.items()), unit="image"):
        image = render(font, characters, size)
        if font.getlength(characters) != width or image.tobytes() == unknown:
            absent += 1  # newer than the font
            continue
        file = "images/" + "-".join(f"{ord(character):x}" for character in characters) + ".png"
        image.save(out / file)
        kind = "colour" if name in COLOURS else "tone" if "skin tone" in name else "other"
        row = {"text": name, "image": file, "emoji": characters, "category": kind}
        rows["held-out" if name in held_out else "train"].append(row)
    chosen = np.random.default_rng(1).permutation(len(rows["train"]))[:NUM_SEEN]
    rows["seen"] = [rows["train"][number] for number in chosen]
    for name, found in rows.items():
        pyarrow.parquet.write_table(pa.Table.from_pylist(found), out / f"{name}.parquet")
    print(
        f"{out}: {len(rows['train']):,} emoji to train on, {len(rows['held-out'])} held out; "
        f"{absent} are not in the font"
    )


def is_flag(characters: str) -> bool:
    """Whether this is the flag of a country or region, whose name does not describe it."""
    return any(0x1F1E6 <= ord(character) <= 0x1F1FF for character in characters) or (
        "\U000e007f" in characters
    )


def held_out_tones(names: list[str]) -> set[str]:
    """Names in one skin tone each, for some emoji that exist in all five."""
    tones = [f" {tone} skin tone" for tone in TONES]
    bases = sorted({n.removesuffix(tones[0]) for n in names if n.endswith(tones[0])})
    whole = [base for base in bases if {base + tone for tone in tones} <= {*names}]
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(whole))[: len(whole) // EVERY]
    return {whole[i] + tones[int(rng.integers(len(tones)))] for i in chosen}


def render(font: ImageFont.FreeTypeFont, characters: str, size: int) -> Image.Image:
    """The emoji on white, in the middle of a square."""
    left, top, right, bottom = font.getbbox(characters)
    side = max(right - left, bottom - top)
    canvas = Image.new("RGB", (side, side), "white")
    place = ((side - right - left) // 2, (side - bottom - top) // 2)
    ImageDraw.Draw(canvas).text(place, characters, font=font, embedded_color=True)
    return canvas.resize((size, size), Image.Resampling.BOX)


@dataclass
class Found:
    """Images that a run generated, and what they are nearest to.

    Attributes:
        listed: lines of captions.jsonl.
        drawn: uint8 ``[images, size, size, 3]``.
        names, true: of all emoji; ``true`` is uint8 ``[emoji, size, size, 3]``.
        asked, nearest: numbers of emoji, ``[images]``.
    """

    listed: list[dict[str, str]]
    drawn: np.ndarray
    names: list[str]
    true: np.ndarray
    asked: np.ndarray
    nearest: np.ndarray


def find(out: Path, pictures: Path) -> Found:
    """Nearest by root mean square over pixels."""
    tables = [pyarrow.parquet.read_table(out / f"{n}.parquet") for n in ("train", "held-out")]
    table = pa.concat_tables(tables)
    names = table["text"].to_pylist()
    true = np.stack([read(out / file) for file in table["image"].to_pylist()])
    lines = (pictures / "captions.jsonl").read_text("utf-8").splitlines()
    listed = [json.loads(line) for line in lines]
    drawn = np.stack([read(pictures / line["image"]) for line in listed])
    asked = np.array([names.index(line["caption"]) for line in listed])

    flat = true.reshape(len(true), -1).astype(np.float32) / 255
    guess = drawn.reshape(len(drawn), -1).astype(np.float32) / 255
    distance = (guess**2).sum(1)[:, None] + (flat**2).sum(1) - 2 * guess @ flat.T
    return Found(listed, drawn, names, true, asked, distance.argmin(1))


def compare(out: Path, study: Path) -> None:
    """Print the share of images that are nearest to their own emoji by arm, as means over seeds,
    and the paired difference to what it is compared with, with its 95 % interval (Student's t over
    seeds)."""
    config = yaml.safe_load(study.with_suffix(".yaml").read_text("utf-8"))
    kinds = ("held-out", "seen")
    shares = {}
    for arm in tqdm(config["arms"], unit="arm"):
        runs = [study / "runs" / arm / f"seed-{seed}" for seed in config["seeds"]]
        for kind in kinds:
            found = [find(out, run / "pictures" / kind) for run in runs]
            shares[arm, kind] = np.array([(f.nearest == f.asked).mean() for f in found])
    print("| arm | against | " + " | ".join(f"{kind} | difference" for kind in kinds) + " |")
    print("|---|---|" + "--:|---|" * len(kinds))
    for arm, given in config["arms"].items():
        other = given.get("against", config["reference"])
        cells = [f"`{arm}`", "" if arm == other else f"`{other}`"]
        for kind in kinds:
            own, reference = shares[arm, kind], shares[other, kind]
            cells += [f"{own.mean():.3f}", "" if arm == other else paired(own - reference)]
        print("| " + " | ".join(cells) + " |")


def paired(differences: np.ndarray) -> str:
    """Mean and interval over seeds."""
    low, high = over_seeds(differences)
    return f"{differences.mean():+.3f} ({low:.3f} to {high:.3f})"


def score(out: Path, pictures: Path) -> None:
    """Print how many images are nearest to the emoji of their name, and write compared.png.

    Intervals are over names.
    """
    found = find(out, pictures)
    listed, drawn, names, true = found.listed, found.drawn, found.names, found.true
    asked, nearest = found.asked, found.nearest
    things = np.array([thing(name) for name in names])
    categories = np.array([line["group"] for line in listed])
    print(f"nearest of {len(names):,} emoji, guidance and steps as in {pictures}/pictures.json")
    for category in ("all", *dict.fromkeys(categories)):
        chosen = (categories == category) | (category == "all")
        own, number = nearest[chosen] == asked[chosen], asked[chosen]
        unique = np.unique(number)
        totals = np.array([own[number == n].sum() for n in unique])
        counts = np.array([(number == n).sum() for n in unique])
        low, high = interval(totals, counts, np.random.default_rng(0))
        alike = (things[nearest] == things[asked])[chosen].mean()
        print(
            f"  {category:7}{chosen.sum():4} pictures of {len(unique):3} names: its own "
            f"{own.mean():.2f} ({low:.2f} to {high:.2f}); its own in some colour or tone "
            f"{alike:.2f}"
        )
    firsts = np.unique(asked, return_index=True)[1]
    order = sorted(firsts, key=lambda i: (categories[i] == "tone", i))
    rare = [i for i in order if categories[i] == "colour"]
    rest = [i for i in order if categories[i] != "colour"]
    spread = np.linspace(0, len(rest) - 1, min(len(rest), NUM_SHOWN - len(rare))).astype(int)
    shown = [*rare, *(rest[i] for i in spread)]
    pairs = np.stack([drawn[shown], true[asked[shown]]], 1).reshape(-1, *drawn.shape[1:])
    texts = [text for i in shown for text in (listed[i]["caption"], "(true)")]
    sample_grid(pairs, texts, columns=12).savefig(pictures / "compared.png", dpi=72)
    print(pictures / "compared.png")


def read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def thing(name: str) -> str:
    """A name without its skin tone, or the colour of a heart, circle or square."""
    if "skin tone" in name:
        return name[: name.index(" skin tone")].rpartition(" ")[0]
    colour, _, shape = name.rpartition(" ")
    is_coloured = colour.split(" ")[-1] in COLOUR_WORDS and shape in ("heart", "circle", "square")
    return f"coloured {shape}" if is_coloured else name


if __name__ == "__main__":
    main()
