"""CSR (arXiv 2405.14622): which sentences are continued, ranks, paths and the choice between them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sentences import Sentence, choice, kept, path_reward, paths, ranks, selected, sentence_rewards
from tests.related.differences import close, same


def trees(folder: Path) -> Iterator[str]:
    """Every tree of `csr_trees.json`: the release's way and the paper's formula."""
    data = json.loads((folder / "csr_trees.json").read_text())
    for number, tree in enumerate(data["trees"]):
        yield from (f"tree {number}: {line}" for line in _tree(tree, data))


def _tree(recorded: dict[str, Any], data: dict[str, Any]) -> Iterator[str]:
    nodes = {node["node"]: node for node in recorded["nodes"]}
    tree = [
        Sentence(node["node"], node["parent"], node["sentence"], node["own_score"], node["final"])
        for node in recorded["nodes"]
        if node["parent"] is not None
    ]
    yield from same("expanded in order", _expanded(nodes, data), recorded["expanded_in_order"])
    counting = kept(tree, "release")
    stay = [one.number for one in tree if nodes[one.number]["kept"]]
    yield from same("kept", [one.number for one in counting], stay)
    likeness = {one.number: nodes[one.number]["clip_score"] for one in counting}
    for name, of in (
        ("rank", ranks(counting, {one.number: one.language for one in counting})),
        ("clip_rank", ranks(counting, likeness)),
    ):
        expected = [nodes[one.number][name] for one in counting]
        yield from close(name, [of[one.number] for one in counting], expected, rtol=1e-9)
    ways = paths(counting)
    yield from same(
        "paths", [[0, *(one.number for one in way)] for way in ways], [p["nodes"] for p in recorded["paths"]]
    )
    weight = data["weight_of_clip"]
    by_rank = sentence_rewards(counting, likeness, clip_weight=weight, reward="rank")
    for name, over in (("cumulative", "sum"), ("mean_over_nodes", "release")):
        worth = {way[-1].number: path_reward(way, by_rank, over) for way in ways}
        yield from close(name, [-value for value in worth.values()], [p[name] for p in recorded["paths"]], rtol=1e-6)
    yield from same("choice", choice(worth), (recorded["chosen"], recorded["rejected"]))
    raw = sentence_rewards(counting, likeness, clip_weight=weight, reward="raw")
    worth = {way[-1].number: path_reward(way, raw, "sum") for way in ways}
    paper = recorded["paper_formula"]
    yield from close("paper", list(worth.values()), [paper["reward"][str(leaf)] for leaf in worth], rtol=1e-6)
    yield from same("paper's choice", choice(worth), (paper["chosen"], paper["rejected"]))


def _expanded(nodes: dict[int, dict[str, Any]], data: dict[str, Any]) -> list[int]:
    """The release's order, level by level, by the cumulated language score."""
    few = data["kept_for_expansion"]
    order, level = [], [0]
    while level:
        order += level
        open_ones = [n for n, node in nodes.items() if node["parent"] in level and not node["final"]]
        open_ones.sort(key=lambda n: (level.index(nodes[n]["parent"]), n))  # as they came
        level = selected(
            open_ones, lambda n: nodes[n]["cumulative_score"], few["when_at_least"], few["best"], few["worst"]
        )
        if not any(nodes[n]["expanded"] for n in level):  # the recording ends here
            break
    return order
