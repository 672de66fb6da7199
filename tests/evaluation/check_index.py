"""Holds `silkie evaluate score` against an index of cases with the numbers that official tools gave.

    python -m tests.evaluation.check_index INDEX.json

INDEX.json is a list of {benchmark, data, answers, expected}, with paths relative to its folder, as in
`../shared/golden/evaluation/index.json`. Every case runs through the command line; each difference is a line, and the
exit status is 1 if there is any. Numbers are compared to 1e-9, so that a rounded one must agree to its last digit.
"""

import contextlib
import io
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silkie_jax.cli import main as silkie

TOLERANCE = 1e-9
TRACEBACK = 70  # for the exit status of a command that ends in one


@dataclass(frozen=True)
class Call:
    """One `silkie evaluate score`, and what its `official` must hold."""

    label: str
    arguments: list[str]
    expected: Any


@dataclass
class Files:
    """The files of a case, by what they are."""

    base: Path
    data: list[Path]
    answers: list[Path]
    kinds: dict[str, list[Path]] = field(default_factory=dict)

    def of(self, kind: str) -> list[Path]:
        return self.kinds.get(kind, [])


def check(index: Path) -> list[str]:
    """All differences."""
    found: list[str] = []
    for case in json.loads(index.read_text(encoding="utf-8")):
        name = case["benchmark"]
        if name == "errors":
            found += check_errors(index.parent, case["expected"])
            continue
        calls = [call for part in parts_of(case) for call in calls_of(index.parent, part)]
        if not calls:
            found.append(f"{name}: no command is known for {case['answers']}")
        asked: set[str] = set()
        for call in calls:
            status, said, complaint = score(call.arguments)
            if status:
                found.append(f"{call.label}: exit {status}: {complaint.strip()}")
                continue
            found += differences(call.label, call.expected, json.loads(said)["official"])
            asked |= set(call.expected) if isinstance(call.expected, dict) else set()
        if isinstance(case["expected"], dict) and name in ("seedbench", "valor"):
            found += [f"{name}: nothing gave {key}" for key in case["expected"] if key not in asked]
    return found


def score(arguments: list[str]) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `silkie evaluate score ARGUMENTS --json`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = silkie(["evaluate", "score", *arguments, "--json"])
        except SystemExit as e:
            status = int(e.code or 0)
        except Exception as e:
            status, complaint = TRACEBACK, f"{type(e).__name__}: {e}"
            print(" ".join(complaint.split()), file=err)
    return status, out.getvalue(), err.getvalue()


def differences(where: str, expected: Any, found: Any) -> Iterator[str]:
    """Every number or text of `expected` that `found` does not hold at the same place."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            if not isinstance(found, dict) or name not in found:
                yield f"{where}: {name} is missing"
            else:
                yield from differences(f"{where}: {name}", value, found[name])
    elif isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            yield f"{where}: {found!r} instead of {expected!r}"
        else:
            for k, (a, b) in enumerate(zip(expected, found, strict=True)):
                yield from differences(f"{where}[{k}]", a, b)
    elif isinstance(expected, int | float) and not isinstance(expected, bool):
        same = isinstance(found, int | float) and math.isclose(expected, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        if not same:
            yield f"{where}: {found!r} instead of {expected!r}"
    elif expected != found:
        yield f"{where}: {found!r} instead of {expected!r}"


# From the files of a case to commands


def parts_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    """A case whose numbers are by file, as a case for each."""
    expected = case["expected"]
    if case["benchmark"] in ("valor", "yesno_mcq") or not isinstance(expected, dict):
        return [case]
    files = {key: [path for path in case["answers"] if key in names_of(path)] for key in expected}
    if not all(files.values()):
        return [case]
    mine = [path for paths in files.values() for path in paths]
    shared = [path for path in case["answers"] if path not in mine]
    parts = []
    for key, answers in files.items():
        data = [path for path in case["data"] if key in names_of(path)] or case["data"]
        parts.append(case | {"data": data, "answers": [*answers, *shared], "expected": expected[key]})
    return parts


def names_of(path: str) -> set[str]:
    """What a key of `expected` may call a file by."""
    name = Path(path).name
    return {name, Path(path).stem, name.split(".")[0]}


def calls_of(base: Path, case: dict[str, Any]) -> Iterator[Call]:
    """The commands of a case."""
    return CALLS.get(case["benchmark"], plain_calls)(case["benchmark"], sort_files(base, case), case["expected"])


def sort_files(base: Path, case: dict[str, Any]) -> Files:
    """Files by what their names and contents say that they are."""
    files = Files(base, [base / path for path in case["data"]], [base / path for path in case["answers"]])
    for path in files.answers:
        files.kinds.setdefault(kind_of(path), []).append(path)
    return files


def kind_of(path: Path) -> str:
    """What a file of answers is: replies of a judge, a form that holds them, or answers."""
    if "judge_replies" in path.name:
        return "replies"
    for name in ("nouns", "similarity", "crash"):
        if name in path.name:
            return name
    return "answers"


def data_of(files: Files) -> list[str]:
    """`--data` with the folder that holds all data files."""
    folders = {path.parent for path in files.data}
    if len(files.data) == 1:
        return ["--data", str(files.data[0])]
    return ["--data", str(folders.pop())] if len(folders) == 1 else []


def replies_of(files: Files) -> list[str]:
    return ["--replies", str(files.of("replies")[0])] if files.of("replies") else []


def plain_calls(name: str, files: Files, expected: Any) -> Iterator[Call]:
    for path in files.of("answers"):
        yield Call(f"{name}: {path.name}", [name, str(path), *replies_of(files)], expected)


def folder_calls(name: str, files: Files, expected: Any) -> Iterator[Call]:
    """Data is a folder; one file of answers holds its judge's replies."""
    for path in files.of("answers"):
        replies = [] if path.name.startswith(("reviews", "evaluation")) else replies_of(files)
        yield Call(f"{name}: {path.name}", [name, str(path), *data_of(files), *replies], expected)


