"""The PyTorch peer does what it is compared for: the DPO loss of the recipe, alike in all its variants."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the peer needs the dev-torch extra (make test-torch)")
pytest.importorskip("transformers", reason="the peer needs the dev-torch extra")
pytest.importorskip("peft", reason="the peer needs the dev-torch extra (make test-torch)")

from benchmarks import peer_torch, step  # noqa: E402
from benchmarks.workload import MODELS, TINY, make_instructions  # noqa: E402
from silkie_jax.errors import UserError  # noqa: E402
from silkie_jax.models.qwen_vl.model import QwenVL  # noqa: E402
from tests.benchmarks.conftest import cells  # noqa: E402

PAIRS, UPDATES = 1, 4
PACKED = dataclasses.replace(peer_torch.TRICKS, packed=True)  # on SDPA here, with flash-attn in earnest
RECIPES = {"trl": peer_torch.VARIANTS["trl"], "tricks": peer_torch.VARIANTS["tricks"], "packed": PACKED}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Of PyTorch's: two wait for each other at every operation while the machine does something else as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def batch():
    return peer_torch.make_batch(make_instructions(TINY, 1), PAIRS, "cpu")


@pytest.fixture(scope="module")
def losses(batch):
    """The losses of some updates on one batch, by recipe."""
    found = {}
    for name, recipe in RECIPES.items():
        peer = peer_torch.Step(TINY, recipe, "cpu", learning_rate=1e-2)
        reference = peer.reference(batch) if recipe.precomputed else None
        found[name] = [peer.update(batch, reference) for _ in range(UPDATES)]
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_starts_at_log_2_and_falls(losses, name):
    assert losses[name][0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(later < earlier for earlier, later in zip(losses[name], losses[name][1:], strict=False))
    assert losses[name][-1] < 0.9 * losses[name][0]


@pytest.mark.parametrize("name", ["tricks", "packed"])
def test_tricks_change_nothing_but_the_time(losses, name):
    np.testing.assert_allclose(losses[name], losses["trl"], rtol=1e-4)


def test_bfloat16_under_autocast_is_the_same_within_its_precision(losses):
    """As it runs on a GPU: bfloat16 weights and images, float32 adapters and scores."""
    for name, recipe in RECIPES.items():
        batch = peer_torch.make_batch(make_instructions(TINY, 1), PAIRS, "cpu", torch.bfloat16)
        peer = peer_torch.Step(TINY, recipe, "cpu", torch.bfloat16, learning_rate=1e-2)
        kinds = {p.requires_grad: p.dtype for p in peer.model.parameters()}
        assert kinds == {True: torch.float32, False: torch.bfloat16}
        reference = peer.reference(batch) if recipe.precomputed else None
        found = [peer.update(batch, reference) for _ in range(2)]
        np.testing.assert_allclose(found, losses[name][:2], rtol=0.05)


def test_log_probabilities_are_those_of_separate_sequences(batch):
    """Of one sequence by itself, by PyTorch's own cross-entropy."""
    peer = peer_torch.Step(TINY, peer_torch.VARIANTS["trl"], "cpu")
    together = peer.logps(batch)
    for n in range(2 * PAIRS):
        tokens, pixels = batch.tokens[n : n + 1], batch.pixels[n : n + 1]
        logits = peer.model(tokens, pixels)[0, :-1]
        targets = torch.where(batch.labelled[n], batch.tokens[n], -100)[1:]
        expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        assert together[n].item() == pytest.approx(expected.item(), abs=2e-4 * abs(expected.item()))


def test_the_image_matters(batch):
    peer = peer_torch.Step(TINY, peer_torch.VARIANTS["tricks"], "cpu")
    other = dataclasses.replace(batch, pixels=batch.pixels.flip(-1))
    assert (peer.logps(other) - peer.logps(batch)).abs().min() > 1e-4


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_it_has_as_many_parameters_as_ours(size):
    """The decoder's to the last; the vision tower's but for CLIP's class token and norm, and tables of positions."""
    config = MODELS[size]
    peer = peer_torch.make_model(config, peer_torch.VARIANTS["trl"], "meta")
    ours = nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0)))

    def count(module: nnx.Module) -> int:
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nnx.state(module, nnx.Param)))

    def theirs(module: torch.nn.Module, adapter: bool) -> int:
        return sum(p.numel() for name, p in module.named_parameters() if ("lora_" in name) == adapter)

    assert theirs(peer.decoder, False) == count(ours.language)
    v = config.visual
    patches = v.grid**2
    more = (patches + 1 - 256) * v.width + patches * config.hidden_size  # tables of positions, not interpolated ones
    more += 3 * v.width  # the class token, and CLIP's last norm, which is not used
    assert theirs(peer.vision, False) + theirs(peer.resampler, False) == count(ours.visual) + more
    if size == "full":
        assert theirs(peer.decoder, True) == 112_197_632 + 32 * 2 * 64 * 4096  # ours has one A for q, k and v


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(peer_torch, "NEEDED", ("torch", "no_such_module"))
    with pytest.raises(UserError, match=r"no_such_module.*pip install 'silkie-jax\[dev-torch\]'"):
        peer_torch.check_installed()


@pytest.mark.slow
def test_the_script_runs(run):
    options = ["--size", "tiny", "--variants", "trl", "tricks", "--pairs", "1", "--turns", "1", "--steps", "1"]
    printed = run(peer_torch, *options)
    assert all(cells(printed, name)[-1].startswith("0.6931") for name in ("trl", "tricks"))  # log 2


@pytest.mark.slow
def test_the_step_is_compared_with_it(run):
    options = ["--size", "tiny", "--turns", "1", "--steps", "1", "--remat", "full"]
    printed = run(step, *options, "--peer", "trl", "--peer-pairs", "1")
    assert "- ours : trl = " in printed
