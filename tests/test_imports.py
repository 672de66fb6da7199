"""What may import what: the arrows of docs/architecture.md, and what can be used without most dependencies."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Package -> the others of ours it may import, besides the leaves. Importing only for type checkers is free.
_LEAVES = {"errors", "locks", "durable", "arguments"}
_BELOW = {"corpus", "models", "nn", "hardware", "checkpoints"}
ALLOWED = {
    "silkie_jax.nn": set(),
    "silkie_jax.corpus": set(),
    "silkie_jax.models": {"nn", "image_limits"},
    "silkie_jax.checkpoints": {"models", "nn"},
    "silkie_jax.hardware": {"nn"},
    "silkie_jax.preference": {"corpus", "models", "nn", "hardware"},
    "silkie_jax.scoring": {*_BELOW, "preference"},
    "silkie_jax.generation": {*_BELOW, "loading"},
    "silkie_jax.serving": {*_BELOW, "image_limits", "generation", "scoring", "preference"},
    "silkie_jax.evaluation": {
        *_BELOW,
        "yaml_files",
        "image_limits",
        "loading",
        "endpoints",
        "preference",
        "scoring",
        "generation",
    },
    "silkie_jax.training": {*_BELOW, "yaml_files", "preference", "scoring", "generation", "evaluation"},
    "silkie_jax.forecast": {*_BELOW, "preference", "training"},
    "silkie_jax.iteration": {"endpoints", "scoring", "preference", "corpus", "yaml_files"},
    "silkie_jax.endpoints": {"yaml_files", "image_limits"},
    "data_prep": {"corpus", "endpoints", "image_limits", "yaml_files"},
}
# The rooms of data_prep -> the others of it that each may import; `run` is what all of them fill and read.
ROOMS = {
    "run": {"sentences"},
    "replies": set(),
    "clip_server": set(),
    "sentences": set(),
    "tables": set(),
    "instructions": {"tables", "run"},
    "search": {"sentences", "run"},
    "respond": {"search", "instructions", "tables", "run"},
    "synthesize": {"replies", "instructions", "tables", "run"},
    "judging": {"sentences", "replies", "instructions", "tables", "run"},
    "corpora": {"synthesize", "judging", "replies", "instructions", "tables", "run"},
    "cli": {"corpora", "synthesize", "judging", "respond", "search", "replies", "instructions", "tables", "run"},
}


def our_imports(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere but under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("silkie_jax", "data_prep")}


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_point_one_way(package):
    allowed = (f"{package}.", *(f"silkie_jax.{name}." for name in ALLOWED[package] | _LEAVES))
    for path in sorted((ROOT / package.replace(".", "/")).rglob("*.py")):
        for name in our_imports(path):
            assert f"{name}.".startswith(allowed), f"{path.relative_to(ROOT)} imports {name}"


def test_rooms_of_data_prep_make_no_circle():
    for path in sorted((ROOT / "data_prep").rglob("*.py")):
        room = path.relative_to(ROOT / "data_prep").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        allowed = ROOMS[room] | {room}
        for name in our_imports(path):
            if name.startswith("data_prep."):
                assert name.split(".")[1] in allowed, f"{path.relative_to(ROOT)} imports {name}"


def imported(code: str) -> set[str]:
    """Top-level names of the modules loaded in a fresh interpreter after running `code`."""
    code = textwrap.dedent(code) + "\nimport sys; print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_model_objective_and_step_need_little():
    """They run wherever jax, flax and optax do (which bring NumPy, Orbax and absl); jaxtyping names the shapes."""
    names = imported(
        """
        import silkie_jax.models.qwen_vl.model
        import silkie_jax.preference.losses, silkie_jax.preference.logprobs
        import silkie_jax.training.step, silkie_jax.training.config
        """
    )
    assert "jax" in names
    others = {"omegaconf", "grain", "tensorflow_datasets", "array_record", "tiktoken", "PIL", "safetensors"}
    others |= {"transformers", "tensorboardX", "tqdm", "openai", "pyarrow", "torch"}
    assert names & others == set()


def test_scoring_needs_nothing_but_the_rules():
    """Neither a model nor a network, nor what plots and judges need; word tools come when a caption is read."""
    names = imported(
        """
        from silkie_jax.evaluation.table import BENCHMARKS, find_benchmark
        import silkie_jax.evaluation.running.scoring
        for name in BENCHMARKS:
            find_benchmark(name)
        """
    )
    others = {
        "jax",
        "omegaconf",
        "jinja2",
        "matplotlib",
        "nltk",
        "openai",
        "PIL",
        "pyarrow",
        "rapidfuzz",
        "scipy",
        "spacy",
    }
    assert names & others == set()


def test_only_serving_needs_a_server():
    names = imported("import silkie_jax.cli; silkie_jax.cli.make_parser()")
    assert names & {"starlette", "uvicorn", "openai"} == set()


def test_a_model_here_is_measured_without_a_client():
    names = imported("import silkie_jax.evaluation.running.run, silkie_jax.evaluation.running.local")
    assert names & {"openai", "httpx", "httpx2", "transformers", "pyarrow"} == set()


@pytest.mark.parametrize(
    "code",
    [
        "import silkie_jax",
        "import silkie_jax.corpus",
        """
        import importlib, pkgutil, data_prep, silkie_jax.endpoints, silkie_jax.iteration
        for package in (data_prep, silkie_jax.endpoints, silkie_jax.iteration):
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)
        """,
        "import silkie_jax.cli; silkie_jax.cli.make_parser()",
        """
        from silkie_jax.evaluation.table import BENCHMARKS, find_benchmark
        import silkie_jax.evaluation.running.scoring, silkie_jax.evaluation.running.run
        import silkie_jax.evaluation.running.endpoint, silkie_jax.evaluation.report.page
        for name in BENCHMARKS:
            find_benchmark(name)
        """,
    ],
)
def test_no_jax_where_none_is_needed(code):
    assert imported(code) & {"jax", "flax", "tensorflow", "torch"} == set()
