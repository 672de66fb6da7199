"""`silkie VERB`: parsing and calling, nothing else. Imports happen in the verb, so that `--help` is quick."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.cli import add_verbs as add_corpus_verbs
from silkie_jax.arguments import Parser, Verbs, add_precision
from silkie_jax.errors import UserError
from silkie_jax.evaluation.cli import add_verbs as add_evaluation_verbs
from silkie_jax.iteration.config import STAGES

if TYPE_CHECKING:
    from silkie_jax.training.config import TrainConfig


GROUPS = {
    "checkpoints": ("convert", "export"),
    "preference corpora": ("corpus",),
    "training": ("train", "reference", "compile", "iterate"),
    "using a model": ("chat", "serve", "score"),
    "measuring": ("evaluate",),
    "this machine": ("doctor", "completion"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status. A user's mistake is one line on stderr and status 1."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes positional arguments in one place only; overrides may also follow options.
    if not hasattr(args, "overrides") or any("=" not in item or item.startswith("-") for item in rest):
        args = parser.parse_args(argv)
    else:
        args.overrides += rest
    try:
        return args.run(args) or 0
    except UserError as e:
        print(f"silkie: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:
        print(f"silkie: {str(e) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:  # a full disk, no permission, a file in the way
        if e.errno is None:
            raise
        print(f"silkie: {e.filename}: {e.strerror}" if e.filename else f"silkie: {e.strerror}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """All verbs with their arguments."""
    parser = Parser("silkie", description="Preference distillation of Qwen-VL in JAX.")
    verbs = Verbs(parser, GROUPS)
    verb = verbs.add

    p = verb(
        "convert",
        _convert,
        "Turn a Hugging Face Qwen-VL checkpoint into sharded weights for training.",
        "silkie convert Qwen/Qwen-VL-Chat weights/qwen-vl-chat",
    )
    p.add_argument("src", help="a folder or a hub id, such as Qwen/Qwen-VL-Chat")
    p.add_argument("dst", help="the folder to make")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="type to store; default: as it is")

    p = verb(
        "export",
        _export,
        "Write a model or a training run in Hugging Face form, for PyTorch.",
        "silkie export runs/silkie exported/silkie",
    )
    p.add_argument("src", help="a training run, finished or not, a converted folder or a Hugging Face folder")
    p.add_argument("dst", help="the folder to make")
    p.add_argument("--step", type=int, metavar="N", help="a run's checkpoint of this step; default: result or last")
    p.add_argument(
        "--adapter",
        nargs="?",
        const=True,
        action="append",
        metavar="DIR",
        help="with DIR: merge this PEFT adapter, or several; without: write a run's PEFT adapter and no merged model",
    )
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="type to store; default: as it is")

    corpus = Verbs(
        verb(
            "corpus",
            None,
            "Build preference corpora.",
            "silkie corpus respond runs/mine --pool configs/pools/mine.yaml",
        )
    )
    p = corpus.add(
        "import",
        _corpus_import,
        "Import VLFeedback rows, or pairs, with their images.",
        "silkie corpus import --jsonl vlfeedback_80k.jsonl --images merged_images.zip corpora/vlfeedback",
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--jsonl", metavar="FILE", help="VLFeedback rows: JSONL or parquet")
    source.add_argument("--pairs", metavar="FILE", help="rows of image, prompt, chosen, rejected: JSONL or parquet")
    p.add_argument(
        "--image-pairs",
        action="store_true",
        help="two images of --pairs' rows are the chosen response's and the rejected one's",
    )
    p.add_argument("--scale", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of --jsonl's ratings; default: 1 5")
    p.add_argument("--images", metavar="PATH", help="the rows' images: a folder, zip or tar; default: beside the rows")
    p.add_argument("dst", help="the corpus folder to make, or to complete")

    add_corpus_verbs(corpus.add)

    evaluation = verb(
        "evaluate",
        None,
        "Measure checkpoints by benchmarks.",
        "silkie evaluate run mme pope --model exported/silkie --data benchmarks --out evals/silkie",
    )
    add_evaluation_verbs(Verbs(evaluation).add)

    p = verb(
        "train",
        _train,
        "Train by DPO or supervised fine-tuning; continues a run that was cut off.",
        "silkie train configs/silkie.yaml model=weights/qwen-vl-chat corpus=corpora/vlfeedback run_dir=runs/silkie",
    )
    p.add_argument("config", help="a YAML file")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    p.add_argument("--profile", type=int, default=0, metavar="STEPS", help="write an XLA trace of so many steps")
    p.add_argument("--check", action="store_true", help="check the configuration and train nothing")
    _add_hosts(p)

    p = verb(
        "reference",
        _reference,
        "Store beside a corpus what training need not compute: the reference's log-probabilities, features of images.",
        "silkie reference configs/silkie.yaml reference=precomputed model=weights/qwen-vl-chat "
        "corpus=corpora/vlfeedback run_dir=runs/silkie",
    )
    p.add_argument("config", help="the YAML file of the training run, with reference or features: precomputed")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    _add_hosts(p)

    p = verb(
        "compile",
        _compile,
        "Compile a run's step for a machine that is not there: does it fit, how fast?",
        "silkie compile configs/silkie-v5e-16.yaml --topology v5e:4x4",
    )
    p.add_argument("config", help="the YAML file of the training run")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    p.add_argument(
        "--topology", required=True, help="such as v5e:4x4, v5p:4x4x4, v6e:8x8, h100:8, h200:1, or cpu:8 for a dry run"
    )
    p.add_argument(
        "--tokens", type=int, help="all rows are padded to this; default: the corpus's own, or published lengths"
    )
    p.add_argument("--json", action="store_true", help="print the numbers as one JSON object")

    p = verb(
        "iterate",
        _iterate,
        "Train in rounds on the policy's own answers: respond, rate, build, train, again and again.",
        "silkie iterate configs/systems/spa.yaml run_dir=runs/spa --plan",
    )
    p.add_argument("config", help="a YAML file")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    p.add_argument("--plan", action="store_true", help="print the commands and run none")
    p.add_argument("--until", choices=STAGES, help="end after this stage of the first round that is not done")

    p = verb(
        "score",
        _score,
        "Log-probability of every response of a corpus, as training sees it.",
        "silkie score weights/qwen-vl-chat corpora/vlfeedback --out scores.jsonl",
    )
    p.add_argument("model")
    p.add_argument("corpus")
    p.add_argument("--out", required=True, metavar="FILE.jsonl")
    p.add_argument("--adapter", metavar="DIR", help="a PEFT folder")
    add_precision(p, "float32")
    p.add_argument("--batch-rows", type=int, default=4, help="instructions at once")
    p.add_argument("--max-length", type=int, default=2048, help="tokens of prompt and one response")

    p = verb(
        "chat",
        _chat,
        "Ask a model about images.",
        'silkie chat exported/silkie --image photo.jpg --prompt "What is unusual here?"',
    )
    p.add_argument("model")
    p.add_argument("--image", action="append", default=[], metavar="FILE", help="may be given several times")
    p.add_argument("--prompt", required=True)
    p.add_argument("--adapter", metavar="DIR", help="a PEFT folder")
    p.add_argument("--greedy", action="store_true", help="take the most probable token, instead of sampling")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--top-p", type=float, help="default: the model's generation_config.json")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-new-tokens", type=int, help="default: the model's generation_config.json")
    p.add_argument("--system", help="the system message")
    add_precision(p, "float32")
    p.add_argument("--json", action="store_true", help='print {"response", "tokens"}')

    p = verb(
        "serve",
        _serve,
        "Put a model behind the OpenAI protocol, on this machine.",
        "silkie serve exported/silkie --port 8000",
    )
    p.add_argument("model")
    p.add_argument("--adapter", metavar="DIR", help="a PEFT folder")
    add_precision(p, "bfloat16")
    p.add_argument(
        "--name",
        action="append",
        default=[],
        help="what clients call the model; default: the folder's; may be repeated",
    )
    p.add_argument("--host", default="127.0.0.1", help="the address to listen at")
    p.add_argument("--port", type=int, default=8000, help="0: any that is free")
    p.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name of this machine")
    p.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key that clients must show")
    p.add_argument("--slots", type=int, help="replies generated together; default: what memory has room for")
    p.add_argument("--context", type=int, default=2048, help="tokens of a prompt and its reply")
    p.add_argument("--queue", type=int, default=256, help="replies that may wait beyond those in slots")
    p.add_argument("--timeout", type=float, default=600.0, help="seconds that a request may take, waiting included")
    p.add_argument("--max-body", type=int, default=32, metavar="MIB", help="size of a request")
    p.add_argument("--max-images", type=int, default=16, help="images of a request")
    p.add_argument("--max-pixels", type=int, help="pixels of an image; default: about 89 million")
    p.add_argument("--max-n", type=int, default=16, help="replies to one request")
    p.add_argument("--top-logprobs", type=int, default=5, help="the most that a request may ask for")
    p.add_argument("--mesh", default="", metavar="fsdp=N,...", help="sizes of data, fsdp and tensor; default: all data")
    p.add_argument("--end-with-stdin", action="store_true", help="end when standard input does")

    p = verb(
        "doctor",
        _doctor,
        "Say what is installed, what this machine computes with, and what is missing for which job.",
        "silkie doctor --json",
    )
    p.add_argument("--folder", default=".", metavar="DIR", help="where work would be done, for its free disk")
    p.add_argument("--json", action="store_true", help="print one JSON object")

    p = verb(
        "completion",
        _completion,
        "Print what lets a shell complete verbs and options; its first lines say where to put it.",
        "silkie completion bash",
    )
    p.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    verbs.list_groups()
    return parser


def _add_hosts(p: argparse.ArgumentParser) -> None:
    """One process a host; on TPU pods, Slurm and Open MPI they find each other without these."""
    hosts = p.add_argument_group("several hosts", "not needed on TPU pods and under Slurm or Open MPI")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs")
    hosts.add_argument("--processes", type=int, metavar="N")
    hosts.add_argument("--process", type=int, metavar="K", help="this one's number, from 0")


def _join_hosts(args: argparse.Namespace) -> "TrainConfig":
    """Meets the other hosts, then reads the configuration: one that cannot tells the others."""
    from silkie_jax.hardware.distributed import start, together
    from silkie_jax.training.config_file import load_config

    start(args.coordinator, args.processes, args.process)
    with together():
        return load_config(args.config, args.overrides)


def _convert(args: argparse.Namespace) -> None:
    from silkie_jax.checkpoints.convert import convert

    convert(args.src, args.dst, dtype=args.dtype)
    print(f"converted to {args.dst}")


def _export(args: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # weights only pass through, and a run may have the accelerators
    from silkie_jax.training.result import export_run

    adapter = args.adapter if args.adapter and len(args.adapter) > 1 else args.adapter and args.adapter[0]
    if isinstance(adapter, list) and True in adapter:
        raise UserError("--adapter: name a folder each time, or give it once without one")
    step = export_run(args.src, args.dst, adapter=adapter, dtype=args.dtype, step=args.step)
    print(f"exported to {args.dst}" if step is None else f"exported step {step} of {args.src} to {args.dst}")


def _corpus_import(args: argparse.Namespace) -> None:
    if args.jsonl:
        if args.image_pairs:
            raise UserError("--image-pairs: rows of --jsonl are no pairs; leave it out")
        from data_prep.tables.vlfeedback import SCALE, import_vlfeedback

        summary = import_vlfeedback(args.jsonl, args.images, args.dst, scale=tuple(args.scale or SCALE))
    elif args.scale:
        raise UserError("--scale: pairs have no ratings; leave it out")
    else:
        from data_prep.tables.given_pairs import import_pairs

        summary = import_pairs(args.pairs, args.images, args.dst, image_pairs=args.image_pairs)
    print(summary.table())


def _train(args: argparse.Namespace) -> None:
    if args.check:
        from silkie_jax.training.config_file import load_config

        load_config(args.config, args.overrides)
        print("the configuration is sound")
        return
    config = _join_hosts(args)
    from silkie_jax.hardware.programs import kept_programs
    from silkie_jax.training.loop import train

    with kept_programs(Path(config.run_dir) / "compiled"):
        print(f"finished: {train(config, profile=args.profile)}")


def _reference(args: argparse.Namespace) -> None:
    config = _join_hosts(args)
    from silkie_jax.hardware.programs import kept_programs
    from silkie_jax.scoring.features import compute_features
    from silkie_jax.scoring.reference import compute_reference

    with kept_programs(Path(config.run_dir) / "compiled"):
        if config.features == "precomputed":
            print(f"stored: {compute_features(config)}")
        if config.features == "live" or config.reference == "precomputed":
            print(f"stored: {compute_reference(config)}")


def _compile(args: argparse.Namespace) -> int:
    from silkie_jax.forecast.forecast import forecast
    from silkie_jax.hardware.topologies import prepare
    from silkie_jax.training.config_file import load_config

    config = load_config(args.config, args.overrides)
    prepare(args.topology)
    found = forecast(config, args.topology, args.tokens, say=partial(print, file=sys.stderr, flush=True))
    print(json.dumps(found.as_dict()) if args.json else "\n".join(found.lines(config.epochs or 1)))
    return 0 if found.fits else 1


def _iterate(args: argparse.Namespace) -> None:
    from data_prep.judging.kinds import load_judge
    from data_prep.respond import load_pool
    from silkie_jax.iteration.config import load_iterate
    from silkie_jax.iteration.driver import iterate

    config = load_iterate(args.config, args.overrides)
    iterate(config, until=args.until, plan=args.plan, check_pool=load_pool, check_judge=load_judge)


def _score(args: argparse.Namespace) -> None:
    from silkie_jax.hardware.programs import kept_programs, users_folder
    from silkie_jax.scoring.score import score

    with kept_programs(users_folder()):
        score(
            args.model,
            args.corpus,
            Path(args.out),
            adapter=args.adapter,
            dtype=args.dtype,
            quantize=args.quantize,
            batch_rows=args.batch_rows,
            max_length=args.max_length,
        )


def _chat(args: argparse.Namespace) -> None:
    from silkie_jax.generation.answer import answer
    from silkie_jax.hardware.programs import kept_programs, users_folder

    with kept_programs(users_folder()):
        reply = answer(
            args.model,
            args.prompt,
            images=args.image,
            adapter=args.adapter,
            greedy=args.greedy,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            max_new_tokens=args.max_new_tokens,
            system=args.system,
            dtype=args.dtype,
            quantize=args.quantize,
        )
    print(json.dumps({"response": reply.text, "tokens": reply.tokens}, ensure_ascii=False) if args.json else reply.text)


def _completion(args: argparse.Namespace) -> None:
    import shtab

    print(shtab.complete(make_parser(), args.shell))


def _doctor(args: argparse.Namespace) -> None:
    from silkie_jax.doctor import examine, lines

    if not Path(args.folder).is_dir():
        raise UserError(f"--folder {args.folder}: no such folder")
    found = examine(Path(args.folder).resolve())
    print(json.dumps(found) if args.json else "\n".join(lines(found)))


def _serve(args: argparse.Namespace) -> None:
    from silkie_jax.hardware.mesh import read_mesh
    from silkie_jax.hardware.programs import kept_programs, users_folder
    from silkie_jax.image_limits import MAX_PIXELS
    from silkie_jax.serving.limits import Limits
    from silkie_jax.serving.serve import ServeOptions, serve

    limits = Limits(
        body=args.max_body * 2**20,
        images=args.max_images,
        pixels=MAX_PIXELS if args.max_pixels is None else args.max_pixels,
        n=args.max_n,
        seconds=args.timeout,
    )
    same = ("model", "adapter", "dtype", "quantize", "host", "port", "api_key_env", "slots", "context", "queue")
    options = {name: getattr(args, name) for name in (*same, "top_logprobs", "end_with_stdin")}
    with kept_programs(users_folder()):
        serve(
            ServeOptions(
                **options, names=args.name, allow_hosts=args.allow_host, mesh=read_mesh(args.mesh), limits=limits
            )
        )


if __name__ == "__main__":
    sys.exit(main())