def mme_calls(name: str, files: Files, expected: Any) -> Iterator[Call]:
    for path in files.answers:
        yield Call(f"{name}: {path.name}", [name, str(path)], expected)


def mmvet_calls(name: str, files: Files, expected: Any) -> Iterator[Call]:
    data = next(path for path in files.data if isinstance(json.loads(path.read_text(encoding="utf-8")), dict))
    subsets = [path for path in files.data if path != data]
    settings = ["--set", f"subset={subsets[0]}"] if subsets else []
    (answers,) = files.of("answers")
    yield Call(name, [name, str(answers), "--data", str(data), *replies_of(files), *settings], expected)


def pope_calls(name: str, files: Files, expected: Any) -> Iterator[Call]:
    """Labels in one file, or in a folder of one for each split."""
    for path in files.of("answers"):
        yield Call(f"{name}: {path.name}", [name, str(path), *data_of(files)], expected)


def amber_calls(name: str, files: Files, expected: Any) -> Iterator[Call]:
    tables = [path for path in (*files.data, *files.answers) if path.name.startswith(("nouns", "similarity"))]
    settings = [text for path in tables for text in ("--set", f"{path.stem}={path}")]
    for path in files.of("answers"):
        yield Call(f"{name}: {path.name}", [name, str(path), *data_of(files), *settings], expected)


def seedbench_calls(name: str, files: Files, expected: Any) -> Iterator[Call]:
    forms = {"llava_script": "question", "leaderboard_form": "prediction", "likelihood_mean_image": "token_losses"}
    for path in files.of("answers"):
        first = path.read_text(encoding="utf-8").split("\n")[0]
        form = "likelihood_mean_image" if "token_losses" in first else "leaderboard_form"
        form = "llava_script" if '"text"' in first else form
        assert form in forms
        if form in expected:
            arguments = [name, str(path), "--data", str(files.data[0])]
            yield Call(f"{name}: {path.name}", arguments, {form: expected[form]})


def mathvista_calls(name: str, files: Files, expected: Any) -> Iterator[Call]:
    for path in files.of("answers"):
        stored = path.name.startswith("stored")
        numbers = {key: value for key, value in expected.items() if key.startswith("stored") == stored}
        if numbers:
            arguments = [name, str(path), "--data", str(files.data[0]), *([] if stored else replies_of(files))]
            yield Call(f"{name}: {path.name}", arguments, numbers)


def valor_calls(name: str, files: Files, expected: Any) -> Iterator[Call]:
    for path in files.of("answers"):
        part = path.name.split(".")[0]
        numbers = {key: value for key, value in expected.items() if key.startswith(part)}
        if numbers and "extracted" not in path.name:
            yield Call(f"{name}: {path.name}", [name, str(path)], numbers)


