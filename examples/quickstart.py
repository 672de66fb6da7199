"""The whole road in a few minutes on two CPU cores: convert, import, train, score, export, chat.

The checkpoint is small and random and the preference data are generated, but both are real files in the published
forms, and every step is the public command that the real ones go through. What it shows is that the road holds and
that training learns which responses are preferred; the small model's own words mean nothing.

    python -m examples.quickstart [FOLDER]      (runs/quickstart if left out; what an earlier run left there goes)
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from examples.tiny_qwen_vl import make_checkpoint
from examples.tiny_vlfeedback import make_rows

CONFIG = Path(__file__).with_name("quickstart.yaml")
SILKIE = Path(sys.executable).with_name("silkie")
MARKER = ".made-by-quickstart"
ROWS = 64


def silkie(*arguments: str | Path) -> None:
    """Show a `silkie` command and run it; end here if it fails."""
    words = [str(a) for a in arguments]
    print(f"\n$ silkie {shlex.join(words)}", flush=True)
    status = subprocess.run([SILKIE, *words]).returncode
    if status:
        sys.exit(f"quickstart: `silkie {words[0]}` ended with status {status}")


def start_clean(folder: Path) -> None:
    """Make `folder`, anew where an earlier quickstart made it; anything else that lies there stays and is an error."""
    if (folder / MARKER).exists():
        print(f"quickstart: starting anew in {folder}")
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        sys.exit(f"quickstart: {folder} is not empty and was not made by the quickstart; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def main() -> None:
    """Run the road in the folder named on the command line."""
    began = time.monotonic()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    start_clean(folder)

    official, published = folder / "qwen-vl-tiny", folder / "vlfeedback"
    print(f"Making a small random Qwen-VL checkpoint in {official} and {ROWS} rated instructions in {published}")
    make_checkpoint(official)
    jsonl = make_rows(published, ROWS)

    weights, corpus, run = folder / "weights", folder / "corpus", folder / "run"
    silkie("convert", official, weights)
    silkie("corpus", "import", "--jsonl", jsonl, "--images", published, corpus)
    silkie("train", CONFIG, f"model={weights}", f"corpus={corpus}", f"run_dir={run}")
    silkie("score", weights, corpus, "--out", folder / "scores.jsonl", "--adapter", run / "adapter")
    exported = folder / "exported"
    silkie("export", run, exported)
    picture = min((published / "merged_images").iterdir())
    prompt = "What is in this picture?"
    silkie("chat", exported, "--image", picture, "--prompt", prompt, "--greedy", "--max-new-tokens", "16", "--json")

    summarise(folder, run, exported, time.monotonic() - began)


def summarise(folder: Path, run: Path, exported: Path, seconds: float) -> None:
    """Print what the run's own files say: the first and the last logged step, and the last evaluation."""
    with (run / "metrics.jsonl").open() as lines:
        logged = [json.loads(line) for line in lines]

    def values(name: str) -> list[float]:
        return [row[name] for row in logged if name in row]

    def first_and_last(name: str) -> str:
        return f"{values(name)[0]:.2f} -> {values(name)[-1]:.2f}"

    print(f"""
Done in {seconds:.0f} s. The reply above means nothing, for the model is random; but training taught what is preferred:
  pairs ranked rightly   {first_and_last("rewards/accuracies")}, held out {values("eval_rewards/accuracies")[-1]:.2f}
  margin of rewards      {first_and_last("rewards/margins")}
  loss                   {first_and_last("loss")}
In {folder}:
  corpus/              TFDS ArrayRecord corpus     scores.jsonl     log-probability of every response
  run/                 metrics, checkpoints        run/adapter/     the trained adapter, in PEFT's form
  {exported.name}/            the trained model in the official form, adapter merged
Next: README.md tells how to do the same with Qwen-VL-Chat and VLFeedback.""")


if __name__ == "__main__":
    main()