def yesno_mcq_calls(name: str, files: Files, expected: Any) -> Iterator[Call]:
    for path in files.answers:
        yield Call(f"{name}: {path.name}", [path.stem.split(".")[0], str(path)], expected[path.name])


CALLS: dict[str, Callable[[str, Files, Any], Iterator[Call]]] = {
    "mme": mme_calls,
    "mmhal": folder_calls,
    "mmvet": mmvet_calls,
    "pope": pope_calls,
    "amber": amber_calls,
    "seedbench": seedbench_calls,
    "mathvista": mathvista_calls,
    "valor": valor_calls,
    "chair": folder_calls,
    "llava_bench": folder_calls,
    "yesno_mcq": yesno_mcq_calls,
}


# Malformed input


def check_errors(base: Path, cases: list[dict[str, str]]) -> Iterator[str]:
    """Each malformed file is refused in one line that names what `ours` names, or scored as `ours` says."""
    for case in cases:
        label = f"errors: {case['benchmark']}: {case['case']}"
        with tempfile.TemporaryDirectory() as scratch:
            arguments = arguments_of(base, case, Path(scratch))
            status, said, complaint = score(arguments)
        if status == TRACEBACK:
            yield f"{label}: a traceback: {complaint.strip()}"
            continue
        yield from check_answer(label, case["ours"], status, said, complaint)


def check_answer(label: str, ours: str, status: int, said: str, complaint: str) -> Iterator[str]:
    """Whether a command did what `ours` says in words."""
    refused = ours.startswith("error") and ", or " not in ours
    if refused and status != 1:
        yield f"{label}: exit {status} instead of an error"
    if status and complaint.count("\n") != 1:
        yield f"{label}: {complaint.count(chr(10))} lines instead of one"
    if status and not ours.startswith("error"):
        yield f"{label}: refused ({complaint.strip()}) instead of: {ours}"
    if status:
        for word in re.findall(r"v1_\d+|\b\d+\b|five fields|odd number|figure", ours):
            if word not in complaint and word != "figure":
                yield f"{label}: {word!r} is not in: {complaint.strip()}"
    elif "note" in ours and not json.loads(said)["notes"]:
        yield f"{label}: no note"


def arguments_of(base: Path, case: dict[str, str], scratch: Path) -> list[str]:
    """The command for a malformed file; what else it needs comes from the sound case of its benchmark."""
    name, file = case["benchmark"], base / "errors" / case["file"].split(" (")[0]
    sound = base / name
    if name == "mme":
        shutil.copytree(sound / "results", scratch / "results")
        if "is absent" in case["file"]:
            (scratch / "results" / case["file"].split()[0]).unlink()
        else:
            shutil.copyfile(file, scratch / "results" / file.name)
        return [name, str(scratch / "results")]
    if name == "mmvet":
        data, replies = sound / "mm-vet.json", sound / "judge_replies.json"
        return [name, str(file), "--data", str(data), "--replies", str(replies)]
    if name == "pope":
        return [name, str(file / "answers.jsonl"), "--data", str(file / "labels.jsonl")]
    if name == "mathvista":
        return [name, str(file), "--data", str(sound / "testmini.json")]
    if name == "hallusionbench":
        return [name, str(file), "--replies", str(sound / "judge_replies.json")]
    if name == "amber":
        tables = [f"{kind}={sound / kind}.json" for kind in ("nouns", "similarity")]
        return [name, str(file), "--data", str(sound), *(text for table in tables for text in ("--set", table))]
    if name == "llava_bench":
        for path in ("context.jsonl", "answers_gpt4.jsonl"):
            shutil.copyfile(sound / path, scratch / path)
        shutil.copyfile(file, scratch / "questions.jsonl")
        answers, replies = sound / "answers_model.jsonl", sound / "judge_replies.json"
        return [name, str(answers), "--data", str(scratch), "--replies", str(replies)]
    return [name, str(file)]


def main(arguments: list[str]) -> int:
    """Prints the differences."""
    if len(arguments) != 1:
        print("usage: python -m tests.evaluation.check_index INDEX.json", file=sys.stderr)
        return 2
    found = check(Path(arguments[0]))
    print("\n".join(found) if found else "no difference")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
